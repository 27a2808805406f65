"""The catalogue of guest tests as a page of the documents, made from the declarations."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from undervisor.conformance.suite import GuestTest, all_tests


def page() -> str:
    """The whole page."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    tests = all_tests()
    yield "# The guest tests"
    yield ""
    yield "What the conformance suite demands of an L0, and the sections it stands on. Made by"
    yield "`python -m undervisor.conformance.document`; `undervisor test --list` shows the same."
    yield "[How to write one](guest-tests.md)."
    yield ""
    counts = {vendor: sum(t.vendor == vendor for t in tests) for vendor in ("vmx", "svm")}
    yield f"{len(tests)} tests: {counts['vmx']} of VMX, {counts['svm']} of SVM."
    for (vendor, aspect), mine in groupby(tests, key=lambda t: (t.vendor, t.aspect)):
        yield from ("", f"## {vendor}.{aspect}", "", "| test | what it demands | stands on |")
        yield "|---|---|---|"
        for _, cases in groupby(mine, key=lambda t: t.id.split("[")[0]):
            yield _row(list(cases))


def _row(cases: list[GuestTest]) -> str:
    """A test; its cases together."""
    first = cases[0]
    name, _, case = first.id.rpartition(".")[2].partition("[")
    shown = f"`{name}`"
    if case:
        names = (test.id.partition("[")[2].removesuffix("]") for test in cases)
        shown += f" ({', '.join(names)})"
    return f"| {shown} | {_cell(first.title)} | {_cell('; '.join(first.refs))} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
