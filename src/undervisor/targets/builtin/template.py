"""Machines as copies of one: a process that has built a machine, and forks for each that starts.

A hostile guest can crash the processor library; what it takes with it is a copy, and the dead copy
is how the run ended.  A template whose job has a prompt has run its guest up to there, so that a
copy starts within milliseconds.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import signal
import socket
import struct
import threading
from multiprocessing.context import ForkServerContext
from typing import Final

from undervisor.errors import SiliconDied, UndervisorError
from undervisor.hypervisor import models
from undervisor.hypervisor.machine import Machine
from undervisor.hypervisor.verdict import Ending, Outcome
from undervisor.orphans import die_with
from undervisor.targets import End, How, Job
from undervisor.targets.builtin.machine import build, how_it_ended

PIECE: Final = 1 << 16
PROMPT_TIME: Final = 10.0
"""Seconds that a template's guest has to come to its prompt."""
_GRACE: Final = 5.0
_START, _REAP = b"start", b"reap"
_PID, _STATUS = struct.Struct("<q"), struct.Struct("<i")
_GOES_ON: Final = frozenset({Ending.STOPPED, Ending.TIMEOUT})


class Wire:
    """The guest's serial line: nobody's while the template runs, then a socket's."""

    def __init__(self) -> None:
        self.machine: Machine | None = None
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
        """Input that is there; a template's guest that has said something is at its prompt."""
        if self._socket is None:
            return self._at_prompt() if self._said else b""
        return self._take(self._socket, 0)

    def wait(self) -> bytes:
        """Input, waiting for it; empty when the other side is gone."""
        if self._socket is None:
            return self._at_prompt()
        return self._take(self._socket, None)

    def _at_prompt(self) -> bytes:
        assert self.machine is not None
        self.machine.request_stop()
        return b""

    @staticmethod
    def _take(line: socket.socket, timeout: float | None) -> bytes:
        ready, _, _ = select.select([line], [], [], timeout)
        try:
            return line.recv(PIECE) if ready else b""
        except OSError:
            return b""


# -- the template's process ---------------------------------------------------------------------


def serve(job: Job, cpu: str, quirks: tuple[str, ...], control: socket.socket) -> None:
    """A template's whole life: build, come to the prompt, copy itself until nobody asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    wire = Wire()
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
    while True:
        asked, handles, _, _ = socket.recv_fds(control, len(_REAP) + _PID.size, 2)
        if asked == _START:
            _copy(machine, wire, early, control, handles)
        elif asked.startswith(_REAP):
            control.sendall(_STATUS.pack(_reap(*_PID.unpack(asked[len(_REAP) :]))))
        else:
            os._exit(0)


def _copy(
    machine: Machine | None,
    wire: Wire,
    early: Outcome | UndervisorError | None,
    control: socket.socket,
    handles: list[int],
) -> None:
    template, pid = os.getpid(), os.fork()
    if pid:
        for handle in handles:
            os.close(handle)
        control.sendall(_PID.pack(pid))
        return
    die_with(template)
    control.close()
    line, answer = (socket.socket(fileno=handle) for handle in handles)
    wire.connect(line)
    if isinstance(early, UndervisorError):
        end = End(How.TARGET_DIED, early.message, report=early.hint)
    else:
        end = _live(machine, early)
    words = "\0".join((end.how.name, end.text, str(end.status), end.report))
    answer.sendall(words.encode(errors="replace"))
    os._exit(0)  # nothing here needs tidying that the system does not tidy


def _live(machine: Machine | None, early: Outcome | None) -> End:
    """A copy's run, from where the template is."""
    assert machine is not None
    try:
        return how_it_ended(early or machine.run())
    except UndervisorError as error:
        return End(How.TARGET_DIED, error.message, report=error.hint)


def _reap(pid: int) -> int:
    """Wait for a copy that ends; its status in the convention of `Popen`."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return 0


# -- its user's side ----------------------------------------------------------------------------


def _server() -> ForkServerContext:
    """Where templates come from: a process that has imported everything and holds no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["undervisor.silicon.warm", "undervisor.targets.builtin", "undervisor.guest.asm"]
    )
    return context


class Template:
    """A template's process; it ends with the last reference to this object."""

    def __init__(self, job: Job, cpu: str, quirks: tuple[str, ...]) -> None:
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair()
        self._process = _server().Process(
            target=serve, args=(job, cpu, quirks, theirs), daemon=True
        )
        with theirs:
            self._process.start()

    def __del__(self) -> None:
        self._control.close()  # by which the process knows that nobody asks any more

    def start(self, line: socket.socket, answer: socket.socket) -> int:
        """A copy that runs, with these sockets; its process's number.

        SiliconDied where the template itself is dead.
        """
        with self._lock:
            try:
                socket.send_fds(self._control, [_START], [line.fileno(), answer.fileno()])
                reply = self._control.recv(_PID.size)
            except OSError:
                reply = b""
        if len(reply) < _PID.size:
            self._process.join(_GRACE)
            raise SiliconDied(f"no machine: {death(self._process.exitcode or 0)}")
        return int(_PID.unpack(reply)[0])

    def reap(self, pid: int) -> int:
        """The status of a copy that has ended or ends, in the convention of `Popen`."""
        with self._lock:
            try:
                self._control.sendall(_REAP + _PID.pack(pid))
                reply = self._control.recv(_STATUS.size)
            except OSError:
                reply = b""
        return int(_STATUS.unpack(reply)[0]) if len(reply) == _STATUS.size else 0


def death(status: int) -> str:
    """What a process died of, by its status in the convention of `Popen`."""
    if status >= 0:
        return f"the machine's process ended with status {status} and no word"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"the processor library died of {name}"
