"""How a guest ends its own run, and the ports that it does it with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

SHUTDOWN_WORD = b"Shutdown"


class EndReason(Enum):
    """What the guest did to end the run."""

    DEBUG_EXIT = "write to the debug exit port"
    SHUTDOWN = "shutdown port"
    POWER_OFF = "ACPI power-off"
    RESET = "reset"


@dataclass(frozen=True, slots=True)
class EndOfRun:
    """The end that a guest asked for; `status` is the process exit code that it means.

    `value` is what it wrote to the debug exit port, 0 for other ends.
    """

    reason: EndReason
    value: int = 0

    @property
    def status(self) -> int:
        """QEMU's convention: `(value << 1) | 1` for the debug exit, 0 otherwise."""
        return (self.value << 1 | 1) if self.reason is EndReason.DEBUG_EXIT else 0


OnEnd = Callable[[EndOfRun], None]


class DebugExit:
    """The debug exit port, 0xf4: a write of any size ends the run."""

    __slots__ = ("_on_end",)

    def __init__(self, on_end: OnEnd) -> None:
        self._on_end = on_end

    def read(self, offset: int, size: int) -> int:
        """Zero: images look for the port this way."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """End the run with `value`."""
        self._on_end(EndOfRun(EndReason.DEBUG_EXIT, value))


class ShutdownPort:
    """The Bochs shutdown port, 0x8900: the bytes `Shutdown`, one by one, end the run."""

    __slots__ = ("_matched", "_on_end")

    def __init__(self, on_end: OnEnd) -> None:
        self._on_end = on_end
        self._matched = 0

    def read(self, offset: int, size: int) -> int:
        """All ones."""
        return 0xFF

    def write(self, offset: int, size: int, value: int) -> None:
        """The next byte of the word; a wrong one starts again."""
        if value != SHUTDOWN_WORD[self._matched]:
            self._matched = int(value == SHUTDOWN_WORD[0])
            return
        self._matched += 1
        if self._matched == len(SHUTDOWN_WORD):
            self._matched = 0
            self._on_end(EndOfRun(EndReason.SHUTDOWN))


class DebugConsole:
    """Port 0xe9: each byte written goes to the host; reading 0xe9 says that it is there."""

    __slots__ = ("_sink",)

    def __init__(self, sink: Callable[[int], None]) -> None:
        self._sink = sink

    def read(self, offset: int, size: int) -> int:
        """The port's own number, by which images detect it."""
        return 0xE9

    def write(self, offset: int, size: int, value: int) -> None:
        """One byte of output."""
        self._sink(value)
