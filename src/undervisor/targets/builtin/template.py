"""Machines as copies of one: a process that has built a machine, and forks for each that starts.

A hostile guest can crash the processor library; what it takes with it is a copy, and the dead copy
is how the run ended.  A template whose job has a prompt has run its guest up to there, so that a
copy starts within milliseconds.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
from typing import Final

from undervisor.errors import SiliconDied, UndervisorError
from undervisor.hypervisor import models
from undervisor.hypervisor.machine import Machine
from undervisor.hypervisor.verdict import Ending, Outcome
from undervisor.targets import End, How, Job
from undervisor.targets.builtin import forks
from undervisor.targets.builtin.machine import build, how_it_ended

PIECE: Final = 1 << 16
PROMPT_TIME: Final = 300.0
"""Seconds that a template's guest has to come to its prompt: a Linux takes some."""
_GRACE: Final = 5.0
_LOOK: Final = 0.001
_GOES_ON: Final = frozenset({Ending.STOPPED, Ending.TIMEOUT})


class Wire:
    """The guest's serial line: nobody's while the template runs, then a socket's.

    `prelude` is what the template's guest is sent at its first prompt.
    """

    def __init__(self, prelude: bytes) -> None:
        self.machine: Machine | None = None
        self.open = True
        self._prelude = prelude
        self._said = bytearray()
        self._socket: socket.socket | None = None

    def connect(self, line: socket.socket) -> None:
        """Join a copy's line; what the guest has said goes there first."""
        self._socket = line
        self.put(bytes(self._said))

    def put(self, data: bytes) -> None:
        """The guest's output; lost where nobody listens any more."""
        if self._socket is None:
            self._said += data
            return
        with contextlib.suppress(OSError):
            self._socket.sendall(data)

    def poll(self) -> bytes:
        """Input that is there; a template's guest that has said something is at its prompt.

        A guest that looks again and again has nothing else to do: this waits a little, so that
        machines which wait for their user leave the processors to him.
        """
        return self.wait(_LOOK)

    def wait(self, seconds: float | None = None) -> bytes:
        """Input, waiting for it; empty where none came."""
        if self._socket is None:
            return self._at_prompt() if self._said else b""
        return self._take(self._socket, seconds)

    def _at_prompt(self) -> bytes:
        assert self.machine is not None
        data, self._prelude = self._prelude, b""
        if not data:
            self.machine.request_stop()
        return data

    def _take(self, line: socket.socket, timeout: float | None) -> bytes:
        if not self.open or not select.select([line], [], [], timeout)[0]:
            return b""
        data = b""
        with contextlib.suppress(OSError):
            data = line.recv(PIECE)
        self.open = bool(data)
        return data


# -- the template's process ---------------------------------------------------------------------


def live(job: Job, cpu: str, quirks: tuple[str, ...], control: socket.socket) -> None:
    """A template's whole life: build, come to the prompt, copy itself until nobody asks."""
    wire = Wire(job.prelude)
    machine: Machine | None = None
    early: Outcome | UndervisorError | None = None
    try:
        machine = build(job, models.named(cpu), serial=wire.put, source=wire, quirks=quirks)
        wire.machine = machine
        if job.prompt:
            outcome = machine.run(PROMPT_TIME)
            early = None if outcome.ending in _GOES_ON else outcome
    except UndervisorError as error:
        early = error
    gc.collect()
    gc.freeze()  # else a copy's first collection would write to every object, and so copy it

    def copy(message: bytes, sockets: list[socket.socket]) -> None:
        line, answer = sockets
        wire.connect(line)
        end = _run(machine, early)
        words = "\0".join((end.how.name, end.text, str(end.status), end.report))
        answer.sendall(words.encode(errors="replace"))

    forks.serve(control, copy)


def _run(machine: Machine | None, early: Outcome | UndervisorError | None) -> End:
    """A copy's run, from where the template is."""
    try:
        if isinstance(early, UndervisorError):
            raise early
        assert machine is not None
        return how_it_ended(early or machine.run())
    except UndervisorError as error:
        return End(How.TARGET_DIED, error.message, report=error.hint)


# -- its user's side ----------------------------------------------------------------------------


class _Zygote:
    """The process of `zygote`, started at the first use and again where it is dead."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._forks: forks.Forks | None = None
        self._owner = 0

    def start(self, message: bytes, control: socket.socket) -> tuple[forks.Forks, int]:
        """A template, and who can tell how it ended."""
        with self._lock:
            for again in (False, True):
                if again or self._forks is None or self._owner != os.getpid():
                    self._forks, self._owner = _started(), os.getpid()  # a fork has its own
                with contextlib.suppress(EOFError):
                    return self._forks, self._forks.start(message, control)
            self._forks = None
        raise SiliconDied(
            "the process that machines come from does not live", hint="what it said is above"
        )


def _started() -> forks.Forks:
    ours, theirs = socket.socketpair()
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "undervisor.targets.builtin.zygote", str(theirs.fileno())],
            env=os.environ | {"PYTHONPATH": paths},
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is for us
        )
    atexit.register(_end, process, ours)
    return forks.Forks(ours)


def _end(process: subprocess.Popen[bytes], control: socket.socket) -> None:
    """When we end: the process sees that nobody asks any more."""
    control.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE)


_zygote: Final = _Zygote()


class Template:
    """A template's process; it ends with the last reference to this object."""

    def __init__(self, job: Job, cpu: str, quirks: tuple[str, ...]) -> None:
        control, theirs = socket.socketpair()
        self._copies = forks.Forks(control)
        with theirs:
            message = pickle.dumps((job, cpu, quirks))
            self._origin, self.pid = _zygote.start(message, theirs)

    def start(self, line: socket.socket, answer: socket.socket) -> int:
        """A copy that runs, with these sockets; its process's number.

        SiliconDied where the template itself is dead.
        """
        try:
            return self._copies.start(b"", line, answer)
        except EOFError:
            raise SiliconDied(f"no machine: {death(self._origin.reap(self.pid))}") from None

    def kill(self, pid: int) -> None:
        """End a copy now, unless it has ended."""
        self._copies.kill(pid)

    def reap(self, pid: int) -> int:
        """The status of a copy that has ended or ends, in the convention of `Popen`."""
        return self._copies.reap(pid)


def death(status: int) -> str:
    """What a process died of, by its status in the convention of `Popen`."""
    if status >= 0:
        return f"the machine's process ended with status {status} and no word"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"the processor library died of {name}"
