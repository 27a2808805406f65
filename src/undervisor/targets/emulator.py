"""An emulator as something that runs: a serial line over a socket, its last words, its end.

Nothing here blocks beyond the time that the caller gives: what the emulator does not take yet is
kept, and what it prints is read while waiting, the last of it kept for the report.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from undervisor.errors import TimedOut
from undervisor.targets import End, How
from undervisor.targets.process import Program

_PIECE: Final = 1 << 16
_WORDS: Final = 1 << 14
"""Bytes of the last words that are kept."""
_LEFT: Final = 64
"""Pieces that are read after the end: more than a socket holds, less than a flood."""
_GRACE: Final = 5.0
"""Seconds that a killed program has to be gone."""


@dataclass(frozen=True, slots=True)
class Remains:
    """What is left of an emulator that has ended.

    `status` is negative for a signal; `words` is the end of what it printed, `said` of what it
    said on its monitor; `folder` is there until the judgement is made.
    """

    status: int
    words: str
    said: str
    folder: Path


Judge = Callable[[Remains], End]


class EmulatorRunning:
    """A started emulator.  `line` is its serial line, or a socket that listens for it.

    `monitor` is another socket that it speaks on; when it says `fatal` there, it is ended.
    """

    def __init__(
        self,
        program: Program,
        line: socket.socket,
        judge: Judge,
        *,
        listens: bool = False,
        monitor: socket.socket | None = None,
        fatal: bytes = b"\0",
    ) -> None:
        self._program, self._line, self._judge = program, line, judge
        self._monitor, self._fatal = monitor, fatal
        self._line_open = not listens
        self._to_send, self._received = bytearray(), bytearray()
        self._words, self._said = bytearray(), bytearray()
        self._stopped = False
        self._end: End | None = None
        self._selector = selectors.DefaultSelector()
        self._watch(line.fileno(), self._accept if listens else self._exchange)
        self._watch(program.output.fileno(), self._hear)
        self._watch(program.ended, self._judge_end)
        if monitor is not None:
            self._watch(monitor.fileno(), self._hear_monitor)

    @property
    def pid(self) -> int:
        """The emulator's process."""
        return self._program.pid

    # -- the protocol --------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """All of `data` to the guest's serial port, now or while something is waited for."""
        self._pump(0)
        if self._end is not None:
            raise EOFError("the emulator has ended")
        self._to_send += data
        if self._line_open:
            self._exchange()

    def receive(self, timeout: float) -> bytes:
        """Some bytes, or none after `timeout` seconds; EOFError where the run has ended."""
        deadline = time.monotonic() + timeout
        while not self._received:
            if self._end is not None:
                raise EOFError("the emulator has ended")
            left = deadline - time.monotonic()
            self._pump(max(0.0, left))
            if left <= 0:
                break
        data = bytes(self._received)
        self._received.clear()
        return data

    def wait(self, timeout: float | None = None) -> End:
        """How the run ended; output that nobody has received yet is lost."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._end is None:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            self._pump(left)
            self._received.clear()
            if self._end is None and left == 0:
                raise TimedOut(f"the machine still runs after {timeout} seconds")
        return self._end

    def stop(self) -> None:
        """End it now."""
        if self._end is None:
            self._stopped = True
            self._program.kill()

    def __enter__(self) -> EmulatorRunning:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.stop()
            with contextlib.suppress(TimedOut):
                self.wait(_GRACE)
        finally:
            self._program.close()
            self._selector.close()
            self._line.close()
            if self._monitor is not None:
                self._monitor.close()

    # -- what can happen -----------------------------------------------------------------------

    def _watch(self, number: int, happens: Callable[[], object]) -> None:
        os.set_blocking(number, False)
        self._selector.register(number, selectors.EVENT_READ, happens)

    def _forget(self, number: int) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(number)

    def _pump(self, timeout: float | None) -> None:
        """Wait until something happens, and deal with it."""
        if self._line_open:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._to_send else 0)
            self._selector.modify(self._line.fileno(), events, self._exchange)
        for key, _ in self._selector.select(timeout):
            key.data()

    def _accept(self) -> None:
        """The emulator connects its serial line."""
        listener, (self._line, _) = self._line, self._line.accept()
        self._forget(listener.fileno())
        listener.close()
        self._line_open = True
        self._watch(self._line.fileno(), self._exchange)

    def _exchange(self) -> bool:
        """Take from the line what is there and give it what it takes; whether bytes came."""
        try:
            if self._to_send:
                with contextlib.suppress(BlockingIOError):
                    del self._to_send[: self._line.send(self._to_send)]
            data = self._line.recv(_PIECE)
            if self._line.family == socket.AF_INET:
                # The other side sends byte by byte and waits for our acknowledgement, which the
                # kernel would delay by 40 ms.
                self._line.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._line_open = False
            self._forget(self._line.fileno())
        self._received += data
        return bool(data)

    def _hear(self) -> bool:
        """The emulator's own words."""
        return self._keep(self._program.output.fileno(), self._words)

    def _hear_monitor(self) -> bool:
        """What the monitor says."""
        assert self._monitor is not None
        heard = self._keep(self._monitor.fileno(), self._said)
        if self._fatal in self._said:
            self._program.kill()
        return heard

    def _keep(self, number: int, heard: bytearray) -> bool:
        """Read a piece and keep the end of all; whether there was one."""
        try:
            data = os.read(number, _PIECE)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._forget(number)
        heard += data
        del heard[:-_WORDS]
        return bool(data)

    def _judge_end(self) -> None:
        """The program has ended: take what it left, and judge."""
        status = self._program.status()
        if status is None:
            return
        self._forget(self._program.ended)
        self._drain()
        if self._stopped:
            self._end = End(How.STOPPED, "stopped by the caller")
            return
        words, said = (bytes(data).decode(errors="replace") for data in (self._words, self._said))
        self._end = self._judge(Remains(status, words, said, self._program.folder))

    def _drain(self) -> None:
        """All that is left on the line, in the output and on the monitor, within reason."""
        takes = [self._hear]
        if self._line_open:
            takes.append(self._exchange)
        if self._monitor is not None:
            takes.append(self._hear_monitor)
        for take in takes:
            for _ in range(_LEFT):
                if not take():
                    break
