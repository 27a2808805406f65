"""Several targets side by side: a row a test, a column a target, a page for each disagreement.

A target *disagrees* with a test where its verdict is bad.  What is known of a peer's defect is
data (`known`): the page of a disagreement says it, beside what the manual says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from undervisor.conformance.known import Known, explain
from undervisor.conformance.runner import Result, Verdict
from undervisor.conformance.suite import GuestTest

SIGNS: Final = {
    Verdict.PASSED: "✓",
    Verdict.SKIPPED: "–",
    Verdict.FAILED: "✗",
    Verdict.GUEST_DIED: "✗ guest died",
    Verdict.TARGET_DIED: "✗ target died",
    Verdict.TIMED_OUT: "✗ timed out",
    Verdict.ERROR: "✗ error",
}


@dataclass(frozen=True, slots=True)
class Row:
    """A test and its result on each target that has it."""

    test: GuestTest
    results: Mapping[str, Result]

    @property
    def disagreements(self) -> list[Result]:
        """The results that are bad."""
        return [result for result in self.results.values() if not result.verdict.good]

    def sign(self, column: str) -> str:
        """A target's verdict in one sign; empty where it did not run the test."""
        result = self.results.get(column)
        return SIGNS[result.verdict] if result is not None else ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """All rows, and the targets in the order in which they were given."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def disagreements(self) -> list[Row]:
        """The rows in which a target disagrees."""
        return [row for row in self.rows if row.disagreements]

    @property
    def unexplained(self) -> list[Result]:
        """Bad results of which nothing is known."""
        bad = [result for row in self.rows for result in row.disagreements]
        return [result for result in bad if explain(result) is None]


def base_name(target: str) -> str:
    """A target's column: its name without the CPU model."""
    return target.split(" (")[0]


def compare(results: Sequence[Result]) -> Comparison:
    """The results of several targets side by side."""
    columns = dict.fromkeys(base_name(result.target) for result in results)
    rows: dict[GuestTest, dict[str, Result]] = {}
    for result in results:
        mine = rows.setdefault(result.test, {})
        before = mine.get(base_name(result.target))
        # Of several runs, or models, the worst counts.
        if before is None or before.verdict.good:
            mine[base_name(result.target)] = result
    return Comparison(tuple(columns), tuple(Row(test, found) for test, found in rows.items()))


def defects(comparison: Comparison, column: str) -> dict[Known, list[GuestTest]]:
    """What is known of a target's defects, as far as the comparison shows them, with the tests."""
    found: dict[Known, list[GuestTest]] = {}
    for row in comparison.disagreements:
        result = row.results.get(column)
        if result is None or result.verdict.good:
            continue
        if (known := explain(result)) is not None:
            found.setdefault(known, []).append(row.test)
    return found


# -- pages --------------------------------------------------------------------------------------


def pages(
    comparison: Comparison, command: str, versions: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """File names and texts: the table, and a page for each test on which somebody disagrees.

    `command` is what made them, `versions` what each column ran on.
    """
    yield "README.md", "\n".join(_overview(comparison, command, versions)) + "\n"
    for r in comparison.disagreements:
        yield page_name(r.test), "\n".join(_page(r)) + "\n"


def page_name(test: GuestTest) -> str:
    """The file of a test's page."""
    kept = "".join(c if c.isalnum() or c in "._-" else "-" for c in test.id)
    return f"{kept.strip('-')}.md"


def _overview(comparison: Comparison, command: str, versions: Mapping[str, str]) -> Iterator[str]:
    columns = comparison.columns
    yield "# The targets compared"
    yield ""
    yield f"Made by `{command}`. ✓ passed, ✗ failed, – skipped: the target lacks what is tested;"
    yield "empty: no such processor there. A failed test links to its page: what the manual says,"
    yield "what each target did, and what is known."
    yield ""
    yield from _head("", columns)
    yield "| version | " + " | ".join(versions.get(c, "") for c in columns) + " |"
    for what, verdicts in (
        ("passed", {Verdict.PASSED}),
        ("skipped", {Verdict.SKIPPED}),
        ("failed", {v for v in Verdict if not v.good}),
    ):
        numbers = [
            sum(c in r.results and r.results[c].verdict in verdicts for r in comparison.rows)
            for c in columns
        ]
        yield f"| {what} | " + " | ".join(str(number) for number in numbers) + " |"
    for column in columns:
        yield from _defects(comparison, column)
    for name, rows in groupby(comparison.rows, lambda r: f"{r.test.vendor}.{r.test.aspect}"):
        yield from ("", f"## {name}", "")
        yield from _head("test", columns)
        for r in rows:
            test = r.test.id.removeprefix(f"{name}.")
            shown = f"[{test}]({page_name(r.test)})" if r.disagreements else test
            yield f"| {shown} | " + " | ".join(r.sign(c) for c in columns) + " |"


def _head(first: str, columns: Sequence[str]) -> Iterator[str]:
    yield f"| {first} | " + " | ".join(columns) + " |"
    yield "|---|" + "---|" * len(columns)


def _defects(comparison: Comparison, column: str) -> Iterator[str]:
    """A target's defects, each with the tests that show it."""
    found = defects(comparison, column)
    if not found:
        return
    yield from ("", f"## What is wrong with {column}", "")
    for known, tests in found.items():
        links = ", ".join(f"[{test.id}]({page_name(test)})" for test in tests)
        yield f"- {known.what} ({links})"


def _page(r: Row) -> Iterator[str]:
    yield f"# {r.test.id}"
    yield ""
    yield f"The manual: {r.test.title}"
    yield ""
    yield "; ".join(r.test.refs) + "."
    for column, result in r.results.items():
        yield ""
        yield f"## {column}: {result.verdict.value}"
        if result.message:
            yield ""
            yield f"    {' '.join(result.message.split())}"
        if result.verdict.good:
            continue
        yield ""
        yield _known_words(explain(result))


def _known_words(known: Known | None) -> str:
    if known is None:
        return "Nothing is known of this defect."
    return f"{known.what} {known.evidence}"
