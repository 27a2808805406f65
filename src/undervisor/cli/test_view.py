"""What `undervisor test` shows: progress, what failed and why, targets side by side."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from undervisor.cli.printing import console, put, put_json, table
from undervisor.cli.progress import counted_work, errors_console

if TYPE_CHECKING:
    from undervisor.conformance.runner import Result
    from undervisor.conformance.suite import GuestTest
    from undervisor.targets import Target


def list_tests(tests: Sequence[GuestTest], *, as_json: bool) -> None:
    """Each test: its name, what it demands, the manual's sections."""
    if as_json:
        put_json([{"test": t.id, "title": t.title, "refs": list(t.refs)} for t in tests])
        return
    out = console()
    for item in tests:
        put(out, item.id, style="bold")
        put(out, item.title, indent=4)
        put(out, "; ".join(item.refs), indent=4, style="dim")


@contextmanager
def asking(name: str) -> Iterator[None]:
    """A spinner on standard error while a target says what it can do: some start a machine."""
    from rich.console import Console

    with Console(stderr=True).status(f"{name}: what can it do?"):
        yield


def run_shown(tests: Sequence[GuestTest], target: Target, jobs: int) -> list[Result]:
    """Run tests on a target with progress, and what fails at once, on standard error."""
    from undervisor.conformance.runner import run_all

    out = errors_console()
    begin = time.monotonic()
    with counted_work(out, target.name, len(tests)) as step:

        def seen(result: Result) -> None:
            step(result.test.id)
            if not result.verdict.good:
                out.print(
                    f"{result.verdict.value}: {result.test.id} on {result.target}",
                    markup=False,
                    soft_wrap=True,
                )

        found = run_all(tests, target, jobs=jobs, seen=seen)
    seconds = time.monotonic() - begin
    out.print(f"{target.name}: {counted(found)} in {seconds:.1f} s", markup=False)
    return found


def summarize(found: Sequence[Result], seconds: float) -> None:
    """What failed, with the manual's words; what was skipped, and why; the totals."""
    from undervisor.conformance.known import explain

    out = console()
    for result in found:
        if result.verdict.good:
            continue
        put(out, f"{result.verdict.value}: {result.test.id} on {result.target}", style="bold red")
        put(out, result.test.title, indent=4)
        put(out, "; ".join(result.test.refs), indent=4, style="dim")
        put(out, f"→ {result.message}", indent=4)
        for line in _alike(result):
            put(out, line, indent=4)
        if (known := explain(result)) is not None:
            put(out, f"known: {known.what} {known.evidence}", indent=4, style="dim")
        for line in result.details.splitlines():
            put(out, line, indent=6, style="dim")
    reasons: dict[str, list[str]] = {}
    for result in found:
        if not result.message or result.verdict.value != "skipped":
            continue
        reasons.setdefault(f"{result.target}: {result.message}", []).append(result.test.id)
    for reason, names in reasons.items():
        put(out, f"skipped {len(names)} on {reason}", style="yellow")
        put(out, ", ".join(dict.fromkeys(names)), indent=4, style="dim")
    put(out, f"{counted(found)} in {seconds:.1f} s")


def _alike(result: Result) -> Iterator[str]:
    """The known bugs that make a test fail in this way."""
    from undervisor.conformance.catches import CATCHES
    from undervisor.hypervisor.quirks.catalogue import CATALOGUE

    for name, catches in CATCHES.items():
        if any(c.test == result.test.id and c.words in result.message for c in catches):
            quirk = CATALOGUE[name]
            yield f"as the known bug {name}: {quirk.about} (seen: {quirk.source})"


def show_compared(found: Sequence[Result]) -> None:
    """One table: a row a test, a column a target."""
    from undervisor.conformance.compare import compare

    comparison = compare(found)
    made = table("test", *comparison.columns)
    for row in comparison.rows:
        made.add_row(row.test.id, *(row.sign(column) for column in comparison.columns))
    console().print(made)


def counted(found: Sequence[Result]) -> str:
    """How often each verdict came, in words."""
    from undervisor.conformance import results

    totals = results.counts(found)
    return ", ".join(f"{number} {verdict.value}" for verdict, number in totals.items()) or "no test"
