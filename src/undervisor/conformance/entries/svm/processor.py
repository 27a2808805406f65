"""What the rules of VMRUN depend on, read from a running processor."""

from __future__ import annotations

from typing import Final

from undervisor.arch.svm.capabilities import CR4_BASE, SvmCapabilities
from undervisor.arch.x86.msr import EFER_BITS
from undervisor.arch.x86.registers import Cr4, Efer
from undervisor.conformance.entries.features import Features, read_features
from undervisor.guest.probe.l1 import L1State, Runner

_CR4_BITS: Final = {
    "umip": Cr4.umip,
    "la57": Cr4.la57,
    "fsgsbase": Cr4.fsgsbase,
    "pcid": Cr4.pcide,
    "xsave": Cr4.osxsave,
    "smep": Cr4.smep,
    "smap": Cr4.smap,
    "pku": Cr4.pke,
    "cet-ss": Cr4.cet,
    "fred": Cr4.fred,
}
"""The feature that gives each optional bit of CR4."""


def read_capabilities(probe: Runner, l1: L1State) -> SvmCapabilities:
    """The SVM leaf, the address width and the supported bits of CR4 and EFER."""
    features = read_features(probe)
    asids, ecx, edx = features.svm
    return SvmCapabilities(
        features=edx,
        features2=ecx,
        asids=asids,
        physical_width=features.physical_width,
        cr4=CR4_BASE | _bits(features, _CR4_BITS),
        efer=Efer.svme | Efer.lma | _bits(features, EFER_BITS),
        long_mode="lm" in features.names,
        sev_es=features.sev_es,
        host_cr0=l1.cr0,
        host_efer=l1.efer,
    )


def _bits(features: Features, table: dict[str, int]) -> int:
    mask = 0
    for name, bits in table.items():
        mask |= bits if name in features.names else 0
    return mask
