"""What a handler decides about an exit.  RIP moves only by verdict."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from undervisor.arch.x86.events import Fault


@dataclass(frozen=True, slots=True)
class Resume:
    """Go on in the same world, `advance` bytes further; 0 runs the instruction again."""

    advance: int = 0


@dataclass(frozen=True, slots=True)
class Inject:
    """The instruction faults: deliver `fault` through the IDT of the world that is running."""

    fault: Fault


@dataclass(frozen=True, slots=True)
class Switched:
    """The handler has switched worlds (a nested entry or exit); go on there.

    `deliver` asks for the event that the entry injects, prepared in the processor.
    """

    deliver: int = 0


@dataclass(frozen=True, slots=True)
class Halt:
    """HLT or MWAIT completed: wait for an event, `advance` bytes further."""

    advance: int


@dataclass(frozen=True, slots=True)
class Yield:
    """PAUSE: let another vCPU run, `advance` bytes further."""

    advance: int


class Ending(Enum):
    """How a run can end."""

    GUEST = "the guest ended it"
    TRIPLE_FAULT = "triple fault"
    VMX_ABORT = "VMX abort"
    IDLE = "every processor waits for an event that cannot come"
    TIMEOUT = "the time limit has passed"
    STOPPED = "stopped by the caller"
    UNKNOWN_EXIT = "L0 met something that it cannot handle"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: `text` says it to a person, `status` is the guest's own exit code."""

    ending: Ending
    text: str
    status: int = 0


@dataclass(frozen=True, slots=True)
class Stop:
    """The run ends."""

    outcome: Outcome


Verdict = Resume | Inject | Switched | Halt | Yield | Stop

RESUME: Final = Resume()
SWITCHED: Final = Switched()
ADVANCE: Final = tuple(Resume(length) for length in range(16))
"""`Resume` by instruction length, made once."""
