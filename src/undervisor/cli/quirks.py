"""`undervisor quirks`, and the suite's own tests: `undervisor test --quirks` and `--mutants`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Final

import typer

from undervisor.cli.printing import console, put, put_json, table
from undervisor.cli.progress import counted_work, errors_console

if TYPE_CHECKING:
    from undervisor.conformance.proof import Caught
    from undervisor.conformance.runner import Result
    from undervisor.hypervisor.quirks import Quirk
    from undervisor.hypervisor.quirks.mutants import Mutant

CPUS: Final = {"vmx": "intel", "svm": "amd"}
ENOUGH: Final = 0.9
"""The share of mutants that must be killed."""


def quirks(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the ways in which the built-in L0 can be made wrong (`--quirk NAME` of other verbs)."""
    from undervisor.conformance.catches import CATCHES
    from undervisor.hypervisor.quirks.catalogue import CATALOGUE

    if as_json:
        put_json([_quirk_data(quirk) for quirk in CATALOGUE.values()])
        return
    out = console()
    for quirk in CATALOGUE.values():
        put(out, quirk.name, style="bold")
        put(out, quirk.about, indent=4)
        put(out, f"seen: {quirk.source}", indent=4, style="dim")
        put(out, f"caught by {', '.join(c.test for c in CATCHES[quirk.name])}", indent=4)


def _quirk_data(quirk: Quirk) -> dict[str, object]:
    from undervisor.conformance.catches import CATCHES

    return {
        "name": quirk.name,
        "about": quirk.about,
        "source": quirk.source,
        "caught_by": [asdict(catch) for catch in CATCHES[quirk.name]],
    }


# -- every quirk by its own test ----------------------------------------------------------------


def prove_quirks(names: Sequence[str], jobs: int, *, as_json: bool) -> bool:
    """Run each quirk's own tests under it; whether each was caught for the right reason."""
    from undervisor.conformance.catches import CATCHES
    from undervisor.conformance.proof import catch
    from undervisor.hypervisor.quirks import named
    from undervisor.hypervisor.quirks.catalogue import CATALOGUE
    from undervisor.targets.builtin import BuiltinTarget

    wanted = named(names) if names else list(CATALOGUE.values())
    found: list[tuple[Quirk, list[Caught]]] = []
    with _begun("quirks", len(wanted)) as step:
        for quirk in wanted:
            step(quirk.name)
            rows: list[Caught] = []
            for vendor, cpu in CPUS.items():
                mine = [c for c in CATCHES[quirk.name] if c.test.startswith(vendor)]
                if mine:
                    rows += catch(BuiltinTarget(cpu, [quirk.name]), mine, jobs)
            found.append((quirk, rows))
    good = all(rows and all(row.good for row in rows) for _, rows in found)
    if as_json:
        put_json([_proof_data(quirk, rows) for quirk, rows in found])
        return good
    out = console()
    made = table("quirk", "its test", "verdict", "what the test said")
    for quirk, rows in found:
        for row in rows:
            made.add_row(quirk.name, row.catch.test, _word(row), _said(row))
    out.print(made)
    caught = sum(bool(rows) and all(row.good for row in rows) for _, rows in found)
    put(out, f"{caught} of {len(found)} quirks are caught by their own tests")
    return good


def _word(row: Caught) -> str:
    if row.good:
        return "caught"
    if row.result is None:
        return "NO SUCH TEST"
    return "NOT CAUGHT" if row.result.verdict.good else "WRONG REASON"


def _said(row: Caught) -> str:
    return row.result.message if row.result is not None else ""


def _proof_data(quirk: Quirk, rows: Sequence[Caught]) -> dict[str, object]:
    return _quirk_data(quirk) | {
        "catches": [
            {"test": row.catch.test, "caught": row.good, "message": _said(row)} for row in rows
        ]
    }


# -- mutants ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fate:
    """A mutant and the result that killed it; None where it lives."""

    mutant: Mutant
    killer: Result | None


def prove_mutants(count: int, seed: int, jobs: int, *, as_json: bool) -> bool:
    """Run the suite on `count` random mutants; whether enough of them are killed."""
    from undervisor.conformance.proof import kill
    from undervisor.hypervisor.quirks.mutants import PREFIX, sample
    from undervisor.targets.builtin import BuiltinTarget

    fates = []
    mutants = sample(count, seed)
    with _begun("mutants", len(mutants)) as step:
        for mutant in mutants:
            step(mutant.where)
            target = BuiltinTarget(CPUS[mutant.vendor], [f"{PREFIX}{mutant.number}"])
            fates.append(Fate(mutant, kill(target, mutant.vendor, mutant.where, jobs)))
    killed = [fate for fate in fates if fate.killer is not None]
    share = len(killed) / len(fates)
    if as_json:
        put_json({"seed": seed, "score": share, "mutants": [_fate_data(f) for f in fates]})
        return share >= ENOUGH
    out = console()
    made = table("mutant", "change", "killed by")
    for fate in fates:
        made.add_row(
            str(fate.mutant.number),
            fate.mutant.where,
            fate.killer.test.id if fate.killer is not None else "LIVES",
        )
    out.print(made)
    put(out, f"{len(killed)} of {len(fates)} mutants killed: {share:.0%} (seed {seed})")
    return share >= ENOUGH


def _fate_data(fate: Fate) -> dict[str, object]:
    killer = fate.killer
    return {
        "mutant": fate.mutant.number,
        "change": fate.mutant.where,
        "killed_by": killer.test.id if killer is not None else None,
        "message": killer.message if killer is not None else "",
    }


@contextmanager
def _begun(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """Progress by what is begun: a bar on a terminal, a line each elsewhere."""
    out = errors_console()
    with counted_work(out, what, total, begun=True) as step:

        def begin(name: str) -> None:
            step(name)
            if not out.is_terminal:
                print(f"{what}: {name}", file=sys.stderr, flush=True)

        yield begin
