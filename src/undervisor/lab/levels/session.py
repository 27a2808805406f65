"""Measure all levels in turns, so that what disturbs one round disturbs it at every level."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from undervisor.errors import BadInput
from undervisor.host.access.protocol import Host
from undervisor.lab.levels import tools
from undervisor.lab.levels.deliver import folder_on, must, put_program, shell
from undervisor.lab.levels.measures import DISK, MEASURES, Measure
from undervisor.lab.levels.program import Run, parse, program
from undervisor.lab.progress import SILENT, Progress

DISK_BYTES: Final = 16 << 20
_PATIENCE: Final = 300.0
"""Seconds for all measures once; L2 under emulation takes a few."""


@dataclass(frozen=True, slots=True)
class Effort:
    """Rounds, samples of a measure in a round, and nanoseconds of a sample."""

    rounds: int
    samples: int
    nanoseconds: int


QUICK: Final = Effort(6, 3, 1_000_000)
FULL: Final = Effort(12, 5, 5_000_000)


@dataclass(frozen=True, slots=True)
class Subject:
    """A level to be measured; `disk` is a path there whose first DISK_BYTES may be overwritten.

    Without a path a file is made in a temporary folder.
    """

    number: int
    host: Host
    disk: str = ""

    @property
    def name(self) -> str:
        """`L1`."""
        return f"L{self.number}"


@dataclass(slots=True)
class Findings:
    """What was measured, by measure and level's name: nanoseconds in each round, or why not.

    `below` is what the processor of a level says of who is below it; `clocks` are seconds by a
    level's own clock over seconds by ours, in each round.
    """

    levels: dict[str, str] = field(default_factory=dict)
    below: dict[str, str] = field(default_factory=dict)
    clocks: dict[str, list[float]] = field(default_factory=dict)
    measures: list[Measure] = field(default_factory=list)
    costs: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    missing: dict[str, dict[str, str]] = field(default_factory=dict)

    def keep(self, key: str, level: str, cost: float) -> None:
        """The cost of a round."""
        self.costs[key].setdefault(level, []).append(cost)

    def lack(self, key: str, level: str, why: str) -> None:
        """There is none: whatever other rounds said does not count."""
        self.costs[key].pop(level, None)
        self.missing[key][level] = why


def measure(
    subjects: Sequence[Subject],
    effort: Effort,
    *,
    with_tools: bool = True,
    progress: Progress = SILENT,
) -> Findings:
    """All measures at all levels.  BadInput where a level can't run the program."""
    with contextlib.ExitStack() as stack:
        ready = []
        for subject in subjects:
            with progress.working(f"bringing the program to {subject.name}"):
                ready.append(_Ready.make(stack, subject))
        used = [tool for tool in tools.TOOLS if with_tools and _all_have(ready, tool)]
        found = Findings({s.name: s.host.name for s in subjects})
        found.measures = [*MEASURES, *(tool.measure for tool in used)]
        for one in found.measures:
            found.costs[one.key], found.missing[one.key] = {}, {}
        for number in range(effort.rounds):
            for level in ready:
                where = f"{level.subject.name}, round {number + 1} of {effort.rounds}"
                with progress.working(f"measuring {where}"):
                    _round(found, level, effort, used)
    return found


@dataclass(frozen=True, slots=True)
class _Ready:
    """A level with the program and a disk; without one, `no_disk` says why."""

    subject: Subject
    program: str
    disk: str
    no_disk: str = ""

    @classmethod
    def make(cls, stack: contextlib.ExitStack, subject: Subject) -> _Ready:
        host = subject.host
        folder = stack.enter_context(folder_on(host))
        path = f"{folder}/levels"
        put_program(host, program(), path)
        if subject.disk:
            return cls(subject, path, subject.disk)
        disk, blocks = f"{folder}/disk", DISK_BYTES >> 20
        try:
            shell(host, f"dd if=/dev/urandom of={disk} bs=1048576 count={blocks} && sync")
        except BadInput as error:
            return cls(subject, path, "", error.message)
        return cls(subject, path, disk)


def _all_have(ready: Sequence[_Ready], tool: tools.Tool) -> bool:
    if tool.needs_disk and not all(level.disk for level in ready):
        return False
    return all(tools.has(level.subject.host, tool.words[0]) for level in ready)


def _round(found: Findings, level: _Ready, effort: Effort, used: Sequence[tools.Tool]) -> None:
    """One round at one level.  The least of a round's samples is the one least disturbed."""
    name, host = level.subject.name, level.subject.host
    run, seconds = _run(level, effort)
    found.below[name] = run.signature
    found.clocks.setdefault(name, []).append(run.seconds / seconds)
    for one in MEASURES:
        if one.place in run.samples:
            found.keep(one.key, name, min(run.samples[one.place]))
        elif one.place in run.failed:
            found.lack(one.key, name, _why(one, run.failed[one.place]))
        else:
            found.lack(one.key, name, level.no_disk)
    for tool in used:
        try:
            found.keep(tool.measure.key, name, tool.run(host, level.disk, DISK_BYTES))
        except (BadInput, ValueError) as error:
            found.lack(tool.measure.key, name, str(error))


def _why(one: Measure, number: int) -> str:
    """An error number in words.  open(2): EINVAL is a file system that does not do O_DIRECT."""
    if one.key in DISK and number == errno.EINVAL:
        return "its file system can't be read past the page cache"
    return os.strerror(number)


def _run(level: _Ready, effort: Effort) -> tuple[Run, float]:
    """What the program says, and the seconds that it took by our clock."""
    mask = sum(1 << one.place for one in MEASURES if level.disk or one.key not in DISK)
    numbers = (f"{n:x}" for n in (mask, effort.samples, effort.nanoseconds))
    argv = [level.program, *numbers, level.disk or "-", f"{DISK_BYTES:x}"]
    began = time.monotonic()
    output = must(level.subject.host, argv, _PATIENCE)
    seconds = time.monotonic() - began
    try:
        return parse(output.stdout), seconds
    except ValueError as error:
        raise BadInput(
            f"{level.subject.host.name}: the program said something else: {error}"
        ) from None
