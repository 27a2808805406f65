"""Nested SVM: the processor's Secure Virtual Machine extension as L1 sees it.

APM 2 "Secure Virtual Machine".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Final

from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.x86.events import Fault
from undervisor.hypervisor.exit import Exit
from undervisor.hypervisor.nested import Handler
from undervisor.hypervisor.nested.svm import events, guest, instructions, paging, reflect
from undervisor.hypervisor.nested.svm.state import SvmState
from undervisor.hypervisor.verdict import Verdict
from undervisor.silicon.glue import EXIT_BUDGET

if TYPE_CHECKING:
    from undervisor.hypervisor.vcpu import Vcpu

SvmHandler = Callable[[SvmState, "Vcpu", Exit], Verdict]

L1_EXITS: Final[dict[int, SvmHandler]] = {
    ExitCode.VMRUN: instructions.vmrun,
    ExitCode.VMLOAD: instructions.vmload,
    ExitCode.VMSAVE: instructions.vmsave,
    ExitCode.STGI: instructions.stgi,
    ExitCode.CLGI: instructions.clgi,
    ExitCode.INVLPGA: instructions.invlpga,
    EXIT_BUDGET: events.end_of_slice,
}


class NestedSvm:
    """`Nested` for SVM."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.state = SvmState(vcpu.memory)
        self.shadows = self.state.shadows
        self.l1_exits: Mapping[int, Handler] = self._bind(L1_EXITS)
        self.l2_exits: Mapping[int, Handler] = self._bind(guest.L2_EXITS)
        self._reflect = partial(reflect.reflect, self.state)

    def _bind(self, handlers: Mapping[int, SvmHandler]) -> dict[int, Handler]:
        return {int(code): partial(handler, self.state) for code, handler in handlers.items()}

    @property
    def reason(self) -> str:
        """Why the last world switch happened."""
        return self.state.reason

    def reflect(self, vcpu: Vcpu, exit: Exit) -> Verdict | None:
        """L1's intercepts decide."""
        return self._reflect(vcpu, exit)

    def reflect_fault(self, vcpu: Vcpu, exit: Exit, fault: Fault) -> Verdict | None:
        """L1's exception intercepts decide."""
        return reflect.fault(vcpu, self.state, exit.event, fault)

    def deliver(self, vcpu: Vcpu) -> int:
        """Pending events while L2 runs."""
        return events.deliver(vcpu, self.state)

    def take_init(self, vcpu: Vcpu) -> int | None:
        """GIF, the INIT intercept and VM_CR.R_INIT decide."""
        return events.take_init(vcpu, self.state)

    def to_hpa(self, vcpu: Vcpu, gpa: int, *, write: bool = False, tables: bool = False) -> int:
        """By L1's nested tables, or as it is without nested paging."""
        return paging.to_hpa(vcpu, self.state, gpa, write=write, tables=tables)

    def peek_gpa(self, vcpu: Vcpu, gpa: int) -> int:
        """By L1's nested tables, without any side effect."""
        return paging.peek_gpa(vcpu, self.state, gpa)

    def allows_cr0(self, vcpu: Vcpu, value: int) -> bool:
        """No bit is fixed."""
        return True

    def allows_cr4(self, vcpu: Vcpu, value: int) -> bool:
        """No bit is fixed."""
        return True

    def allows_instruction(self, vcpu: Vcpu, feature: str) -> bool:
        """SVM has no controls that take instructions away."""
        return True

    def deadline(self) -> int | None:
        """Nothing is timed."""
        return None

    def reset(self, vcpu: Vcpu) -> None:
        """INIT, which waits while GIF is clear: no translation is kept."""
        self.shadows.stale = True
