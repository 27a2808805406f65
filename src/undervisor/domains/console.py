"""A guest behind its text console: a shell that waits there is a `Host`.

Nothing is needed in the guest but a console with a shell (a root login that is already done, or an
init that starts one).  The console is left as it was found.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any, Protocol

from undervisor.domains.connection import Libvirt
from undervisor.errors import BadInput
from undervisor.host.access.frames import PREPARE, exchange
from undervisor.host.access.shell import ShellHost
from undervisor.host.fact import Fact, Known, Unknown

GREETING_SECONDS = 20.0
"""A slow guest's shell answers in less."""

_PIECE = 1024
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
        """Make sure that a shell answers; BadInput says what did."""
        # cat | sh: a shell that reads a pipe edits no lines and limits their length nowhere.
        self._send(b"\n stty -echo -icanon -onlcr; cat | sh\n")
        time.sleep(_SETTLE)  # else cat would find what the terminal still echoes
        self._send(PREPARE.encode() + b"dmesg -n 1 2>/dev/null\n")
        fact = self.execute("uname -s", timeout, 4096)
        if not isinstance(fact, Known):
            why = fact.why if isinstance(fact, Unknown) else str(fact)
            raise BadInput(
                f"no shell answers on the {self.name}: {why}",
                hint="log in there first, or reach the guest with --agent or --host",
            )

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
            self._send(b"\x03")  # ends cat, and with it sh
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
    """The console of a running domain, over libvirt's own stream."""

    def __init__(self, libvirt: Libvirt, name: str) -> None:
        self._library = libvirt.library
        if not libvirt.active(name):
            raise BadInput(f"{name} does not run", hint="start it first")
        domain = libvirt.domain(name)
        self._stream: Any = libvirt.handle.newStream()
        try:
            domain.openConsole(None, self._stream, self._library.VIR_DOMAIN_CONSOLE_SAFE)
        except self._library.libvirtError as error:
            raise BadInput(
                f"the console of {name} can't be opened: {error}",
                hint="the definition needs <console type='pty'/>, and nobody else may hold it",
            ) from error

    def send(self, data: bytes) -> int:
        """Through the stream."""
        return int(self._call(lambda: self._stream.send(data)))

    def recv(self, size: int) -> bytes:
        """Through the stream."""
        return bytes(self._call(lambda: self._stream.recv(size)))

    def close(self) -> None:
        """End the stream."""
        self._call(lambda: self._stream.abort())

    def _call(self, call: Any) -> Any:
        try:
            return call()
        except self._library.libvirtError as error:
            raise OSError(str(error)) from error


def open_console(libvirt: Libvirt, name: str) -> ConsoleHost:
    """The guest `name` behind its console.  Raises BadInput where no shell answers."""
    host = ConsoleHost(f"console of {name}", LibvirtStream(libvirt, name))
    try:
        host.greet()
    except BadInput:
        host.close()
        raise
    return host
