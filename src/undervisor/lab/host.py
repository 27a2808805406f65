"""A level of a running lab as a machine to look at: a shell at the end of a stream."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from undervisor.errors import BadInput
from undervisor.host.access.frames import PREPARE, exchange, follow
from undervisor.host.access.protocol import Timing
from undervisor.host.access.shell import ShellHost
from undervisor.host.fact import Fact, Known, Unknown, then
from undervisor.lab import probe
from undervisor.lab.places import DEFAULT, Place
from undervisor.lab.ports import CONTROL, GREETING, SHELL, port

GREETING_SECONDS: Final = 20.0
_PROBE_SECONDS: Final = 60.0
_PROBE_LIMIT: Final = 1 << 16
_ANOTHER_SHELL_SECONDS: Final = 10.0
_SCHEME: Final = "lab:"


class LabHost(ShellHost):
    """Level `level` of the lab at `place`."""

    def __init__(self, place: Place, level: int) -> None:
        self.name = f"L{level} of {place.name}"
        self.level = level
        self._place = place
        self._line: socket.socket | None = None

    def execute(self, script: str, timeout: float, limit: int) -> Fact[tuple[int, bytes, bytes]]:
        """One framed request; a command that does not end in time is killed there."""
        try:
            line = self._connected(timeout)
            fact = exchange(line.fileno(), line.sendall, script, timeout, limit, self.name)
        except OSError as error:
            self.close()
            busy = isinstance(error, TimeoutError)
            why = "somebody else uses its shell" if busy else error.strerror or str(error)
            return Unknown(self.name, why)
        if isinstance(fact, Unknown) and fact.code:
            self.interrupt()
        return fact

    def follow(self, script: str, timeout: float) -> Iterator[bytes]:
        """One framed request whose output is given as it comes."""
        ended = False
        try:
            line = self._connected(timeout)
            yield from follow(line.fileno(), line.sendall, script, timeout)
            ended = True
        finally:
            if not ended:
                self.interrupt()

    @contextmanager
    def hand_over(self, script: str) -> Iterator[socket.socket]:
        """The level's shell gives way to the program, and another takes its place afterwards."""
        try:
            line = self._connected(GREETING_SECONDS)
            line.sendall(f"{script}\n".encode())
            yield line
        finally:
            self.interrupt()

    def timing(self) -> Fact[Timing]:
        """Measured there by the lab's own program."""
        return then(self.testimony(), lambda said: Timing(said.cpuid_ticks, said.plain_ticks))

    def testimony(self) -> Fact[probe.Testimony]:
        """What the processor of this level says of who is below it."""
        fact = self.execute(probe.PATH, _PROBE_SECONDS, _PROBE_LIMIT)
        return then(fact, lambda answer: probe.parse(answer[1].decode("ascii", "replace")))

    def interrupt(self) -> None:
        """Kill what the level's shell is doing; another shell takes its place."""
        self.close()
        try:
            with connect(self._place, port(CONTROL, self.level)) as line:
                line.settimeout(_ANOTHER_SHELL_SECONDS)
                line.sendall(b"again\n")
                line.recv(16)
        except OSError:
            pass  # then the level is gone, and its command with it

    def close(self) -> None:
        """Let the next one have the level's shell."""
        if self._line is not None:
            self._line.close()
            self._line = None

    def _connected(self, timeout: float) -> socket.socket:
        if self._line is None:
            line = connect(self._place, port(SHELL, self.level))
            self._line = line
            line.settimeout(timeout)
            if line.recv(len(GREETING)) != GREETING:
                raise OSError("the lab has ended")
            line.sendall(PREPARE.encode())
        return self._line


def connect(place: Place, stream: str) -> socket.socket:
    """A stream of a running lab; OSError where there is none."""
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        line.connect(str(place.socket(stream)))
    except OSError:
        line.close()
        raise
    return line


def parse_level(text: str, depth: int) -> int:
    """`l2` or `2`; BadInput for a level that the lab does not have."""
    number = text.lower().removeprefix("l")
    if not number.isascii() or not number.isdigit() or not 1 <= int(number) <= depth:
        raise BadInput(f"{text!r} is no level of this lab", hint=f"l1 to l{depth}")
    return int(number)


def open_level(text: str) -> LabHost:
    """The host that `lab:l1`, or `lab:NAME/l1`, means; BadInput where it does not answer."""
    name, _, level = text.removeprefix(_SCHEME).rpartition("/")
    place = running(name or DEFAULT)
    host = LabHost(place, parse_level(level, depth_of(place)))
    deadline = time.monotonic() + GREETING_SECONDS
    fact = host.execute("uname -s", GREETING_SECONDS, 4096)
    while not isinstance(fact, Known) and time.monotonic() < deadline:
        time.sleep(0.2)  # another shell is on its way, for the one that hung
        fact = host.execute("uname -s", GREETING_SECONDS, 4096)
    if not isinstance(fact, Known):
        host.close()
        raise BadInput(f"{host.name} does not answer: {fact}", hint="undervisor lab ls")
    return host


def running(name: str) -> Place:
    """The place of the lab `name`; BadInput where it does not run."""
    place = Place.named(name)
    if not place.runs():
        raise BadInput(f"the lab {name} does not run", hint="undervisor lab up")
    return place


def depth_of(place: Place) -> int:
    """How many levels the lab was made with."""
    depth = place.record().get("depth", 0)
    return depth if isinstance(depth, int) else 0
