"""What is measured, in the order of the program's table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from undervisor.lab.levels.program import BLOCK


@dataclass(frozen=True, slots=True)
class Measure:
    """One thing whose cost is the time of an iteration.

    `amount` of `unit` is what an iteration does, where that reads better as a rate; without a unit
    the time itself is shown.  `place` is the measure's in the program, -1 where a tool measures it.
    """

    key: str
    title: str
    place: int = -1
    unit: str = ""
    amount: float = 1.0

    def shown(self, nanoseconds: float) -> str:
        """The cost of an iteration, for people: `12.3 ns`, `8.1 GB/s`."""
        if self.unit:
            return f"{_three(self.amount / nanoseconds * 1e9)} {self.unit}"
        for limit, unit in ((1e3, "ns"), (1e6, "µs"), (1e9, "ms")):
            if nanoseconds < limit:
                return f"{_three(nanoseconds / limit * 1e3)} {unit}"
        return f"{_three(nanoseconds / 1e9)} s"


def _three(value: float) -> str:
    """Three digits that count."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


_TITLES: Final = {
    "cpu": "integer arithmetic, one step",
    "exit": "an instruction that exits: CPUID",
    "syscall": "system call: getppid",
    "switch": "context switches: a byte through pipes and back",
    "process": "fork, exit, wait",
    "fault": "page fault: a new page of 4 KiB",
    "latency-32k": "memory latency, 32 KiB",
    "latency-1m": "memory latency, 1 MiB",
    "latency-32m": "memory latency, 32 MiB",
    "read": "memory bandwidth, read",
    "copy": "memory bandwidth, copy",
    "loopback": "network loopback: a byte over TCP and back",
    "loopback-64k": "network loopback: 64 KiB over TCP, answered",
    "disk-read": "disk: 4 KiB read, direct",
    "disk-write": "disk: 4 KiB written, durably",
}
_OF_BLOCKS: Final = frozenset({"read", "copy", "loopback-64k"})


def _of_program() -> tuple[Measure, ...]:
    rate = ("GB/s", BLOCK / 1e9)
    return tuple(
        Measure(key, title, place, *(rate if key in _OF_BLOCKS else ()))
        for place, (key, title) in enumerate(_TITLES.items())
    )


MEASURES: Final = _of_program()
"""Of our own program."""
DISK: Final = frozenset({"disk-read", "disk-write"})
