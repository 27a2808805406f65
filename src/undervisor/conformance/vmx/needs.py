"""What a VMX test can need of the processor, asked of its capability MSRs and CPUID."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from undervisor.arch.bits import Register
from undervisor.arch.vmx.capabilities import VmxMisc, VmxMsr
from undervisor.arch.vmx.controls import SecondaryControls
from undervisor.conformance.expect import Lacking
from undervisor.conformance.suite import Need
from undervisor.conformance.vmx.lab import VmxLab

T = TypeVar("T")


def control(kind: type[Register], name: str) -> Need:
    """Bit `name` of a control word may be 1."""
    bits = kind.FIELDS[name]

    def present(lab: VmxLab) -> bool:
        return lab.supports(kind, name)

    return Need(f'the control "{bits.about or name}"', present)


def ept(name: str) -> Need:
    """EPT or VPID capability `name` of IA32_VMX_EPT_VPID_CAP."""

    def present(lab: VmxLab) -> bool:
        return bool(getattr(lab.ept_capability(), name))

    return Need(f"the EPT or VPID capability {name}", present)


def misc(name: str) -> Need:
    """A field of IA32_VMX_MISC that is not zero."""

    def present(lab: VmxLab) -> bool:
        return bool(getattr(VmxMisc(lab.l1.rdmsr(VmxMsr.IA32_VMX_MISC).value), name))

    return Need(f"IA32_VMX_MISC.{name}", present)


EPT = control(SecondaryControls, "enable_ept")
VPID = control(SecondaryControls, "enable_vpid")
UNRESTRICTED = control(SecondaryControls, "unrestricted_guest")
XSAVES = control(SecondaryControls, "enable_xsaves")


def offered(ways: Mapping[T, Callable[[], dict[int, int]]]) -> dict[T, dict[int, int]]:
    """The fields that each way gives, of those for which the processor lacks nothing."""
    found = {}
    for what, way in ways.items():
        try:
            found[what] = way()
        except Lacking:
            continue
    return found
