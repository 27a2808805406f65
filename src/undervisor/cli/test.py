"""`undervisor test`: the conformance suite on one target or several."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NoReturn

import typer

from undervisor.cli.printing import console, put, put_json
from undervisor.errors import BadInput, ExitCode

if TYPE_CHECKING:
    from undervisor.conformance.runner import Result
    from undervisor.conformance.suite import GuestTest
    from undervisor.targets import Target

MOST_REPEATS: Final = 10_000


@dataclass(frozen=True, slots=True)
class Campaign:
    """The tests of one target."""

    target: Target
    tests: tuple[GuestTest, ...]


def test(
    patterns: Annotated[
        list[str] | None,
        typer.Argument(help="Parts of tests' names, or patterns with *; all without."),
    ] = None,
    on: Annotated[
        list[str] | None,
        typer.Option("--on", help="The target: builtin, qemu, bochs, kvm, lab; may be repeated."),
    ] = None,
    cpu: Annotated[
        list[str] | None,
        typer.Option("--cpu", help="A CPU model of the target; may be repeated."),
    ] = None,
    quirk: Annotated[
        list[str] | None,
        typer.Option("--quirk", help="Make the built-in L0 wrong in this way; may be repeated."),
    ] = None,
    repeat: Annotated[int, typer.Option("--repeat", help="Run each test so many times.")] = 1,
    jobs: Annotated[
        int, typer.Option("--jobs", help="Machines at a time; 0: one for each processor.")
    ] = 0,
    quirks: Annotated[
        bool,
        typer.Option("--quirks", help="Test the suite: each quirk's own tests must fail under it."),
    ] = False,
    mutants: Annotated[
        int, typer.Option("--mutants", help="Test the suite: how many random mutants does it kill?")
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Which random mutants.")] = 0,
    show: Annotated[bool, typer.Option("--list", help="Only list the tests.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    junit: Annotated[
        Path | None, typer.Option("--junit", help="Also write JUnit XML to this file.")
    ] = None,
    pages: Annotated[
        Path | None,
        typer.Option("--pages", help="Write the comparison of the targets into this folder."),
    ] = None,
    tap: Annotated[
        bool, typer.Option("--tap", help="Print the Test Anything Protocol, version 14.")
    ] = False,
) -> None:
    """Test whether nested virtualization is right: guest tests on an L0, with the manual's words.

    Without options, all tests on the built-in L0, VMX on its Intel model and SVM on its AMD model.
    Exit code 0: every test passed or was skipped, and one passed at least. 1: one did not.
    """
    from undervisor.conformance import results, suite

    if not 1 <= repeat <= MOST_REPEATS:
        raise BadInput(f"--repeat {repeat}: 1 to {MOST_REPEATS} times")
    if as_json and tap:
        raise BadInput("--json and --tap both want standard output", hint="give one of them")
    if quirks or mutants:
        _prove(quirk or [], quirks, mutants, seed, jobs, as_json=as_json)
    tests = suite.select(patterns or ())
    if show:
        _list(tests, as_json=as_json)
        return
    found: list[Result] = []
    begin = time.monotonic()
    for campaign in _campaigns(tests, on or ["builtin"], cpu or [], quirk or []):
        found += _run(campaign, repeat, jobs)
    if junit is not None:
        _write(junit, results.as_junit(found))
    if pages is not None:
        _write_pages(pages, found)
    if as_json:
        print(results.as_json(found))
    elif tap:
        print("\n".join(results.as_tap(found)))
    else:
        if len(on or ()) > 1:
            _compare(found)
        _summarize(found, time.monotonic() - begin)
    raise typer.Exit(ExitCode.OK if results.all_good(found) else ExitCode.NEGATIVE)


def _prove(
    names: Sequence[str], quirks: bool, mutants: int, seed: int, jobs: int, *, as_json: bool
) -> NoReturn:
    """The suite's own tests; never returns."""
    from undervisor.cli.quirks import prove_mutants, prove_quirks

    if mutants < 0:
        raise BadInput(f"--mutants {mutants}: a number of mutants")
    good = not quirks or prove_quirks(names, jobs, as_json=as_json)
    if mutants:
        good = prove_mutants(mutants, seed, jobs, as_json=as_json) and good
    raise typer.Exit(ExitCode.OK if good else ExitCode.NEGATIVE)


def _list(tests: Sequence[GuestTest], *, as_json: bool) -> None:
    if as_json:
        put_json([{"test": t.id, "title": t.title, "refs": list(t.refs)} for t in tests])
        return
    out = console()
    for item in tests:
        put(out, item.id, style="bold")
        put(out, item.title, indent=4)
        put(out, "; ".join(item.refs), indent=4, style="dim")


def _campaigns(
    tests: Iterable[GuestTest], names: Sequence[str], cpus: Sequence[str], quirks: Sequence[str]
) -> list[Campaign]:
    """What to run where: on each target and model, the tests of the vendor that it has."""
    from undervisor.targets import catalogue

    campaigns = []
    for name in names:
        for cpu in cpus or catalogue.default_cpus(name):
            target = catalogue.named(name, cpu, quirks)
            mine = tuple(t for t in tests if t.vendor in target.abilities.vendors)
            if mine:
                campaigns.append(Campaign(target, mine))
    if not campaigns:
        raise BadInput(
            f"none of these tests is for what {', '.join(names)} has",
            hint="VMX tests need a model with VMX, SVM tests one with SVM: see --cpu",
        )
    return campaigns


def _run(campaign: Campaign, repeat: int, jobs: int) -> list[Result]:
    """Run a campaign with progress on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from undervisor.conformance.runner import run_all

    tests = [test for test in campaign.tests for _ in range(repeat)]
    out = Console(stderr=True, highlight=False)
    begin = time.monotonic()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[last]}"),
    )
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as progress:
        task = progress.add_task(campaign.target.name, total=len(tests), last="")

        def seen(result: Result) -> None:
            progress.update(task, advance=1, last=result.test.id)
            if not result.verdict.good:
                out.print(
                    f"{result.verdict.value}: {result.test.id} on {result.target}",
                    markup=False,
                    soft_wrap=True,
                )

        found = run_all(tests, campaign.target, jobs=jobs, seen=seen)
    seconds = time.monotonic() - begin
    out.print(f"{campaign.target.name}: {_counted(found)} in {seconds:.1f} s", markup=False)
    return found


def _summarize(found: Sequence[Result], seconds: float) -> None:
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
    put(out, f"{_counted(found)} in {seconds:.1f} s")


def _alike(result: Result) -> Iterator[str]:
    """The known bugs that make a test fail in this way."""
    from undervisor.conformance.catches import CATCHES
    from undervisor.hypervisor.quirks import CATALOGUE

    for name, catches in CATCHES.items():
        if any(c.test == result.test.id and c.words in result.message for c in catches):
            quirk = CATALOGUE[name]
            yield f"as the known bug {name}: {quirk.about} (seen: {quirk.source})"


def _compare(found: Sequence[Result]) -> None:
    """One table: a row a test, a column a target."""
    from undervisor.cli.printing import table
    from undervisor.conformance.compare import compare

    comparison = compare(found)
    made = table("test", *comparison.columns)
    for row in comparison.rows:
        made.add_row(row.test.id, *(row.sign(column) for column in comparison.columns))
    console().print(made)


def _write_pages(folder: Path, found: Sequence[Result]) -> None:
    """The table, a page for each disagreement, the record; pages of an earlier run go."""
    from undervisor.cli.versions import version_of
    from undervisor.conformance.compare import compare
    from undervisor.conformance.record import Record

    comparison = compare(found)
    command = shlex.join(["undervisor", *sys.argv[1:]])
    versions = {column: version_of(column) for column in comparison.columns}
    made = dict(Record(comparison, command, versions).files())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.md"):
            if old.name not in made and old.name.startswith(("vmx.", "svm.")):
                old.unlink()
    except OSError as error:
        raise BadInput(f"{folder} cannot be used: {error.strerror}") from None
    for name, text in made.items():
        _write(folder / name, text, tell=False)
    print(f"written: {len(made)} files in {folder}", file=sys.stderr)


def _counted(found: Sequence[Result]) -> str:
    from undervisor.conformance import results

    totals = results.counts(found)
    return ", ".join(f"{number} {verdict.value}" for verdict, number in totals.items()) or "no test"


def _write(path: Path, text: str, *, tell: bool = True) -> None:
    """The whole file or none of it."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise BadInput(f"{path} cannot be written: {error.strerror}") from None
    if tell:
        print(f"written: {path}", file=sys.stderr)
