"""A process that copies itself for another one, which asks for each copy over a socket.

`serve` is the process's side: it has one thread, and does nothing but this.  `Forks` is the other.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Final, NoReturn

from undervisor.orphans import die_with

Life = Callable[[bytes, list[socket.socket]], None]
"""What a copy does until it ends, with the message and the sockets that came with the request."""

_START, _KILL, _REAP = 0, 1, 2
_REQUEST, _PID, _STATUS = struct.Struct("<BI"), struct.Struct("<q"), struct.Struct("<i")
_MOST_SOCKETS: Final = 2


# -- the process that is copied -----------------------------------------------------------------


def serve(control: socket.socket, life: Life) -> NoReturn:
    """Copy this process for each request on `control`, and end when nobody can ask any more."""
    copies = _Copies(control, life)
    while True:
        head, handles, _, _ = socket.recv_fds(control, _REQUEST.size, _MOST_SOCKETS)
        if len(head) < _REQUEST.size:
            os._exit(0)
        asked, size = _REQUEST.unpack(head)
        message = _receive(control, size)
        if asked == _START:
            control.sendall(_PID.pack(copies.start(message, handles)))
            continue
        (pid,) = _PID.unpack(message)
        if asked == _KILL:
            copies.kill(pid)
        else:
            control.sendall(_STATUS.pack(copies.reap(pid)))


class _Copies:
    """The copies that live, and the statuses of the others that nobody has asked for.

    A copy that ends is collected at once, so that none stays a zombie; from then on its number may
    be another process's.
    """

    def __init__(self, control: socket.socket, life: Life) -> None:
        self._control, self._life = control, life
        self._living: set[int] = set()
        self._ended: dict[int, int] = {}
        signal.signal(signal.SIGCHLD, lambda number, frame: self._collect())

    def start(self, message: bytes, handles: list[int]) -> int:
        """The number of a new copy."""
        original = os.getpid()
        with _nothing_ends():
            pid = os.fork()
            if pid:
                self._living.add(pid)
                self._ended.pop(pid, None)
        if not pid:
            self._live(original, message, handles)
        for handle in handles:
            os.close(handle)
        return pid

    def _live(self, original: int, message: bytes, handles: list[int]) -> NoReturn:
        die_with(original)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._control.close()
        self._life(message, [socket.socket(fileno=handle) for handle in handles])
        os._exit(0)  # nothing here needs tidying that the system does not tidy

    def kill(self, pid: int) -> None:
        """End a copy that has not ended."""
        with _nothing_ends():
            if pid in self._living:
                os.kill(pid, signal.SIGKILL)

    def reap(self, pid: int) -> int:
        """Wait for a copy that ends; its status in the convention of `Popen`."""
        if pid in self._living:
            with contextlib.suppress(ChildProcessError):  # `_collect` came first
                self._note(*os.waitpid(pid, 0))
        return self._ended.pop(pid, 0)

    def _collect(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                self._note(*found)

    def _note(self, pid: int, status: int) -> None:
        self._living.discard(pid)
        self._ended[pid] = os.waitstatus_to_exitcode(status)


@contextlib.contextmanager
def _nothing_ends() -> Iterator[None]:
    """Copies that end meanwhile are collected behind this."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})


def _receive(line: socket.socket, size: int) -> bytes:
    """`size` bytes; fewer where the other side is gone."""
    data = b""
    while len(data) < size and (piece := line.recv(size - len(data))):
        data += piece
    return data


# -- who asks -----------------------------------------------------------------------------------


class Forks:
    """The way to a process that runs `serve` on the other end of `control`; it ends with this."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._lock = threading.Lock()
        # No __del__: in a cycle of garbage it may come behind the socket's own, which complains.
        weakref.finalize(self, control.close)

    def start(self, message: bytes, *sockets: socket.socket) -> int:
        """The process number of a new copy; EOFError where the process is dead."""
        return int(_PID.unpack(self._ask(_START, message, sockets, _PID.size))[0])

    def kill(self, pid: int) -> None:
        """End a copy now, unless it has ended; its status may still be asked for."""
        with contextlib.suppress(EOFError):
            self._ask(_KILL, _PID.pack(pid), (), 0)

    def reap(self, pid: int) -> int:
        """The status of a copy that has ended or ends, in the convention of `Popen`.

        0 where the process is dead, and its copies with it.
        """
        try:
            return int(_STATUS.unpack(self._ask(_REAP, _PID.pack(pid), (), _STATUS.size))[0])
        except EOFError:
            return 0

    def _ask(
        self, what: int, message: bytes, sockets: tuple[socket.socket, ...], size: int
    ) -> bytes:
        head = _REQUEST.pack(what, len(message))
        with self._lock:
            try:
                socket.send_fds(self._control, [head], [one.fileno() for one in sockets])
                self._control.sendall(message)
                reply = _receive(self._control, size)
            except OSError:
                reply = b""
        if len(reply) < size:
            raise EOFError("the process is dead")
        return reply
