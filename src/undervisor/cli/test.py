"""`undervisor test`: the conformance suite on one target or several."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NoReturn

import typer

from undervisor.cli.test_files import write, write_pages
from undervisor.cli.test_view import asking, list_tests, run_shown, show_compared, summarize
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
        typer.Option("--pages", help="Write the comparison into this folder, or renew part of it."),
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
        list_tests(tests, as_json=as_json)
        return
    found: list[Result] = []
    begin = time.monotonic()
    for campaign in _campaigns(tests, on or ["builtin"], cpu or [], quirk or []):
        repeated = [test for test in campaign.tests for _ in range(repeat)]
        found += run_shown(repeated, campaign.target, jobs)
    if junit is not None:
        write(junit, results.as_junit(found))
    if pages is not None:
        write_pages(pages, found)
    if as_json:
        print(results.as_json(found))
    elif tap:
        print("\n".join(results.as_tap(found)))
    else:
        if len(on or ()) > 1:
            show_compared(found)
        summarize(found, time.monotonic() - begin)
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


def _campaigns(
    tests: Iterable[GuestTest], names: Sequence[str], cpus: Sequence[str], quirks: Sequence[str]
) -> list[Campaign]:
    """What to run where: on each target and model, the tests of the vendor that it has."""
    from undervisor.targets import catalogue

    campaigns = []
    for name in names:
        for cpu in cpus or catalogue.default_cpus(name):
            target = catalogue.named(name, cpu, quirks)
            with asking(target.name):
                vendors = target.abilities.vendors
            mine = tuple(t for t in tests if t.vendor in vendors)
            if mine:
                campaigns.append(Campaign(target, mine))
    if not campaigns:
        raise BadInput(
            f"none of these tests is for what {', '.join(names)} has",
            hint="VMX tests need a model with VMX, SVM tests one with SVM: see --cpu",
        )
    return campaigns
