"""The MSR lists of VM entry and VM exit. SDM 3C "Loading MSRs" and "Saving MSRs"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from undervisor.arch.vmx.checks.msr_lists import check_msr_load, read_list
from undervisor.arch.x86.events import Fault
from undervisor.hypervisor.exits import msr

if TYPE_CHECKING:
    from undervisor.hypervisor.nested.vmx import NestedVmx
    from undervisor.hypervisor.vcpu import Vcpu


def load(vcpu: Vcpu, nested: NestedVmx, address: int, count: int) -> int:
    """Load an MSR list; the number of the entry that failed, 0 where all were loaded."""

    def writable(index: int, value: int) -> bool:
        spec = vcpu.msr_specs.get(index)
        if spec is None:
            return False
        old = msr.read(vcpu, index) if spec.readable else 0
        return not isinstance(
            spec.legalize(old if isinstance(old, int) else 0, value, vcpu.rules, vcpu.all_msrs()),
            Fault,
        )

    def write(index: int, value: int) -> None:
        msr.write(vcpu, index, value)

    failure = check_msr_load(
        read_list(vcpu.memory.u64, address, count),
        nested.capabilities,
        writable=writable,
        load=write,
    )
    return failure.number if failure else 0


def store(vcpu: Vcpu, address: int, count: int) -> None:
    """SDM 3C "Saving MSRs" into the VM-exit MSR-store area: 16 bytes an entry, index first."""
    for number in range(count):
        where = address + 16 * number
        value = msr.read(vcpu, vcpu.memory.u32(where))
        if isinstance(value, int):
            vcpu.memory.set_u64(where + 8, value)
