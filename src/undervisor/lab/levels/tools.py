"""Well-known tools, where every level that is compared has them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from undervisor.host.access.protocol import Host
from undervisor.host.fact import Known
from undervisor.lab.levels.deliver import must
from undervisor.lab.levels.measures import Measure

SECONDS: Final = 1
"""Of one run; the tools know whole ones only."""
_PATIENCE: Final = 60.0
_SYSBENCH: Final = ("sysbench", "--threads=1", f"--time={SECONDS}")


@dataclass(frozen=True, slots=True)
class Tool:
    """A command whose output holds a rate: what is done in a second.

    DISK and BYTES among its words stand for the level's disk; it is left out where there is none.
    """

    measure: Measure
    words: tuple[str, ...]
    rate: Callable[[str], float]

    @property
    def needs_disk(self) -> bool:
        """Whether it reads the level's disk."""
        return any("DISK" in word for word in self.words)

    def run(self, host: Host, disk: str, size: int) -> float:
        """Nanoseconds of one of what it counts.  BadInput where it fails, ValueError where it says
        something else."""
        argv = [w.replace("DISK", disk).replace("BYTES", str(size)) for w in self.words]
        return self.measure.amount / self.rate(must(host, argv, _PATIENCE).stdout) * 1e9


def has(host: Host, name: str) -> bool:
    """Whether the machine has the command."""
    fact = host.run([name, "--version"])
    return isinstance(fact, Known) and fact.value.status == 0


def _number(pattern: str) -> Callable[[str], float]:
    """The number in a tool's text; ValueError where it is not there, or is nothing."""

    def find(text: str) -> float:
        found = re.search(pattern, text)
        if not found or not float(found[1]):
            raise ValueError(f"no rate in {text[:200]!r}")
        return float(found[1])

    return find


def _fio(text: str) -> float:
    """Reads in a second; fio may write notes before its JSON."""
    try:
        rate = float(json.loads(text[text.index("{") :])["jobs"][0]["read"]["iops"])
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"no rate in {text[:200]!r}") from error
    if not rate:
        raise ValueError("fio read nothing")
    return rate


TOOLS: Final = (
    Tool(
        Measure("sysbench-cpu", "sysbench cpu", unit="events/s"),
        (*_SYSBENCH, "cpu", "run"),
        _number(r"events per second:\s*([\d.]+)"),
    ),
    Tool(
        Measure("sysbench-memory", "sysbench memory, blocks of 1 MiB", unit="MiB/s"),
        (*_SYSBENCH, "memory", "--memory-block-size=1M", "--memory-total-size=100T", "run"),
        _number(r"\(([\d.]+) MiB/sec\)"),
    ),
    Tool(
        Measure("fio-read", "fio, 4 KiB read at random, direct", unit="IOPS"),
        (
            *("fio", "--name=level", "--filename=DISK", "--size=BYTES", "--rw=randread"),
            *("--bs=4k", "--direct=1", "--ioengine=psync", "--thread", "--time_based"),
            *(f"--runtime={SECONDS}", "--output-format=json"),
        ),
        _fio,
    ),
)
