"""What an entry is expected to do, what it did, and one attempt to break a rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class How(Enum):
    """What became of an entry."""

    ENTERED = "L2 was entered and left by exit"
    FAIL_VALID = "VMfailValid"
    FAIL_INVALID = "VMfailInvalid"
    FAILED_ENTRY = "VM-entry failure, exit reason"
    INVALID = "VMEXIT_INVALID"
    ABORT = "VMX abort"
    FAULT = "the instruction raised exception"
    DIED = "the machine died"
    SILENT = "the machine hangs"
    WRITE = "a field of the state could not be written:"


@dataclass(frozen=True, slots=True)
class Seen:
    """An entry's outcome.

    `number` is the VM-instruction error, the basic exit reason, the exit code, the abort indicator
    or the vector; `qualification` an entry failure's.  `words` is what else is known, and no part
    of what is compared.
    """

    how: How
    number: int = 0
    qualification: int = 0
    words: str = field(default="", compare=False)

    @property
    def entered(self) -> bool:
        """Whether L2 ran, and came back."""
        return self.how is How.ENTERED

    @property
    def fatal(self) -> bool:
        """Whether there is no machine any more that could be asked."""
        return self.how in (How.DIED, How.SILENT, How.ABORT)

    def __str__(self) -> str:
        if self.how in (How.INVALID, How.DIED, How.SILENT, How.WRITE):
            text = self.how.value
        else:
            text = f"{self.how.value} {self.number:#x}"
        if self.how in (How.FAIL_VALID, How.FAILED_ENTRY, How.ABORT, How.FAULT):
            text = f"{self.how.value} {self.number}"
        if self.qualification:
            text += f", qualification {self.qualification}"
        return f"{text} ({self.words})" if self.words else text


@dataclass(frozen=True, slots=True)
class Patch:
    """Bytes that an attempt puts into memory, and those that were there."""

    gpa: int
    data: bytes
    before: bytes


@dataclass(frozen=True, slots=True)
class Trial:
    """One attempt: a valid state's name, the fields that differ from it, and what must come of it.

    `alone` says that the entry must be made without the run's own writes of host RIP and RSP.
    `mode` is the name of the valid state, and `outside` that it is entered outside the mode that
    the probe runs in.
    """

    rule: str
    mode: str
    changes: Mapping[int, int]
    expected: Seen
    patches: tuple[Patch, ...] = ()
    alone: bool = False
    outside: bool = False


@dataclass(frozen=True, slots=True)
class NotApplicable:
    """Why a rule cannot be broken on a processor."""

    rule: str
    why: str
