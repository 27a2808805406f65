"""A machine that runs in a process of its own, from its user's side."""

from __future__ import annotations

import select
import socket
import time
from types import TracebackType

from undervisor.errors import SiliconDied, TimedOut
from undervisor.targets import End, How
from undervisor.targets.builtin.template import PIECE, Template, death


class BuiltinRunning:
    """A started copy of a template."""

    def __init__(self, template: Template) -> None:
        self._template = template
        self._line, theirs = socket.socketpair()
        self._answer, telling = socket.socketpair()
        with theirs, telling:
            try:
                self.pid = template.start(theirs, telling)
            except SiliconDied:
                self._line.close()
                self._answer.close()
                raise
        self._end: End | None = None
        self._stopped = False

    def send(self, data: bytes) -> None:
        """All of `data` to the guest's serial port."""
        try:
            self._line.sendall(data)
        except OSError as error:
            raise EOFError(str(error)) from None

    def receive(self, timeout: float) -> bytes:
        """Some bytes, or none after `timeout` seconds; EOFError where the run has ended."""
        ready, _, _ = select.select([self._line], [], [], timeout)
        if not ready:
            return b""
        try:
            data = self._line.recv(PIECE)
        except OSError:
            data = b""
        if not data:
            raise EOFError("the machine has ended")
        return data

    def wait(self, timeout: float | None = None) -> End:
        """How the run ended; output that nobody has received yet is lost."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._end is None:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([self._answer, self._line], [], [], left)
            if not ready:
                raise TimedOut(f"the machine still runs after {timeout} seconds")
            if self._answer in ready or not self._line.recv(PIECE):
                self._end = self._read_answer()
        return self._end

    def _read_answer(self) -> End:
        data = b""
        while piece := self._answer.recv(PIECE):
            data += piece
        status = self._template.reap(self.pid)
        if data:
            how, text, number, report = data.decode(errors="replace").split("\0", 3)
            return End(How[how], text, int(number), report)
        if self._stopped:
            return End(How.STOPPED, "stopped by the caller")
        return End(How.TARGET_DIED, death(status))

    def stop(self) -> None:
        """End it now."""
        self._stopped = True
        self._template.kill(self.pid)

    def __enter__(self) -> BuiltinRunning:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._end is None:
            self.stop()
        self._line.close()
        self._answer.close()
