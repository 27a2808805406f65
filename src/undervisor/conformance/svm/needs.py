"""What an SVM test can need of the processor, asked of CPUID."""

from __future__ import annotations

from undervisor.arch.svm.capabilities import SvmFeatures
from undervisor.conformance.suite import Need
from undervisor.conformance.svm.lab import SvmLab


def feature(name: str) -> Need:
    """Bit `name` of CPUID Fn8000_000A_EDX."""

    def present(lab: SvmLab) -> bool:
        return lab.feature(getattr(SvmFeatures, name))

    bits = SvmFeatures.FIELDS[name]
    return Need(f"the SVM feature {bits.about or name}", present)


NPT = feature("np")


def page1gb() -> Need:
    """1-GiB pages, CPUID Fn8000_0001_EDX[26]."""
    return Need("1-GiB pages", lambda lab: lab.l1.cpuid(0x80000001).value["rdx"] >> 26 & 1)
