"""Standard input and output as a guest's serial line."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator

STDIN, STDOUT = 0, 1
_PIECE = 4096
_STEP = 0.25


def put(data: bytes) -> None:
    """All of `data` to standard output, at once."""
    while data:
        data = data[os.write(STDOUT, data) :]


class Stdin:
    """Standard input; what the guest printed is shown before it is waited for.

    `give_up` is asked now and then while waiting: whether the run is over.
    """

    def __init__(self, flush: Callable[[], None], give_up: Callable[[], bool]) -> None:
        self._flush = flush
        self._give_up = give_up
        self.open = True

    def poll(self) -> bytes:
        """What has been typed."""
        self._flush()
        return self._read(0.0)

    def wait(self, seconds: float | None = None) -> bytes:
        """The same, waiting for something, at most so long; empty where nothing came."""
        end = None if seconds is None else time.monotonic() + seconds
        while self.open:
            left = _STEP if end is None else min(_STEP, max(0.0, end - time.monotonic()))
            data = self._read(left)
            if data or not left or self._give_up():
                return data
        return b""

    def _read(self, seconds: float) -> bytes:
        if not self.open:
            return b""
        try:
            ready, _, _ = select.select([STDIN], [], [], seconds)
            if not ready:
                return b""
            data = os.read(STDIN, _PIECE)
        except OSError:  # closed, or a terminal that has been taken from us
            data = b""
        self.open = bool(data)
        return data


@contextlib.contextmanager
def raw_keys(wanted: bool) -> Iterator[None]:
    """Each key goes to the guest as it is typed; Ctrl-C still ends the run."""
    if not wanted or not sys.stdin.isatty() or os.tcgetpgrp(STDIN) != os.getpgrp():
        yield
        return
    before = termios.tcgetattr(STDIN)
    try:
        tty.setcbreak(STDIN)
        yield
    finally:
        termios.tcsetattr(STDIN, termios.TCSADRAIN, before)


def never() -> bool:
    """Nothing gives up."""
    return False


def until(deadline: float) -> Callable[[], bool]:
    """Give up after `deadline`, by the monotonic clock."""
    return lambda: time.monotonic() > deadline
