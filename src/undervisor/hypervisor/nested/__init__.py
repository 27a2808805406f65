"""Nested virtualization: what joins the loop to the two vendors.

`nested.vmx` and `nested.svm` have the same file names and implement `Nested`, one object a vCPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, Protocol

from undervisor.arch.x86.events import Fault
from undervisor.hypervisor.exit import Exit
from undervisor.hypervisor.verdict import Verdict

if TYPE_CHECKING:
    from undervisor.hypervisor.vcpu import Vcpu

INIT_BLOCKED: Final = -1
"""INIT stays pending, and other events may be delivered."""

Handler = Callable[["Vcpu", Exit], Verdict]


class Nested(Protocol):
    """The virtualization extension of one vCPU, as L0 shows it to L1."""

    l1_exits: Mapping[int, Handler]
    """Exits of L1 that the vendor handles itself: its instructions."""

    l2_exits: Mapping[int, Handler]
    """Exits of L2 that L1 did not want and that need more than the common handler."""

    @property
    def reason(self) -> str:
        """Why the last world switch happened, in the vendor's words; for the trace."""

    def reflect(self, vcpu: Vcpu, exit: Exit) -> Verdict | None:
        """An exit of L2: turn it into a VM exit that L1 sees, or None when L0 handles it."""

    def reflect_fault(self, vcpu: Vcpu, exit: Exit, fault: Fault) -> Verdict | None:
        """L0 is about to inject an exception into L2: a VM exit instead where L1 intercepts."""

    def deliver(self, vcpu: Vcpu) -> int:
        """Pending events while L2 runs: exits to L1 or injections; the silicon's action."""

    def take_init(self, vcpu: Vcpu) -> int | None:
        """A pending INIT: the silicon's action, None when L0 resets, or `INIT_BLOCKED`.

        Clears `init_pending` when it is dropped or redirected; leaves it when INIT is blocked.
        """

    def to_hpa(self, vcpu: Vcpu, gpa: int, *, write: bool = False, tables: bool = False) -> int:
        """Where L2's guest-physical address is; GuestExit where L1's tables do not allow it.

        `tables`: for the walk of L2's own page tables, not for the address that it gives.
        """

    def peek_gpa(self, vcpu: Vcpu, gpa: int) -> int:
        """A quadword of L2's guest-physical memory without side effects; 0 where there is none."""

    def allows_cr0(self, vcpu: Vcpu, value: int) -> bool:
        """Whether the extension lets the running world load CR0: bits fixed in VMX operation."""

    def allows_cr4(self, vcpu: Vcpu, value: int) -> bool:
        """Whether the extension lets the running world load CR4."""

    def allows_instruction(self, vcpu: Vcpu, feature: str) -> bool:
        """Whether L1's controls let L2 use an instruction that L0 emulates, by its feature."""

    def deadline(self) -> int | None:
        """When (ns) the nested world needs an exit of its own accord: the preemption timer."""

    def reset(self, vcpu: Vcpu) -> None:
        """INIT or power-up: the extension is off."""


class GuestExit(Exception):
    """An access on behalf of L2 that L1's nested tables refuse: L1 must see a VM exit.

    `verdict` is what the vendor's reflection gave.
    """

    def __init__(self, verdict: Verdict) -> None:
        super().__init__("an exit to L1")
        self.verdict = verdict
