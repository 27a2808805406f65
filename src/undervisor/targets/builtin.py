"""The built-in L0 as a target: each machine in a process of its own.

A hostile guest can crash the processor library; what it takes with it is a child of ours, and the
dead child is how the run ended.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Final

from undervisor.errors import TimedOut, UndervisorError
from undervisor.hypervisor import models
from undervisor.hypervisor.devices.serial import Input
from undervisor.hypervisor.machine import MAX_CPUS, Machine
from undervisor.hypervisor.quirks import named as named_quirks
from undervisor.hypervisor.trace import NO_TRACE, Tracer
from undervisor.hypervisor.verdict import Ending, Outcome
from undervisor.targets import Abilities, End, How, Job

_HOW: Final = {
    Ending.GUEST: How.FINISHED,
    Ending.TRIPLE_FAULT: How.GUEST_DIED,
    Ending.VMX_ABORT: How.GUEST_DIED,
    Ending.IDLE: How.IDLE,
    Ending.TIMEOUT: How.TIMED_OUT,
    Ending.STOPPED: How.STOPPED,
    Ending.UNKNOWN_EXIT: How.TARGET_DIED,
}
_PIECE: Final = 1 << 16
_GRACE: Final = 5.0


def build(
    job: Job,
    model: models.CpuModel,
    *,
    serial: Callable[[bytes], None] = lambda data: None,
    source: Input | None = None,
    tracer: Tracer = NO_TRACE,
    quirks: Iterable[str] = (),
    kind: type[Machine] = Machine,
) -> Machine:
    """A machine with the image in its memory, ready to run; BadInput where it does not fit."""
    job.place()  # before any memory is taken
    machine = kind(
        model,
        memory_size=job.memory,
        cpus=job.cpus,
        command_line=job.append,
        serial=serial,
        source=source,
        tracer=tracer,
        quirks=quirks,
    )
    placement = job.place(machine.platform.rsdp)
    for gpa, size in placement.clear:
        machine.memory.clear(gpa, size)
    for gpa, data in placement.pieces:
        machine.memory.write(gpa, data)
    machine.boot(placement.boot)
    return machine


def how_it_ended(outcome: Outcome) -> End:
    """The outcome of the L0 in the words of targets."""
    text, _, report = outcome.text.partition("\n")
    return End(_HOW[outcome.ending], text, outcome.status, report)


def died(status: int) -> End:
    """The end of a run whose process ended by `status`, in the convention of `Popen`."""
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        text = f"the processor library died of {name}"
    else:
        text = f"the machine's process ended with status {status} and no word"
    return End(How.TARGET_DIED, text)


class Line:
    """A socket as the guest's serial line, from the machine's side."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def put(self, data: bytes) -> None:
        """The guest's output; lost where nobody listens any more."""
        with contextlib.suppress(OSError):
            self._connection.sendall(data)

    def poll(self) -> bytes:
        """Input that is there."""
        return self._take(0)

    def wait(self) -> bytes:
        """Input, waiting for it; empty when the other side is gone."""
        return self._take(None)

    def _take(self, timeout: float | None) -> bytes:
        ready, _, _ = select.select([self._connection], [], [], timeout)
        try:
            return self._connection.recv(_PIECE) if ready else b""
        except OSError:
            return b""


# -- the child ---------------------------------------------------------------------------------


def serve(
    job: Job, cpu: str, quirks: tuple[str, ...], line: socket.socket, answer: socket.socket
) -> None:
    """A child's whole life: build, run, tell how it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    wire = Line(line)
    try:
        machine = build(job, models.named(cpu), serial=wire.put, source=wire, quirks=quirks)
        end = how_it_ended(machine.run())
    except UndervisorError as error:
        end = End(How.TARGET_DIED, error.message, report=error.hint)
    words = "\0".join((end.how.name, end.text, str(end.status), end.report))
    answer.sendall(words.encode(errors="replace"))
    sys.stdout.flush()
    os._exit(0)  # nothing here needs tidying that the system does not tidy


def _server() -> ForkServerContext:
    """Where children come from: a process that has imported everything and holds no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["undervisor.silicon.warm", "undervisor.targets.builtin", "undervisor.guest.asm"]
    )
    return context


class BuiltinRunning:
    """A machine that runs in a child."""

    def __init__(self, process: BaseProcess, line: socket.socket, answer: socket.socket) -> None:
        self._process, self._line, self._answer = process, line, answer
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
            data = self._line.recv(_PIECE)
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
            if self._answer in ready or not self._line.recv(_PIECE):
                self._end = self._read_answer()
        return self._end

    def _read_answer(self) -> End:
        data = b""
        while piece := self._answer.recv(_PIECE):
            data += piece
        self._process.join(_GRACE)
        if data:
            how, text, status, report = data.decode(errors="replace").split("\0", 3)
            return End(How[how], text, int(status), report)
        if self._stopped:
            return End(How.STOPPED, "stopped by the caller")
        return died(self._process.exitcode or 0)

    def stop(self) -> None:
        """End it now."""
        self._stopped = True
        self._process.kill()

    @property
    def pid(self) -> int:
        """The process that the machine runs in."""
        assert self._process.pid is not None
        return self._process.pid

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
        self._process.join(_GRACE)
        self._line.close()
        self._answer.close()


class BuiltinTarget:
    """The built-in L0 with a CPU model and, if wanted, quirks."""

    def __init__(self, cpu: str = "amd", quirks: Iterable[str] = ()) -> None:
        self.cpu = cpu
        self.model = models.named(cpu)
        self.quirks = tuple(quirk.name for quirk in named_quirks(quirks))
        self.name = f"builtin ({cpu})"

    @property
    def abilities(self) -> Abilities:
        """What its CPU model has."""
        extension = {name for name in ("vmx", "svm") if self.model.has(name)}
        return Abilities(frozenset(extension), MAX_CPUS, self.model.features)

    def start(self, job: Job) -> BuiltinRunning:
        """Start an image in a child of its own."""
        job.place()  # bad input is told here, not by the child
        ours, theirs = socket.socketpair()
        answer, telling = socket.socketpair()
        process = _server().Process(
            target=serve, args=(job, self.cpu, self.quirks, theirs, telling), daemon=True
        )
        with theirs, telling:
            process.start()
        return BuiltinRunning(process, ours, answer)
