"""The summary of a run: the tree of levels, and exits by level, reason and who handled them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from rich.table import Table
from rich.tree import Tree


class Cost(Protocol):
    """How often, and what it cost the host."""

    @property
    def count(self) -> int:
        """How often."""

    @property
    def host_ns(self) -> int:
        """Nanoseconds of host time that L0 worked for it, together."""


Cells = Mapping[tuple[int, int, int, str], Cost]
"""By (vCPU, level that left, level that went on, reason)."""


class Whose(Enum):
    """Who an exit was for."""

    L1 = "L0, for L1"
    ENTRY = "L0: enters L2"
    L2_TO_L0 = "L0, for L2"
    L2_TO_L1 = "reflected to L1"


def whose(level: int, to: int) -> Whose:
    """By the level that left and the one that went on."""
    if level == 1:
        return Whose.ENTRY if to == 2 else Whose.L1
    return Whose.L2_TO_L1 if to == 1 else Whose.L2_TO_L0


@dataclass(frozen=True, slots=True)
class Run:
    """A run that has ended; `resident` are the host's bytes in memory beside the guest's RAM."""

    image: str
    cpu: str
    cpus: int
    memory: int
    ended: str
    status: int
    virtual_ns: int
    host_seconds: float
    resident: int
    cells: Cells

    def count(self, vcpu: int | None = None, kind: Whose | None = None) -> int:
        """How many exits, of one vCPU or all, of one kind or all."""
        return sum(
            cell.count
            for (index, level, to, _), cell in self.cells.items()
            if vcpu in (None, index) and kind in (None, whose(level, to))
        )

    def rows(self) -> list[tuple[int, str, Whose, int, int]]:
        """(level, reason, whose, count, host ns) over all vCPUs, the most frequent first."""
        sums: dict[tuple[int, str, Whose], list[int]] = {}
        for (_, level, to, reason), cell in self.cells.items():
            total = sums.setdefault((level, reason, whose(level, to)), [0, 0])
            total[0] += cell.count
            total[1] += cell.host_ns
        rows = [(*key, count, spent) for key, (count, spent) in sums.items()]
        return sorted(rows, key=lambda row: (row[0], -row[3], row[1], row[2].value))

    def as_json(self) -> dict[str, object]:
        """The whole as a document."""
        return {
            "type": "summary",
            "image": self.image,
            "cpu": self.cpu,
            "cpus": self.cpus,
            "memory": self.memory,
            "ended": self.ended,
            "status": self.status,
            "virtual_ns": self.virtual_ns,
            "host_seconds": self.host_seconds,
            "resident_bytes": self.resident,
            "vcpus": [
                {"vcpu": vcpu, **{k.name.lower(): self.count(vcpu, k) for k in Whose}}
                for vcpu in range(self.cpus)
            ],
            "exits": [
                {
                    "level": level,
                    "reason": reason,
                    "handled": kind.value,
                    "count": count,
                    "host_ns": spent,
                }
                for level, reason, kind, count, spent in self.rows()
            ],
        }


def tree(run: Run) -> Tree:
    """The levels: L0, its L1 on each vCPU, and their L2."""
    size = f"{run.memory >> 20} MiB"
    root = Tree(f"L0  undervisor: CPU model {run.cpu}, {run.cpus} vCPUs, {size}")
    level1 = root.add(f"L1  {run.image}")
    for vcpu in range(run.cpus):
        own, entries = run.count(vcpu, Whose.L1), run.count(vcpu, Whose.ENTRY)
        branch = level1.add(f"vCPU {vcpu}: {_many(own, 'exit')} of L1")
        if entries:
            to_l1, to_l0 = run.count(vcpu, Whose.L2_TO_L1), run.count(vcpu, Whose.L2_TO_L0)
            branch.add(
                f"L2  entered {_many(entries, 'time')}, {_many(to_l1 + to_l0, 'exit')}: "
                f"{to_l1:,} reflected to L1, {to_l0:,} handled by L0"
            )
        else:
            branch.add("no L2")
    return root


def _many(number: int, word: str) -> str:
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"


def table(run: Run, most: int = 30) -> Table:
    """Exits by level, reason and who handled them, with what L0's work cost the host."""
    found = Table(title_justify="left", caption_justify="left", title="Exits")
    for name in ("level", "reason", "handled by"):
        found.add_column(name)
    for name in ("exits", "host µs each", "host ms"):
        found.add_column(name, justify="right")
    rows = run.rows()
    if len(rows) > most:  # the most frequent ones, in their order
        kept = sorted(rows, key=lambda row: -row[3])[:most]
        shown = [row for row in rows if row in kept]
    else:
        shown = rows
    for level, reason, kind, count, spent in shown:
        each, total = spent / count / 1e3, spent / 1e6
        found.add_row(f"L{level}", reason, kind.value, f"{count:,}", f"{each:.1f}", f"{total:.2f}")
    if len(rows) > most:
        found.caption = f"the {most} most frequent; {len(rows) - most} more rows with --json"
    return found


def sentence(run: Run) -> str:
    """One line about the whole."""
    return (
        f"{run.count():,} exits in {run.virtual_ns / 1e6:,.3f} ms of virtual time, "
        f"{run.host_seconds:.2f} s and {run.resident >> 20} MiB (beside RAM) of the host's; "
        f"{run.ended}"
    )
