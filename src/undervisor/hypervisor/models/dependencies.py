"""Which features cannot be without which others.

A feature stays only while *all* that it needs are there.  Sources: the descriptions of the bits
in the SDM ("CPUID--CPU Identification", "VM-Execution Control Fields", "Checks on VMX Controls")
and in the APM ("Determining Support for SVM").
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import Final

from undervisor.arch.vmx.fields import VmcsField
from undervisor.arch.x86.cpuid import FEATURES, Leaf, Vendor
from undervisor.hypervisor.models.vmx_features import VMX_FEATURES, Kind

_TABLE: Final[dict[str, str]] = {
    "sse": "fxsr",
    "sse2": "sse",
    "pni": "sse2",
    "ssse3": "pni",
    "sse4.1": "ssse3",
    "sse4.2": "sse4.1",
    "sse4a": "pni",
    "aes": "sse2",
    "pclmulqdq": "sse2",
    "mmxext": "mmx",
    "cx16": "cx8 lm",
    "lm": "fpu pae msr cx8 cmov pge fxsr sse2",
    "pae": "pse",
    "pge": "pse",
    "pse36": "pse",
    "nx": "pae",
    "pdpe1gb": "lm",
    "lahf-lm": "lm",
    "fsgsbase": "lm",
    "pcid": "lm",
    "invpcid": "pcid",
    "syscall": "msr",
    "sep": "msr",
    "mca": "mce msr",
    "mtrr": "msr",
    "pat": "msr",
    "apic": "msr",
    "x2apic": "apic",
    "tsc-deadline": "apic tsc",
    "arat": "apic",
    "rdtscp": "tsc msr",
    "rdpid": "msr",
    "invtsc": "tsc",
    "tsc-adjust": "tsc msr",
    "clflushopt": "clflush",
    "xsave": "fxsr",
    "xsaveopt": "xsave",
    "xgetbv1": "xsave",
    "xsaves": "xsave msr",
    "arch-capabilities": "msr",
    "spec-ctrl": "msr",
    "ibrs-all": "spec-ctrl",
    "svm": "msr lm",
    "skinit": "svm",
    "v-vmsave-vmload": "npt",
    "vmx": "msr",
    "vmx-vnmi": "vmx-nmi-exit",
    "vmx-vnmi-pending": "vmx-vnmi",
    "vmx-cr3-load-noexit": "vmx-true-ctls",
    "vmx-cr3-store-noexit": "vmx-true-ctls",
    "vmx-exit-nosave-debugctl": "vmx-true-ctls",
    "vmx-entry-noload-debugctl": "vmx-true-ctls",
    "vmx-unrestricted-guest": "vmx-ept vmx-store-lma",
    "vmx-ept": "vmx-page-walk-4",
    "vmx-pml": "vmx-ept vmx-eptad",
    "vmx-apicv-x2apic": "vmx-flexpriority x2apic",
    "vmx-apicv-xapic": "apic",
    "vmx-apicv-register": "vmx-flexpriority",
    "vmx-apicv-vid": "vmx-flexpriority vmx-intr-exit",
    "vmx-posted-intr": "vmx-apicv-vid vmx-exit-ack-intr",
    "vmx-rdtscp-exit": "rdtscp",
    "vmx-rdrand-exit": "rdrand",
    "vmx-rdseed-exit": "rdseed",
    "vmx-invpcid-exit": "invpcid",
    "vmx-xsaves": "xsaves",
    "vmx-exit-save-preemption-timer": "vmx-preemption-timer",
    "vmx-exit-save-pat": "pat",
    "vmx-exit-load-pat": "pat",
    "vmx-entry-load-pat": "pat",
    "vmx-exit-save-efer": "nx",
    "vmx-exit-load-efer": "nx",
    "vmx-entry-load-efer": "nx",
    "vmx-entry-ia32e-mode": "lm",
    "vmx-store-lma": "lm",
    "vmx-eptp-switching": "vmx-vmfunc vmx-ept",
    "vmx-invept-single-context": "vmx-invept",
    "vmx-invept-all-context": "vmx-invept",
    "vmx-invvpid-single-addr": "vmx-invvpid",
    "vmx-invvpid-single-context": "vmx-invvpid",
    "vmx-invvpid-all-context": "vmx-invvpid",
    "vmx-invvpid-single-context-noglobals": "vmx-invvpid",
    "vmx-invvpid": "vmx-vpid",
    **dict.fromkeys(
        (
            "vmx-ept-execonly",
            "vmx-page-walk-4",
            "vmx-ept-2mb",
            "vmx-ept-1gb",
            "vmx-invept",
            "vmx-eptad",
        ),
        "vmx-ept",
    ),
}

ARCH_CAPABILITIES: Final[dict[str, int]] = {
    "rdctl-no": 0,
    "ibrs-all": 1,
    "rsba": 2,
    "skip-l1dfl-vmentry": 3,
    "ssb-no": 4,
    "mds-no": 5,
    "pschange-mc-no": 6,
    "tsx-ctrl": 7,
    "taa-no": 8,
    "sbdr-ssdp-no": 13,
    "fbsdp-no": 14,
    "psdp-no": 15,
    "bhi-no": 20,
    "pbrsb-no": 24,
    "gds-no": 26,
    "rfds-no": 27,
}
"""Features that are bits of IA32_ARCH_CAPABILITIES. SDM 4 "Architectural MSRs"."""


def _derived() -> dict[str, frozenset[str]]:
    """`_TABLE`, and what follows from where a bit is reported."""
    needs = {name: set(others.split()) for name, others in _TABLE.items()}
    for feature in FEATURES:
        if feature.leaf == Leaf.SVM:
            needs.setdefault(feature.name, set()).add("svm")
    for name in ARCH_CAPABILITIES:
        needs.setdefault(name, set()).add("arch-capabilities")
    for vmx in VMX_FEATURES:
        mine = needs.setdefault(vmx.name, set())
        mine.add("vmx")
        if vmx.field is VmcsField.SECONDARY_CONTROLS and vmx.kind is Kind.MAY_BE_ONE:
            mine.add("vmx-secondary-ctls")
    return {name: frozenset(others) for name, others in needs.items()}


NEEDS: Final[dict[str, frozenset[str]]] = _derived()
"""Feature -> all the features that it cannot be without."""

ONLY: Final[dict[str, Vendor]] = {
    **{f.name: Vendor.AMD for f in FEATURES if f.leaf == Leaf.SVM or f.name in ("svm", "skinit")},
    **{f.name: Vendor.INTEL for f in VMX_FEATURES},
    "topoext": Vendor.AMD,
    "cmp-legacy": Vendor.AMD,
    "vmx": Vendor.INTEL,
    "arch-capabilities": Vendor.INTEL,
    **dict.fromkeys(ARCH_CAPABILITIES, Vendor.INTEL),
}
"""Feature -> the one vendor whose processors can have it."""


def missing(features: Set[str]) -> dict[str, frozenset[str]]:
    """The features that lack something, each with what it lacks."""
    return {name: NEEDS[name] - features for name in features if NEEDS.get(name, set()) - features}


def consistent(features: Iterable[str]) -> frozenset[str]:
    """The largest subset of `features` in which each has what it needs."""
    kept = frozenset(features)
    while lacking := missing(kept):
        kept -= lacking.keys()
    return kept
