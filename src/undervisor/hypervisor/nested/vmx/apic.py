"""APIC virtualization: the TPR shadow, the APIC-access page, virtual-interrupt delivery.

SDM 3C "APIC Virtualization and Virtual Interrupts".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from undervisor.hypervisor import decode, mmio
from undervisor.hypervisor.exit import Exit
from undervisor.hypervisor.verdict import Verdict
from undervisor.silicon.processor import RESUME

if TYPE_CHECKING:
    from undervisor.hypervisor.nested.vmx import NestedVmx
    from undervisor.hypervisor.vcpu import Vcpu


def is_access_page(nested: NestedVmx, hpa: int) -> bool:
    """Whether an address of L1's is in the APIC-access page of a VMCS that virtualizes accesses."""
    return nested.apic_access_page is not None and hpa & -4096 == nested.apic_access_page


def access(vcpu: Vcpu, nested: NestedVmx, event: Exit, hpa: int) -> Verdict | None:
    """An access to the APIC-access page."""
    return mmio.emulate(vcpu)


def access_without_ept(vcpu: Vcpu, nested: NestedVmx, event: Exit) -> Verdict | None:
    """A fault of L1's own tables while L2 runs without EPT."""
    return None


def write_cr8(
    vcpu: Vcpu, nested: NestedVmx, decoded: decode.Instruction, value: int
) -> Verdict | None:
    """MOV to CR8 that does not exit."""
    return None


def read_cr8(vcpu: Vcpu, nested: NestedVmx, decoded: decode.Instruction) -> Verdict | None:
    """MOV from CR8 that does not exit."""
    return None


def msr_access(vcpu: Vcpu, nested: NestedVmx, number: int, *, write: bool) -> Verdict | None:
    """RDMSR or WRMSR that does not exit."""
    return None


def below_threshold(vcpu: Vcpu, nested: NestedVmx) -> Verdict | None:
    """The TPR-below-threshold exit that an entry may cause."""
    return None


def external_interrupt(vcpu: Vcpu, nested: NestedVmx) -> Verdict | None:
    """An external interrupt that exits or, posted, is processed."""
    from undervisor.hypervisor.nested.vmx import events

    return events.external_interrupt(vcpu, nested)


def deliver_virtual_interrupt(vcpu: Vcpu, nested: NestedVmx) -> int:
    """Virtual-interrupt delivery."""
    return RESUME


def virtual_interrupt_waits(vcpu: Vcpu, nested: NestedVmx) -> bool:
    """Whether a virtual interrupt waits for its window."""
    return False
