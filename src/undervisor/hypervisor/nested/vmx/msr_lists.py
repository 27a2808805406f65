"""The MSR lists of VM entry and VM exit. SDM 3C "Loading MSRs" and "Saving MSRs"."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from undervisor.arch.vmx.checks.msr_lists import check_msr_load, check_msr_store, read_list
from undervisor.arch.x86.events import Fault
from undervisor.arch.x86.msr import Msr
from undervisor.hypervisor.exits import msr

if TYPE_CHECKING:
    from undervisor.hypervisor.nested.vmx import NestedVmx
    from undervisor.hypervisor.vcpu import Vcpu

_UNIT: Final = 512
_MASK64: Final = (1 << 64) - 1


def most_entries(nested: NestedVmx) -> int:
    """The recommended maximum of a list: IA32_VMX_MISC[27:25]. What is beyond is refused."""
    return _UNIT * (nested.capabilities.misc.msr_list_limit + 1)


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

    most = most_entries(nested)
    failure = check_msr_load(
        read_list(vcpu.memory.u64, address, min(count, most)),
        nested.capabilities,
        writable=writable,
        load=write,
    )
    if failure:
        return failure.number
    return most + 1 if count > most else 0


def store(vcpu: Vcpu, nested: NestedVmx, address: int, count: int) -> int:
    """Save MSRs: 16 bytes an entry, index first; the number of the entry that failed, or 0."""
    memory, most = vcpu.memory, most_entries(nested)

    def save(number: int, index: int) -> None:
        memory.set_u64(address + 16 * number - 8, _value(vcpu, index))

    failure = check_msr_store(
        ((i, r) for i, r, _ in read_list(memory.u64, address, min(count, most))),
        nested.capabilities,
        readable=lambda index: isinstance(msr.read(vcpu, index), int),
        save=save,
    )
    if failure:
        return failure.number
    return most + 1 if count > most else 0


def _value(vcpu: Vcpu, index: int) -> int:
    """An MSR as the exit finds it; the TSC is L1's, at the moment when L2 was left."""
    if index == Msr.TSC:
        return vcpu.tsc01() - vcpu.machine.exit_cost & _MASK64
    value = msr.read(vcpu, index)
    assert isinstance(value, int), "the entry was checked"
    return value
