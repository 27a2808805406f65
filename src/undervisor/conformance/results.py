"""What came out of a run, for machines: JSON, JUnit XML and TAP."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree  # only ever written

from undervisor.conformance.runner import Result, Verdict


def counts(results: Iterable[Result]) -> dict[Verdict, int]:
    """How often each verdict came, those that did not left out, in the order of `Verdict`."""
    found = Counter(result.verdict for result in results)
    return {verdict: found[verdict] for verdict in Verdict if found[verdict]}


def all_good(results: Iterable[Result]) -> bool:
    """Whether every test passed or was skipped, and at least one passed."""
    found = counts(results)
    return bool(found.get(Verdict.PASSED)) and all(verdict.good for verdict in found)


def as_json(results: Sequence[Result]) -> str:
    """One object: the totals and a row for each result."""
    totals = {verdict.value: number for verdict, number in counts(results).items()}
    return json.dumps({"totals": totals, "results": [row(r) for r in results]}, indent=2)


def row(result: Result) -> Mapping[str, Any]:
    """A result as JSON has it."""
    return {
        "test": result.test.id,
        "title": result.test.title,
        "refs": list(result.test.refs),
        "target": result.target,
        "verdict": result.verdict.value,
        "message": result.message,
        "details": result.details,
        "seconds": round(result.seconds, 3),
    }


def as_junit(results: Sequence[Result]) -> str:
    """JUnit XML: a suite for each target."""
    root = ElementTree.Element("testsuites", name="undervisor")
    for target in dict.fromkeys(result.target for result in results):
        mine = [result for result in results if result.target == target]
        bad = [result for result in mine if not result.verdict.good]
        errors = sum(result.verdict is Verdict.ERROR for result in bad)
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=target,
            tests=str(len(mine)),
            failures=str(len(bad) - errors),
            errors=str(errors),
            skipped=str(sum(result.verdict is Verdict.SKIPPED for result in mine)),
            time=f"{sum(result.seconds for result in mine):.3f}",
        )
        for result in mine:
            _case(suite, result)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(
        root, encoding="unicode"
    )


def _case(suite: ElementTree.Element, result: Result) -> None:
    vendor, aspect, name = result.test.id.split(".", 2)
    case = ElementTree.SubElement(
        suite,
        "testcase",
        classname=f"{vendor}.{aspect}",
        name=name,
        time=f"{result.seconds:.3f}",
    )
    if result.verdict is Verdict.PASSED:
        return
    kind = {Verdict.SKIPPED: "skipped", Verdict.ERROR: "error"}.get(result.verdict, "failure")
    said = ElementTree.SubElement(case, kind, message=_printable(result.message))
    if kind != "skipped":
        said.set("type", result.verdict.value)
        said.text = _printable("\n".join([result.test.title, *result.test.refs, result.details]))


def _printable(text: str) -> str:
    """Without the characters that XML 1.0 cannot hold: a dying machine may say anything."""
    return "".join(c if c in "\t\n" or (c.isprintable() and c <= "\ufffd") else "?" for c in text)


def as_tap(results: Sequence[Result]) -> Iterator[str]:
    """Lines of the Test Anything Protocol, version 14."""
    yield "TAP version 14"
    yield f"1..{len(results)}"
    for number, result in enumerate(results, 1):
        name = f"{result.test.id} on {result.target}".replace("#", "\\#")
        message = " ".join(result.message.split())
        match result.verdict:
            case Verdict.PASSED:
                yield f"ok {number} - {name}"
            case Verdict.SKIPPED:
                yield f"ok {number} - {name} # SKIP {message}"
            case _:
                yield f"not ok {number} - {name}"
                yield "  ---"
                yield f"  verdict: {json.dumps(result.verdict.value)}"
                yield f"  message: {json.dumps(message)}"
                yield f"  title: {json.dumps(result.test.title)}"
                yield f"  refs: {json.dumps(list(result.test.refs))}"
                yield "  ..."
