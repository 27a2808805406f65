"""A processor without a virtualization extension."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from undervisor.arch.x86.events import Fault
from undervisor.hypervisor.exit import Exit
from undervisor.hypervisor.nested import Handler
from undervisor.hypervisor.verdict import Verdict
from undervisor.silicon.processor import RESUME

if TYPE_CHECKING:
    from undervisor.hypervisor.vcpu import Vcpu


class NoNested:
    """`Nested` where CPUID offers neither VMX nor SVM: L2 does not exist."""

    l1_exits: Mapping[int, Handler] = {}
    l2_exits: Mapping[int, Handler] = {}
    reason = ""

    def reflect(self, vcpu: Vcpu, exit: Exit) -> Verdict | None:
        """There is no L2."""
        return None

    def reflect_fault(self, vcpu: Vcpu, exit: Exit, fault: Fault) -> Verdict | None:
        """There is no L2."""
        return None

    def deliver(self, vcpu: Vcpu) -> int:
        """There is no L2."""
        return RESUME

    def take_init(self, vcpu: Vcpu) -> int | None:
        """INIT is never blocked."""
        return None

    def to_hpa(self, vcpu: Vcpu, gpa: int, *, write: bool = False, tables: bool = False) -> int:
        """There is no L2."""
        return gpa

    def peek_gpa(self, vcpu: Vcpu, gpa: int) -> int:
        """There is no L2."""
        return vcpu.memory.u64(gpa)

    def allows_cr0(self, vcpu: Vcpu, value: int) -> bool:
        """No bit is fixed."""
        return True

    def allows_cr4(self, vcpu: Vcpu, value: int) -> bool:
        """No bit is fixed."""
        return True

    def allows_instruction(self, vcpu: Vcpu, feature: str) -> bool:
        """There are no controls."""
        return True

    def deadline(self) -> int | None:
        """Nothing is timed."""
        return None

    def reset(self, vcpu: Vcpu) -> None:
        """Nothing to switch off."""
