"""What the loop tells of each exit: a protocol, a default that discards, and typed events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from undervisor.hypervisor.exit import Exit
    from undervisor.hypervisor.vcpu import Vcpu
    from undervisor.hypervisor.verdict import Verdict


@dataclass(frozen=True, slots=True)
class Transition:
    """One exit and what came of it.

    `level` left the guest at `rip` at `time` (virtual ns) for `reason`, in the vendor's words;
    `to` is the level that goes on; `action` says what L0 did and `why`.  `detail` is what the exit
    was about, and `ran` how long (virtual ns) the guest had run since the machine's last exit.
    """

    time: int
    vcpu: int
    level: int
    to: int
    reason: str
    rip: int
    action: str
    why: str
    detail: str = ""
    ran: int = 0


class Tracer(Protocol):
    """Sees every exit before and after it is handled; `wants` switches it off entirely."""

    wants: bool

    def before(self, vcpu: Vcpu, exit: Exit) -> Any:
        """The exit as it came; what it returns is given to `after`."""

    def after(self, vcpu: Vcpu, exit: Exit, before: Any, verdict: Verdict) -> None:
        """The exit has been handled; the running world is the one that goes on."""


class Discard:
    """The tracer that wants nothing."""

    wants = False

    def before(self, vcpu: Vcpu, exit: Exit) -> None:
        """Nothing."""

    def after(self, vcpu: Vcpu, exit: Exit, before: Any, verdict: Verdict) -> None:
        """Nothing."""


NO_TRACE = Discard()
