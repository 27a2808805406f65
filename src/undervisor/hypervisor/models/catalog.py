"""The named CPU models.

A variant is its vendor's full model without the features that came later than the processor it
is named after; features that nothing here can provide (AVX, ...) are in none of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from undervisor.arch.x86.cpuid import BY_NAME, Leaf, Vendor
from undervisor.hypervisor.models.dependencies import ONLY, consistent
from undervisor.hypervisor.models.leaves import Identity
from undervisor.hypervisor.models.model import CpuModel
from undervisor.hypervisor.models.support import SUPPORTED

_AMD_HABITS = frozenset(["mmxext", "sse4a"]) | {
    name for name, feature in BY_NAME.items() if feature.leaf == Leaf.ADDRESS_WIDTHS
}
"""Features without a vendor of their own that only AMD's processors have."""

_INTEL_HABITS = frozenset(
    ["tsc-adjust", "tsc-deadline", "spec-ctrl", "stibp", "ssbd", "md-clear", "flush-l1d"]
)
"""Features without a vendor of their own that only Intel's processors have."""


def _everything(vendor: Vendor) -> frozenset[str]:
    """All that works and that the vendor's processors have."""
    other = _AMD_HABITS if vendor is Vendor.INTEL else _INTEL_HABITS
    return consistent(name for name in SUPPORTED - other if ONLY.get(name, vendor) is vendor)


@dataclass(frozen=True, slots=True)
class Row:
    """A named model: its vendor's features without `lacks` (and what depends on those)."""

    vendor: Vendor
    family: int
    model: int
    stepping: int
    about: str
    basic_limit: int
    extended_limit: int
    lacks: str = ""


_I, _A = Vendor.INTEL, Vendor.AMD

# What each generation lacks that the next one has.
_NO_MITIGATIONS = "arch-capabilities spec-ctrl stibp ssbd md-clear flush-l1d"
_HASWELL = _NO_MITIGATIONS + " rdpid rdseed adx smap clflushopt xsaveopt xgetbv1 xsaves vmx-pml"
_WESTMERE = _HASWELL + (
    " xsave fsgsbase tsc-adjust bmi1 bmi2 movbe abm 3dnowprefetch erms smep invpcid rdrand "
    "tsc-deadline vmx-shadow-vmcs vmx-vmfunc vmx-eptad vmx-apicv-register vmx-apicv-vid "
    "vmx-posted-intr vmx-vmwrite-vmexit-fields vmx-zero-len-inject"
)
_NEHALEM = _WESTMERE + " aes pclmulqdq pcid pdpe1gb vmx-unrestricted-guest vmx-ept-1gb"
_CORE2 = _NEHALEM + (
    " sse4.2 popcnt x2apic rdtscp vmx-ept vmx-vpid vmx-true-ctls vmx-preemption-timer vmx-ple "
    "vmx-desc-exit vmx-activity-wait-sipi vmx-store-lma vmx-mtf invtsc arat "
    "vmx-exit-load-efer vmx-exit-save-efer vmx-entry-load-efer"
)
_ROME = "ibrs erms pcid invpcid"
_EPYC = _ROME + " rdpid x2apic amd-stibp amd-ssbd amd-no-ssb"
_OPTERON = _EPYC + (
    " npt nrip-save vmcb-clean flushbyasid decodeassists pause-filter vgif svm-lock ibpb xsave "
    "fsgsbase bmi1 bmi2 movbe rdrand rdseed adx smap smep clflushopt aes pclmulqdq ssse3 "
    "sse4a popcnt abm pdpe1gb monitor topoext invtsc arat 3dnowprefetch"
)

ROWS: Final[dict[str, Row]] = {
    "intel": Row(_I, 6, 106, 6, "everything that works", 0x16, 0x80000008),
    "intel-icelake": Row(_I, 6, 106, 6, "Ice Lake", 0x16, 0x80000008),
    "intel-skylake": Row(_I, 6, 85, 4, "Skylake", 0x16, 0x80000008, _NO_MITIGATIONS + " rdpid"),
    "intel-haswell": Row(_I, 6, 60, 4, "Haswell: no PML, no XSAVES", 0xD, 0x80000008, _HASWELL),
    "intel-westmere": Row(
        _I, 6, 44, 1, "Westmere: unrestricted guest, no EPT A/D flags", 0xB, 0x80000008, _WESTMERE
    ),
    "intel-nehalem": Row(
        _I, 6, 26, 3, "Nehalem: EPT and VPID, no unrestricted guest", 0xB, 0x80000008, _NEHALEM
    ),
    "intel-core2": Row(
        _I, 6, 23, 10, "Penryn: no EPT, no VPID, no true controls", 0xA, 0x80000008, _CORE2
    ),
    "amd": Row(_A, 23, 49, 0, "everything that works", 0xD, 0x8000001E),
    "amd-epyc-rome": Row(_A, 23, 49, 0, "EPYC Rome", 0xD, 0x8000001E, _ROME),
    "amd-epyc": Row(_A, 23, 1, 2, "EPYC", 0xD, 0x8000001E, _EPYC),
    "amd-opteron": Row(
        _A, 15, 65, 3, "Opteron: no nested paging, no next RIP", 0x1, 0x8000001A, _OPTERON
    ),
}
"""Every named model."""


def build(name: str) -> CpuModel:
    """The named model, without overrides; KeyError where there is none."""
    row = ROWS[name]
    features = consistent(_everything(row.vendor) - frozenset(row.lacks.split()))
    maker = "Intel" if row.vendor is Vendor.INTEL else "AMD"
    kind = "" if name in ("intel", "amd") else f", {row.about.split(':')[0]}"
    brand = f"Undervisor Virtual Processor ({maker}{kind})"
    identity = Identity(
        row.family, row.model, row.stepping, brand, row.basic_limit, row.extended_limit
    )
    return CpuModel(name, row.vendor, features, identity.reaching(features))
