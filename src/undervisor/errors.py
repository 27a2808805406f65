"""What can go wrong for a user: one sentence each, with a remedy and an exit code.

    Exception
      UndervisorError     the user can do something about it; printed without a traceback
        BadInput          a file, option or name that cannot be used           exit code 2
        GuestDied         the guest ended in a way that it did not ask for      exit code 4
        TimedOut          a limit that the user set, or a default, was reached  exit code 6
        SiliconDied       the processor library failed or is not one we know    exit code 8

Anything else that escapes is our bug (exit code 10).  Odd exit codes belong to the guest: a write
of `value` to the debug exit port ends `undervisor run` with `(value << 1) | 1`, as in QEMU.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """The exit codes of `undervisor`; every odd code is a guest's own (see the module)."""

    OK = 0
    NEGATIVE = 1
    BAD_INPUT = 2
    GUEST_DIED = 4
    TIMED_OUT = 6
    SILICON_DIED = 8
    INTERNAL_ERROR = 10


class UndervisorError(Exception):
    """A failure that the user can act on: what happened and why, and what to do about it."""

    exit_code = ExitCode.BAD_INPUT

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class BadInput(UndervisorError):
    """A file, an option or a name that cannot be used."""


class GuestDied(UndervisorError):
    """The guest ended in a way that it did not ask for: a triple fault, a VMX abort."""

    exit_code = ExitCode.GUEST_DIED


class TimedOut(UndervisorError):
    """A time limit was reached."""

    exit_code = ExitCode.TIMED_OUT


class SiliconDied(UndervisorError):
    """The processor library failed, or is not one that `silicon` knows."""

    exit_code = ExitCode.SILICON_DIED
