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
from collections.abc import Callable
from typing import Final, NoReturn

from undervisor.orphans import die_with

Life = Callable[[bytes, list[socket.socket]], None]
"""What a copy does until it ends, with the message and the sockets that came with the request."""

_START, _REAP = 0, 1
_REQUEST, _PID, _STATUS = struct.Struct("<BI"), struct.Struct("<q"), struct.Struct("<i")
_MOST_SOCKETS: Final = 2


# -- the process that is copied -----------------------------------------------------------------


def serve(control: socket.socket, life: Life) -> NoReturn:
    """Copy this process for each request on `control`, and end when nobody can ask any more."""
    ended: dict[int, int] = {}
    signal.signal(signal.SIGCHLD, lambda number, frame: _collect(ended))
    while True:
        head, handles, _, _ = socket.recv_fds(control, _REQUEST.size, _MOST_SOCKETS)
        if len(head) < _REQUEST.size:
            os._exit(0)
        asked, size = _REQUEST.unpack(head)
        message = _receive(control, size)
        if asked == _START:
            control.sendall(_PID.pack(_copy(control, life, message, handles)))
        else:
            (pid,) = _PID.unpack(message)
            control.sendall(_STATUS.pack(_reap(pid, ended)))


def _copy(control: socket.socket, life: Life, message: bytes, handles: list[int]) -> int:
    """The number of a new copy; a copy does not come back."""
    original, pid = os.getpid(), os.fork()
    if pid:
        for handle in handles:
            os.close(handle)
        return pid
    die_with(original)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    control.close()
    life(message, [socket.socket(fileno=handle) for handle in handles])
    os._exit(0)  # nothing here needs tidying that the system does not tidy


def _collect(ended: dict[int, int]) -> None:
    """Take the status of every copy that has ended, so that none stays a zombie."""
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            ended[found[0]] = os.waitstatus_to_exitcode(found[1])


def _reap(pid: int, ended: dict[int, int]) -> int:
    """Wait for a copy that ends; its status in the convention of `Popen`."""
    with contextlib.suppress(ChildProcessError):  # `_collect` came first
        ended[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return ended.pop(pid, 0)


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

    def __del__(self) -> None:
        self._control.close()

    def start(self, message: bytes, *sockets: socket.socket) -> int:
        """The process number of a new copy; EOFError where the process is dead."""
        return int(_PID.unpack(self._ask(_START, message, sockets, _PID.size))[0])

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
