"""A guest behind its text console: a shell that waits there is a `Host`.

Nothing is needed in the guest but a console with a shell (a root login that is already done, or an
init that starts one).  The console is left as it was found.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from undervisor.domains.connection import Libvirt, load_library
from undervisor.errors import BadInput
from undervisor.host.access.frames import PREPARE, exchange
from undervisor.host.access.shell import ShellHost
from undervisor.host.fact import Fact, Known, Unknown

GREETING_SECONDS = 20.0
"""A slow guest's shell answers in less."""

_ATTEMPT_SECONDS = 4.0
"""A guest that still starts loses what it is told, so it is told again."""
_MARK = "undervisor_shell"
_PIECE = 1024
_WOULD_BLOCK = -2
_PAUSE = 0.005
_SETTLE = 0.2
"""Seconds that a terminal's change of mode may take."""


class Stream(Protocol):
    """What carries the console; `recv` waits, and gives nothing at the end."""

    def send(self, data: bytes) -> int:
        """Send; how many bytes were taken."""
        ...

    def recv(self, size: int) -> bytes:
        """At least one byte, at most `size`."""
        ...

    def close(self) -> None:
        """End `recv`."""
        ...


class ConsoleHost(ShellHost):
    """The shell at the other end of `stream`."""

    def __init__(self, name: str, stream: Stream) -> None:
        self.name = name
        self._stream = stream
        self._busy = ""
        self._said, self._heard = os.pipe()
        threading.Thread(target=self._listen, daemon=True).start()

    def greet(self, timeout: float = GREETING_SECONDS) -> None:
        """Make sure that a shell answers, or one that comes in time; BadInput says what did."""
        deadline = time.monotonic() + timeout
        while True:
            fact = self._knock(min(timeout, _ATTEMPT_SECONDS))
            if isinstance(fact, Known):
                return
            if time.monotonic() > deadline:
                break
        why = fact.why if isinstance(fact, Unknown) else str(fact)
        raise BadInput(
            f"no shell answers on the {self.name}: {why}",
            hint="log in there first, or reach the guest with --agent or --host",
        )

    def _knock(self, timeout: float) -> Fact[tuple[int, bytes, bytes]]:
        """Start our shell in the one that waits there, and make sure that it is ours that answers.

        The start of a line is lost while a guest boots; then the other shell would answer.
        """
        word = secrets.token_hex(8)
        try:
            self._send(b"\x03\n")  # an earlier attempt of ours, if one is half there, ends
            time.sleep(_SETTLE)
            # A shell that writes to a pipe is not interactive: it edits no lines, echoes nothing
            # and limits no line's length. (BusyBox's cat can't carry what is typed to it.)
            start = f" stty -echo -icanon -onlcr && {_MARK}={word} sh 2>/dev/null | cat\n"
            self._send(start.encode())
            time.sleep(_SETTLE)  # else the terminal still echoes
            self._send(PREPARE.encode() + b"dmesg -n 1 2>/dev/null\n")
            ask = f'echo "${_MARK}"'
            fact = exchange(self._said, self._send, ask, timeout, 4096, self.name)
        except OSError as error:
            return Unknown(self.name, str(error))
        if isinstance(fact, Known) and word.encode() not in fact.value[1]:
            return Unknown(self.name, "another shell answers")
        return fact

    def execute(self, script: str, timeout: float, limit: int) -> Fact[tuple[int, bytes, bytes]]:
        """Send one framed request and read its frame."""
        if self._busy:
            return Unknown(self.name, self._busy)
        try:
            fact = exchange(self._said, self._send, script, timeout, limit, self.name)
        except OSError as error:
            return Unknown(self.name, str(error))
        if isinstance(fact, Unknown) and fact.code:
            self._busy = f"it still works on an earlier request ({fact.why})"
        return fact

    def close(self) -> None:
        """Give the terminal back as it was, and let go."""
        try:
            self._send(b"\x03")  # ends our shell
            time.sleep(_SETTLE)
            self._send(b" stty sane\n")
        except OSError:
            pass  # it closed by itself
        self._stream.close()

    def _send(self, data: bytes) -> None:
        while data:
            data = data[self._stream.send(data[:_PIECE]) :]

    def _listen(self) -> None:
        """Carry what the console says into a pipe, which can be waited for."""
        try:
            while piece := self._stream.recv(_PIECE):
                os.write(self._heard, piece)
        except OSError:
            pass
        os.close(self._heard)


class LibvirtStream:
    """The console of a running domain, over libvirt's own stream.

    libvirt carries a stream both ways only where an event loop turns and nobody waits inside of a
    call, so both directions are tried again and again; the connection is one of its own.
    """

    def __init__(self, uri: str, name: str) -> None:
        _turn_events()
        self._libvirt = Libvirt(uri)
        library = self._libvirt.library
        self._error = library.libvirtError
        try:
            if not self._libvirt.active(name):
                raise BadInput(f"{name} does not run", hint="start it first")
            domain = self._libvirt.domain(name)
            self._stream: Any = self._libvirt.handle.newStream(library.VIR_STREAM_NONBLOCK)
            domain.openConsole(None, self._stream, library.VIR_DOMAIN_CONSOLE_SAFE)
        except library.libvirtError as error:
            self._libvirt.handle.close()
            raise BadInput(
                f"the console of {name} can't be opened: {error}",
                hint="the definition needs <console type='pty'/>, and nobody else may hold it",
            ) from error
        except BadInput:
            self._libvirt.handle.close()
            raise

    def send(self, data: bytes) -> int:
        """Through the stream, as much as it takes."""
        return int(self._again(lambda: self._stream.send(data)))

    def recv(self, size: int) -> bytes:
        """Through the stream, as soon as there is something."""
        return bytes(self._again(lambda: self._stream.recv(size)))

    def close(self) -> None:
        """End the stream and its connection."""
        with contextlib.suppress(self._error):  # the guest may have ended it
            self._stream.abort()
        self._libvirt.handle.close()

    def _again(self, call: Callable[[], Any]) -> Any:
        try:
            while (answer := call()) == _WOULD_BLOCK:
                time.sleep(_PAUSE)
            return answer
        except self._error as error:
            raise OSError(str(error)) from error


@functools.cache
def _turn_events() -> None:
    """Have libvirt's event loop turn, once, in a thread that ends with the process."""
    library = load_library()
    library.virEventRegisterDefaultImpl()

    def turn() -> None:
        while True:
            library.virEventRunDefaultImpl()

    threading.Thread(target=turn, daemon=True).start()


def open_console(libvirt: Libvirt, name: str, wait: float = GREETING_SECONDS) -> ConsoleHost:
    """The guest `name` behind its console.  Raises BadInput where no shell answers in time."""
    host = ConsoleHost(f"console of {name}", LibvirtStream(libvirt.uri, name))
    try:
        host.greet(wait)
    except BadInput:
        host.close()
        raise
    return host
