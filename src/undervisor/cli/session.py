"""A machine's run as the command line shows it: serial line, trace, timeline, summary, exit code.

This is the child's side of `run` and `demo`; everything heavy is imported here.
"""

from __future__ import annotations

import codecs
import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Final, TextIO

from rich.console import Console

from undervisor.cli import terminal
from undervisor.cli.child import INTERRUPTED
from undervisor.cli.resident import resident_beside_ram
from undervisor.errors import BadInput, GuestDied, SiliconDied, TimedOut
from undervisor.hypervisor import inspect, models
from undervisor.hypervisor.machine import Machine
from undervisor.hypervisor.recorder import Both, Recorder, Tally
from undervisor.hypervisor.trace import NO_TRACE, Tracer, Transition
from undervisor.hypervisor.verdict import Ending, Outcome
from undervisor.report.trace import summary
from undervisor.report.trace.picture import Picture
from undervisor.report.trace.timeline import Timeline
from undervisor.report.trace.transition import Filter, json_line, text
from undervisor.targets import Job
from undervisor.targets.builtin import build

Sink = Callable[[bytes], None]


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user wants to see of a run."""

    cpu: str
    serial: str = "stdio"
    timeout: float | None = None
    trace: bool = False
    accepts: Filter = Filter()  # noqa: RUF009 - immutable
    as_json: bool = False
    timeline: str = ""
    summary: bool = True
    summary_to_stdout: bool = False
    rows: int = 30


@dataclass(slots=True)
class Seen:
    """A run that has ended, with what was seen of it."""

    outcome: Outcome
    machine: Machine
    run: summary.Run


def show(job: Job, wishes: Wishes) -> Seen:
    """Run the machine and show what the user wants to see."""
    started = time.monotonic()
    tally = Tally() if wishes.summary else None
    file = _create(wishes.timeline, "the timeline") if wishes.timeline else None
    output = _serial(wishes)
    machine = build(
        job, models.named(wishes.cpu), serial=output, source=_source(wishes, lambda: machine)
    )
    timeline = _timeline(wishes.timeline, file, job) if file else None
    machine.tracer = _tracer(wishes, tally, timeline)
    signal.signal(signal.SIGINT, lambda number, frame: machine.request_stop())
    outcome = machine.run(wishes.timeout)
    if timeline:
        timeline.close()
    run = summary.Run(
        image=job.image.name,
        cpu=wishes.cpu,
        cpus=job.cpus,
        memory=job.memory,
        ended=outcome.text.partition("\n")[0],
        status=outcome.status,
        virtual_ns=machine.now(),
        host_seconds=time.monotonic() - started,
        resident=resident_beside_ram(machine),
        cells=tally.cells if tally else {},
    )
    if tally:
        _print_summary(run, wishes)
    return Seen(outcome, machine, run)


# -- the serial line ---------------------------------------------------------------------------


def _serial(wishes: Wishes) -> Sink:
    """Where the guest's output goes."""
    kind, _, path = wishes.serial.partition(":")
    if kind == "null":
        return lambda data: None
    if kind == "file" and path:
        file = _create_binary(path)
        return lambda data: _write(file, data)
    if wishes.serial != "stdio":
        raise BadInput(f"serial line {wishes.serial!r}", hint="stdio, file:PATH or null")
    return _json_serial() if wishes.as_json else terminal.put


def _json_serial() -> Sink:
    decode = codecs.getincrementaldecoder("utf-8")("backslashreplace").decode

    def put(data: bytes) -> None:
        document = {"type": "serial", "text": decode(data)}
        terminal.put(json.dumps(document).encode() + b"\n")

    return put


def _write(file: IO[bytes], data: bytes) -> None:
    try:
        file.write(data)
    except OSError as error:
        raise BadInput(f"cannot write the serial output: {error.strerror}") from None


def _create_binary(path: str) -> IO[bytes]:
    try:
        return open(path, "wb", buffering=0)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}") from None


def _create(path: str, what: str) -> TextIO:
    try:
        return open(path, "w", encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot write {what} to {path}: {error.strerror}") from None


def _source(wishes: Wishes, machine: Callable[[], Machine]) -> terminal.Stdin | None:
    """Standard input, where the serial line is the standard streams."""
    if wishes.serial != "stdio":
        return None
    limit = wishes.timeout
    give_up = terminal.never if limit is None else terminal.until(time.monotonic() + limit)
    return terminal.Stdin(
        lambda: machine().platform.flush(), lambda: give_up() or machine().is_stopping
    )


# -- trace and summary -------------------------------------------------------------------------


def _timeline(path: str, file: TextIO, job: Job) -> Timeline | Picture:
    """A picture where the file's name says so, else a document for a viewer."""
    kind = Picture if path.lower().endswith(".svg") else Timeline
    return kind(file, job.cpus, job.image.name)


def _tracer(wishes: Wishes, tally: Tally | None, timeline: Timeline | Picture | None) -> Tracer:
    sinks: list[Callable[[Transition], None]] = []
    if wishes.trace:
        sinks.append(_printer(wishes))
    if timeline:
        sinks.append(timeline.add)
    if not sinks:
        return tally or NO_TRACE
    recorder = Recorder(_all(sinks))
    return Both(recorder, tally) if tally else recorder


def _all(sinks: list[Callable[[Transition], None]]) -> Callable[[Transition], None]:
    if len(sinks) == 1:
        return sinks[0]

    def each(transition: Transition) -> None:
        for sink in sinks:
            sink(transition)

    return each


def _printer(wishes: Wishes) -> Callable[[Transition], None]:
    accepts = wishes.accepts
    if wishes.as_json:

        def document(transition: Transition) -> None:
            if accepts(transition):
                terminal.put(json_line(transition).encode() + b"\n")

        return document
    write = sys.stderr.write

    def line(transition: Transition) -> None:
        if accepts(transition):
            write(text(transition) + "\n")

    return line


def _print_summary(run: summary.Run, wishes: Wishes) -> None:
    if wishes.as_json:
        terminal.put(json.dumps(run.as_json()).encode() + b"\n")
        return
    console = Console(stderr=not wishes.summary_to_stdout, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 100)
    console.print()
    console.print(summary.tree(run))
    console.print(summary.table(run, wishes.rows))
    console.print(summary.sentence(run))


# -- the end -----------------------------------------------------------------------------------

_IDLE_HINT: Final = "it halted with interrupts that nothing will raise; did it mean to end the run?"


def exit_code(seen: Seen) -> int:
    """The process's exit code for a run; raises what is a failure."""
    outcome = seen.outcome
    sentence, _, dump = outcome.text.partition("\n")
    if outcome.ending is Ending.GUEST:
        return outcome.status & 0xFF
    if outcome.ending is Ending.STOPPED:
        return INTERRUPTED
    if outcome.ending is Ending.TIMEOUT:
        raise TimedOut(f"{sentence}: the guest did not end the run")
    if outcome.ending is Ending.IDLE:
        raise GuestDied(sentence, hint=_IDLE_HINT)
    print(dump or inspect.dump(seen.machine), file=sys.stderr)
    if outcome.ending is Ending.UNKNOWN_EXIT:
        raise SiliconDied(sentence, hint="the silicon stopped in a way that L0 does not know")
    others = inspect.dump_suspended(seen.machine)
    if others:
        print(others, file=sys.stderr)
    raise GuestDied(sentence)
