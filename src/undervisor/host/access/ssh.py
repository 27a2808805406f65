"""A machine over SSH: one connection of the system's own `ssh`, one `sh` at its other end.

Answers are framed by random words, so banners and start-up noise do no harm; a machine that hangs
or floods costs a bounded time and a bounded memory, and what it did not say is unknown.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from undervisor.errors import BadInput
from undervisor.host.access.frames import PREPARE, exchange, follow
from undervisor.host.access.process import environment, kill_group
from undervisor.host.access.shell import ShellHost
from undervisor.host.fact import Fact, Known, Unknown

CONNECT_SECONDS = 15
_RESTARTS = 3
_NAME = re.compile(
    r"(?:[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63}@)?[A-Za-z0-9_\[][A-Za-z0-9_.:%\]-]{0,252}"
)


def ssh_command(destination: str, config: str = "") -> list[str]:
    """The argument vector of `ssh`; BadInput where `destination` could be taken for an option."""
    if not _NAME.fullmatch(destination):
        raise BadInput(f"{destination!r} is not user@name", hint="ports and keys: ~/.ssh/config")
    options = ["BatchMode=yes", f"ConnectTimeout={CONNECT_SECONDS}"]
    options += ["ServerAliveInterval=5", "ServerAliveCountMax=3"]
    words = [word for option in options for word in ("-o", option)]
    return ["ssh", "-T", *(["-F", config] if config else []), *words, "--", destination, "sh"]


class SshHost(ShellHost):
    """A shell at the end of a pipe; `command` starts it (for SSH, see `ssh_command`)."""

    def __init__(self, name: str, command: Sequence[str], connect: float = CONNECT_SECONDS) -> None:
        self.name = name
        self._command = list(command)
        self._connect = connect
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0

    def greet(self) -> None:
        """Make sure that there is a shell; BadInput says why not."""
        fact = self.execute("uname -s", self._connect, 4096)
        if not isinstance(fact, Known):
            why = fact.why if isinstance(fact, Unknown) else str(fact)
            raise BadInput(
                f"cannot work on {self.name}: {why}", hint=f"try: {shlex.join(self._command)}"
            )

    def execute(self, script: str, timeout: float, limit: int) -> Fact[tuple[int, bytes, bytes]]:
        """Send one framed request and read its frame."""
        trouble = self._ready()
        if trouble:
            return trouble
        number = self._output()
        try:
            fact = exchange(number, self._write, script, timeout, limit, self.name)
        except (OSError, ValueError) as error:
            why = self._last_words() or str(error)
            self._end()
            return Unknown(self.name, why)
        if isinstance(fact, Unknown) and fact.code:  # it still works on this request
            self._end()
        return fact

    def follow(self, script: str, timeout: float) -> Iterator[bytes]:
        """Send one framed request and give what comes."""
        trouble = self._ready()
        if trouble:
            raise OSError(trouble.why)
        ended = False
        try:
            yield from follow(self._output(), self._write, script, timeout)
            ended = True
        finally:
            if not ended:
                self._end()

    @contextmanager
    def hand_over(self, script: str) -> Iterator[socket.socket]:
        """Through a connection of its own."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                process = subprocess.Popen(
                    self._command,
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=subprocess.DEVNULL,
                    env=environment(),
                    start_new_session=True,
                )
            try:
                ours.sendall(f"{script}\n".encode())
                yield ours
            finally:
                kill_group(process)

    def close(self) -> None:
        """End the connection."""
        self._end()

    def _ready(self) -> Unknown | None:
        """Connect where that has to be done; what keeps it from it."""
        if self._process is None or self._process.poll() is not None:
            return self._start()
        return None

    def _output(self) -> int:
        assert self._process is not None
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def _start(self) -> Unknown | None:
        self._end()
        if self._starts > _RESTARTS:
            return Unknown(self.name, "the connection broke too often")
        self._starts += 1
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment(),
                start_new_session=True,
            )
        except OSError as error:
            return Unknown(self.name, f"{self._command[0]}: {error.strerror}")
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
        try:
            self._write(PREPARE.encode())
        except OSError:
            return Unknown(self.name, self._last_words() or "the connection closed at once")
        return None

    def _write(self, raw: bytes) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(raw)
        self._process.stdin.flush()

    def _last_words(self) -> str:
        """What ssh itself had to say."""
        if self._process is None or self._process.stderr is None:
            return ""
        try:
            self._process.wait(1)
        except subprocess.TimeoutExpired:
            return ""
        raw = self._process.stderr.read() or b""
        lines = [line for line in raw.decode("utf-8", "replace").splitlines() if line.strip()]
        return re.sub(r"[^\x20-\x7e]", "?", lines[-1])[:200] if lines else ""

    def _end(self) -> None:
        if self._process is None:
            return
        kill_group(self._process)
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            try:
                if pipe is not None:
                    pipe.close()
            except OSError:
                pass
        self._process = None
