"""A comparison of targets as it was recorded: beside its pages, to be read and compared again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from undervisor.conformance.compare import Comparison, Row, pages
from undervisor.conformance.runner import Result, Verdict
from undervisor.conformance.suite import GuestTest, all_tests
from undervisor.errors import BadInput

NAME: Final = "comparison.json"


@dataclass(frozen=True, slots=True)
class Record:
    """A comparison, the command that made it, and what each column ran on."""

    comparison: Comparison
    command: str
    versions: Mapping[str, str]

    def files(self) -> Iterator[tuple[str, str]]:
        """File names and texts: the pages, and the record itself."""
        yield from pages(self.comparison, self.command, self.versions)
        yield NAME, as_json(self)


def as_json(record: Record) -> str:
    """What `from_json` reads; a line for each test."""
    versions = {column: record.versions.get(column, "") for column in record.comparison.columns}
    head = f'"command": {_dump(record.command)},\n"versions": {_dump(versions)}'
    rows = ",\n".join(
        f"{_dump(row.test.id)}: {_dump(_plain(row))}" for row in record.comparison.rows
    )
    return f'{{\n{head},\n"tests": {{\n{rows}\n}}\n}}\n'


def from_json(text: str, *, without_gone: bool = False) -> Record:
    """A record as it was saved.

    BadInput where it is none, or names a test that is none any more, unless those are left out.
    """
    try:
        data = json.loads(text)
        command, versions, found = data["command"], data["versions"], data["tests"]
        tests = {test.id: test for test in all_tests()}
        rows = tuple(_row(tests[name], found[name]) for name in tests if name in found)
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"this is no record of a comparison: {error}", hint="remove it, and make it anew"
        ) from None
    gone = [name for name in found if name not in tests]
    if gone and not without_gone:
        raise BadInput(
            f"the comparison names tests that are none: {', '.join(gone)}",
            hint=f"make it anew: {command}",
        )
    return Record(Comparison(tuple(versions), rows), command, versions)


def renewed(old: Record, new: Record, folder: str) -> Record:
    """`new`, and from `old` what was not run this time; the command then is that of all of it."""
    before = {row.test: row.results for row in old.comparison.rows}
    now = {row.test: row.results for row in new.comparison.rows}
    rows = tuple(
        Row(test, {**before.get(test, {}), **now.get(test, {})})
        for test in all_tests()
        if test in before or test in now
    )
    kept = any(row.results.keys() - now.get(row.test, {}).keys() for row in rows)
    versions = {**old.versions, **new.versions}
    whole = ["undervisor", "test", *(word for c in versions for word in ("--on", c))]
    command = shlex.join([*whole, "--pages", folder]) if kept else new.command
    return Record(Comparison(tuple(versions), rows), command, versions)


def _plain(row: Row) -> dict[str, list[str]]:
    """Each column's target, verdict and, where that is not passed, message."""
    return {
        column: [result.target, result.verdict.value, *([result.message] if result.message else [])]
        for column, result in row.results.items()
    }


def _row(test: GuestTest, found: Mapping[str, list[str]]) -> Row:
    return Row(
        test,
        {
            column: Result(test, target, Verdict(verdict), "".join(message))
            for column, (target, verdict, *message) in found.items()
        },
    )


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
