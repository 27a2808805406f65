"""`undervisor rules --on TARGET`: every rule broken on running processors, side by side."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from rich.markup import escape

from undervisor.cli.printing import console, put, put_json, table
from undervisor.cli.versions import version_of
from undervisor.errors import BadInput, ExitCode

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from undervisor.conformance.entries.comparison import Column


def compare(
    rules: Collection[str], targets: Sequence[str], cpus: Sequence[str], *, as_json: bool
) -> ExitCode:
    """Break `rules` on each target and print what came of it; NEGATIVE where a target differs."""
    from undervisor.conformance.entries.comparison import as_json as plain
    from undervisor.conformance.entries.session import Result

    if cpus and len(targets) > 1:
        raise BadInput(
            "--cpu names processors of one target", hint="give one --on, or leave --cpu out"
        )
    columns = [_column(name, cpus, rules) for name in dict.fromkeys(targets)]
    if as_json:
        put_json(plain(columns))
    else:
        _print(columns)
    wrong = (Result.DIFFERS, Result.NOT_RUN)
    found = {cell.result for column in columns for cell in column.cells.values()}
    return ExitCode.NEGATIVE if found.intersection(wrong) else ExitCode.OK


def _column(name: str, cpus: Sequence[str], rules: Collection[str]) -> Column:
    """A target's column, with progress on standard error."""
    from rich.console import Console
    from rich.progress import Progress

    from undervisor.conformance.entries.comparison import column

    out = Console(stderr=True, highlight=False)
    with Progress(console=out, transient=True, disable=not out.is_terminal) as progress:
        tell = _Teller(progress, name, len(rules))
        return column(name, cpus, rules, version=version_of(name), progress=tell)


class _Teller:
    """Shows how far the rules of each processor are."""

    def __init__(self, progress: Progress, target: str, total: int) -> None:
        self._progress, self._target, self._total = progress, target, total
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, cpu: str, rule: str) -> None:
        if cpu not in self._tasks:
            words = f"{self._target} {cpu}"
            self._tasks[cpu] = self._progress.add_task(words, total=self._total)
        self._progress.advance(self._tasks[cpu])


def _print(columns: Sequence[Column]) -> None:
    from undervisor.conformance.entries.settled import settlement

    out = console()
    made = table("rule", "must", *(c.target for c in columns))
    ids = dict.fromkeys(rule for c in columns for rule in c.cells)
    for rule in ids:
        cells = [c.cells.get(rule) for c in columns]
        expected = next((c.expected for c in cells if c is not None and c.expected), "")
        made.add_row(rule, expected, *(escape(_words(c)) for c in cells))
    out.print(made)
    for column in columns:
        for rule, cell in column.cells.items():
            if cell.result.value == "differs":
                put(out, f"{rule} on {column.target}, {cell.cpu}: {cell.seen}", style="bold")
                if words := settlement(rule):
                    put(out, words, indent=2)
    for column in columns:
        put(out, f"{column.target}: {_counts(column)}")
    sys.stdout.flush()


def _words(cell: object) -> str:
    from undervisor.conformance.entries.comparison import Cell

    if not isinstance(cell, Cell):
        return ""
    more = {"agrees": "", "differs": cell.seen}.get(cell.result.value, cell.why)
    return f"{cell.result.value}: {more}" if more else cell.result.value


def _counts(column: Column) -> str:
    from undervisor.conformance.entries.comparison import RULES
    from undervisor.conformance.entries.session import Result

    parts = []
    for vendor in RULES:
        counts = [(result.value, column.count(vendor, result)) for result in Result]
        if any(number for _, number in counts):
            words = ", ".join(f"{number} {name}" for name, number in counts if number)
            parts.append(f"{vendor.upper()} {words}")
    return "; ".join(parts)
