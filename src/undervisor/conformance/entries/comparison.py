"""Targets side by side: for each rule, on the first of a target's processors that can break it.

The outcome of `column` for several targets is a `Comparison`; one is recorded in the package.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Final

from undervisor.conformance.entries.session import Result, Row, Session
from undervisor.conformance.entries.svm import breaks as svm
from undervisor.conformance.entries.trial import How
from undervisor.conformance.entries.vmx import breaks as vmx
from undervisor.errors import BadInput
from undervisor.targets import Target, catalogue

CPUS: Final[dict[str, tuple[str, ...]]] = {
    "builtin": ("intel", "intel-westmere", "intel-core2", "amd", "amd-opteron,-nx"),
    "bochs": (
        "tigerlake",
        "corei7_icelake_u",
        "corei7_sandy_bridge_2600k",
        "core2_penryn_t9600",
        "ryzen",
        "zambezi",
        "phenom_8650_toliman",
    ),
    "qemu": ("EPYC,+svm", "Opteron_G1,+svm,-nx"),
}
"""Processors that together can break as many rules as possible, those with most features first."""
RULES: Final[dict[str, tuple[str, ...]]] = {"vmx": vmx.ALL, "svm": svm.ALL}
RECORDED: Final = "rules-compared.json"
_VENDOR: Final = {rule: vendor for vendor, rules in RULES.items() for rule in rules}


@dataclass(frozen=True, slots=True)
class Cell:
    """A rule on a target, and the processor that it was broken on."""

    cpu: str
    result: Result
    expected: str = ""
    seen: str = ""
    mode: str = ""
    why: str = ""

    @classmethod
    def of(cls, cpu: str, row: Row) -> Cell:
        """What to keep of a row."""
        expected, seen = (str(s) if s is not None else "" for s in (row.expected, row.seen))
        if row.seen is not None and row.seen.how is How.SILENT:
            seen = How.SILENT.value  # for how long nothing was heard is no matter
        return cls(cpu, row.result, expected, seen, row.mode, row.why)


@dataclass(frozen=True, slots=True)
class Column:
    """A target: its processors, what it says it is, each rule's cell, how often it was started."""

    target: str
    version: str
    cpus: tuple[str, ...]
    cells: dict[str, Cell]
    boots: int = field(default=0, compare=False)

    def count(self, vendor: str, result: Result) -> int:
        """How many rules of a vendor have this result."""
        return sum(self.cells[r].result is result for r in RULES[vendor] if r in self.cells)


Comparison = list[Column]
Progress = Callable[[str, str], None]


def column(
    name: str,
    cpus: Iterable[str] = (),
    rules: Iterable[str] | None = None,
    *,
    version: str = "",
    progress: Progress = lambda cpu, rule: None,
) -> Column:
    """All rules on a target, or those named; `progress` is told each rule as it is done.

    BadInput where the target is none, or has neither VMX nor SVM.
    """
    models = tuple(cpus) or CPUS.get(name) or catalogue.default_cpus(name)
    asked = set(_VENDOR if rules is None else rules)
    cells: dict[str, Cell] = {}
    boots = 0
    for cpu in models:
        target = catalogue.named(name, cpu)
        vendor = _vendor(target)
        left = [rule for rule in RULES[vendor] if rule in asked and _open(cells.get(rule))]
        if not left:
            continue
        with Session(target, vendor) as session:
            for row in session.run(left):
                cells.setdefault(row.rule, Cell.of(cpu, row))
                if row.result is not Result.NOT_APPLICABLE:
                    cells[row.rule] = Cell.of(cpu, row)
                progress(cpu, row.rule)
            boots += session.boots
    ordered = {rule: cells[rule] for rule in _VENDOR if rule in cells}
    return Column(name, version, models, ordered, boots)


def _open(cell: Cell | None) -> bool:
    """Whether another processor may have more to say on the rule."""
    return cell is None or cell.result in (Result.NOT_APPLICABLE, Result.NOT_RUN)


def _vendor(target: Target) -> str:
    """The vendor whose rules the target's processor has."""
    for vendor in RULES:
        if vendor in target.abilities.vendors:
            return vendor
    raise BadInput(f"{target.name}: a guest there sees neither VMX nor SVM")


# -- as data -------------------------------------------------------------------------------------


def as_json(comparison: Comparison) -> dict[str, Any]:
    """What `from_json` reads."""
    targets = {c.target: {"version": c.version, "cpus": list(c.cpus)} for c in comparison}
    rows: dict[str, dict[str, Any]] = {}
    for rule in _VENDOR:
        found = {c.target: _plain(c.cells[rule]) for c in comparison if rule in c.cells}
        if found:
            rows[rule] = found
    return {"targets": targets, "rules": rows}


def _plain(cell: Cell) -> dict[str, str]:
    values = {name: getattr(cell, name) for name in ("cpu", "mode", "expected", "seen", "why")}
    return {"result": cell.result.value} | {name: v for name, v in values.items() if v}


def from_json(data: dict[str, Any]) -> Comparison:
    """A comparison as it was saved."""
    return [
        Column(name, about["version"], tuple(about["cpus"]), dict(_cells(data, name)))
        for name, about in data["targets"].items()
    ]


def _cells(data: dict[str, Any], target: str) -> Iterator[tuple[str, Cell]]:
    for rule, row in data["rules"].items():
        if target in row:
            values = dict(row[target])
            yield rule, Cell(result=Result(values.pop("result")), **{"cpu": "", **values})


def recorded() -> Comparison:
    """The comparison that was recorded with this version."""
    text = resources.files("undervisor").joinpath("data", RECORDED).read_text()
    return from_json(json.loads(text))
