"""What follows from the numbers: ratios between levels, and the budget that they are held to.

The guide to nesting that operators are given says "Performance overhead: 10-30% compared to native
virtualization".  Native virtualization is a guest of the host, L1; so the budget is for L2 over L1
(and L3 over L2), not for a guest over the bare machine.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from enum import Enum
from itertools import pairwise
from typing import Any, Final

from undervisor.lab.levels.estimate import Estimate, estimate, ratios
from undervisor.lab.levels.measures import Measure
from undervisor.lab.levels.program import program
from undervisor.lab.levels.session import Effort, Findings

BUDGET: Final = (1.10, 1.30)
"""The guide's 10 to 30 %, as ratios."""
UNJUDGED: Final = frozenset({"exit"})
"""An exit is what nesting costs, so no budget of work applies to it."""
EMULATORS: Final = {"TCGTCGTCGTCG": "QEMU TCG"}
_CLOCKS_AGREE: Final = (0.5, 1.02)
"""Seconds of a level over ours: less is the time that starting the program took."""


class Verdict(Enum):
    """Whether an overhead is within the budget, by the whole of its interval."""

    WITHIN = "within"
    OVER = "over"
    UNDECIDED = "undecided"
    NONE = "not judged"


@dataclass(frozen=True, slots=True)
class Ratio:
    """The cost at the level `inner` over that at `outer`."""

    inner: str
    outer: str
    estimate: Estimate
    verdict: Verdict

    @property
    def name(self) -> str:
        """`L2/L1`."""
        return f"{self.inner}/{self.outer}"


@dataclass(frozen=True, slots=True)
class Row:
    """A measure at every level."""

    measure: Measure
    costs: dict[str, Estimate]
    ratios: tuple[Ratio, ...]
    missing: dict[str, str]


@dataclass(frozen=True, slots=True)
class Comparison:
    """All rows; `emulated` says which level runs on an emulator, and then nothing is judged."""

    levels: dict[str, str]
    below: dict[str, str]
    rows: tuple[Row, ...]
    emulated: str
    effort: Effort
    clocks: dict[str, float]

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The levels that are compared: neighbours, and the innermost with the outermost."""
        return _pairs(list(self.levels))

    @property
    def judged(self) -> bool:
        """Whether any ratio is held to the budget."""
        return any(r.verdict is not Verdict.NONE for row in self.rows for r in row.ratios)

    @property
    def over(self) -> bool:
        """Whether anything is over the budget."""
        return any(r.verdict is Verdict.OVER for row in self.rows for r in row.ratios)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader has to know before the numbers."""
        return tuple(_notes(self))

    def as_json(self) -> dict[str, Any]:
        """Plain values; costs are nanoseconds."""
        raw = program()
        return {
            "levels": [
                {"name": n, "machine": m, "below": self.below[n], "clock": self.clocks[n]}
                for n, m in self.levels.items()
            ],
            "program": {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()},
            "effort": asdict(self.effort),
            "budget": list(BUDGET),
            "emulated": self.emulated,
            "notes": list(self.notes),
            "rows": [_row_as_json(row) for row in self.rows],
        }


def compare(found: Findings, effort: Effort) -> Comparison:
    """Medians, ratios and verdicts."""
    emulated = _emulated(found)
    rows = tuple(_row(found, one, judged=not emulated) for one in found.measures)
    clocks = {name: estimate(values).middle for name, values in found.clocks.items()}
    return Comparison(found.levels, found.below, rows, emulated, effort, clocks)


def judge(found: Estimate) -> Verdict:
    """By the whole interval: what it does not decide is undecided."""
    if found.high <= BUDGET[1]:
        return Verdict.WITHIN
    return Verdict.OVER if found.low > BUDGET[1] else Verdict.UNDECIDED


def _row(found: Findings, one: Measure, *, judged: bool) -> Row:
    costs = found.costs[one.key]
    made = []
    for inner, outer in _pairs(list(found.levels)):
        if inner in costs and outer in costs:
            ratio = ratios(costs[inner], costs[outer])
            applies = judged and one.key not in UNJUDGED and _nested(inner, outer)
            made.append(Ratio(inner, outer, ratio, judge(ratio) if applies else Verdict.NONE))
    middles = {name: estimate(values) for name, values in costs.items()}
    return Row(one, middles, tuple(made), dict(found.missing[one.key]))


def _pairs(names: list[str]) -> tuple[tuple[str, str], ...]:
    made = [(inner, outer) for outer, inner in pairwise(names)]
    return (*made, (names[-1], names[0])) if len(names) > 2 else tuple(made)


def _nested(inner: str, outer: str) -> bool:
    """Whether the one is a guest in the other, and the other is a guest itself."""
    first, second = int(outer[1:]), int(inner[1:])
    return first >= 1 and second == first + 1


def _emulated(found: Findings) -> str:
    for name, word in found.below.items():
        if word in EMULATORS:
            return f"{name} runs on an emulator ({EMULATORS[word]})"
    return ""


def _notes(made: Comparison) -> list[str]:
    low, high = (round((limit - 1) * 100) for limit in BUDGET)
    notes = []
    if made.emulated:
        notes.append(
            f"{made.emulated}: the ratios are of an emulation. They say nothing about hardware, "
            f"and none is judged against the budget of {low}-{high} %."
        )
    if made.judged:
        notes.append(
            f"The budget is {low}-{high} % of a nested guest over a guest; a ratio is within it or "
            "over it where its whole interval is."
        )
    least = min(e.confidence for row in made.rows for e in _estimates(row))
    notes.append(
        f"Medians of {made.effort.rounds} rounds and ratios within a round, with the interval that "
        f"holds the true median with at least {least:.1%} confidence."
    )
    for name, ratio in made.clocks.items():
        if not _CLOCKS_AGREE[0] <= ratio <= _CLOCKS_AGREE[1]:
            notes.append(
                f"The clock of {name} counted {ratio:.2f} s in a second of ours, the time of "
                "starting the program included: its numbers are not to be trusted."
            )
    return notes


def _estimates(row: Row) -> list[Estimate]:
    return [*row.costs.values(), *(ratio.estimate for ratio in row.ratios)]


def _row_as_json(row: Row) -> dict[str, Any]:
    return {
        "key": row.measure.key,
        "title": row.measure.title,
        "nanoseconds": {name: found.as_json() for name, found in row.costs.items()},
        "shown": {name: row.measure.shown(e.middle) for name, e in row.costs.items()},
        "ratios": [
            {"name": r.name, **r.estimate.as_json(), "verdict": r.verdict.value} for r in row.ratios
        ],
        "missing": row.missing,
    }
