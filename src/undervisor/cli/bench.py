"""`undervisor bench`: what nesting costs here, as ratios measured in one run.

With `--levels` it is what nesting costs a guest, at every level of a stack: see `bench_levels`.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Final

import typer

from undervisor.cli.check import JsonOption
from undervisor.cli.child import run_in_child
from undervisor.errors import BadInput, ExitCode

MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement: `limit` says in words what is wanted, `good` whether it is so.

    `good` is None where nothing is wanted or the other side of a ratio is missing.
    """

    name: str
    value: float
    unit: str
    limit: str = ""
    good: bool | None = None


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is done: round trips and iterations in a round, rounds, starts."""

    trips: int
    compute: int
    memory: int
    rounds: int
    exits: int
    starts: int
    turns: int
    check_seconds: float


# Which peers run a vendor's test, and the share of their time that ours may take.
TEST_LIMITS: Final = {"svm": {"qemu": 0.5, "bochs": 0.1}, "vmx": {"bochs": 0.1}}

QUICK: Final = Effort(1_000, 500_000, 30_000, 5, 5_000, 2, 3, 0.2)
FULL: Final = Effort(2_000, 2_000_000, 100_000, 7, 10_000, 5, 7, 1.0)


def bench(
    hosts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[LEVEL]...",
            help="With --levels, the outermost first: here, user@name, lab:l1, guest:NAME; "
            "l1=user@name where the first is not L0. By default this machine and a new lab.",
        ),
    ] = None,
    as_json: JsonOption = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer repetitions.")] = False,
    long: Annotated[
        bool, typer.Option("--long", help="Also a million round trips of each vendor.")
    ] = False,
    levels: Annotated[
        bool, typer.Option("--levels", help="Measure L0, L1 and L2 and compare them.")
    ] = False,
    pictures: Annotated[
        list[Path] | None,
        typer.Option("--picture", help="With --levels: also write FILE.svg or FILE.html."),
    ] = None,
) -> None:
    """Measure what nesting costs on this machine.

    Round trips are measured against raw exits of the silicon, loops in L2 against the same loops
    on the silicon, both in the same run. Exit code 0: all limits hold. 1: one is missed.

    With --levels: processor, memory, kernel, network, disk and exits at each level of a stack, as
    ratios, against the budget of 10-30 % for nesting. Under emulation none is judged.
    """
    if levels:
        from undervisor.cli.bench_levels import measure_levels

        code = measure_levels(hosts or (), quick=quick, as_json=as_json, pictures=pictures or ())
        raise typer.Exit(code)
    if hosts or pictures:
        raise BadInput("levels and pictures are for --levels", hint="undervisor bench --levels")
    effort = QUICK if quick else FULL
    raise typer.Exit(run_in_child(lambda: _run(effort, as_json=as_json, long=long)))


def _run(effort: Effort, *, as_json: bool, long: bool) -> int:
    rows: list[Row] = []
    for what, step in _steps(effort, long=long):
        print(f"measuring {what} ...", file=sys.stderr, flush=True)
        rows += step()
    if as_json:
        about = {"python": platform.python_version(), "machine": platform.machine()}
        json.dump({"about": about, "rows": [asdict(row) for row in rows]}, sys.stdout, indent=2)
        print()
    else:
        _print(rows)
    return ExitCode.NEGATIVE if any(row.good is False for row in rows) else ExitCode.OK


Step = tuple[str, Callable[[], list[Row]]]


def _steps(effort: Effort, *, long: bool) -> Iterator[Step]:
    yield "round trips", partial(_round_trips, effort)
    for kind in ("compute", "memory"):
        yield f"the {kind} loop", partial(_work, effort, kind)
    yield "process starts", partial(_starts, effort)
    yield "memory", _memory
    yield "checks of VM entry", partial(_checks, effort)
    yield "a guest test on each target", partial(_tests, effort)
    if long:
        for vendor in ("vmx", "svm"):
            yield f"a million {vendor.upper()} round trips", partial(_growth, vendor)


def _round_trips(effort: Effort) -> list[Row]:
    """Raw exits, VMX, SVM and QEMU in turn, so that what disturbs one disturbs all."""
    from undervisor.cli import measure as m

    loops = {v: m.round_trip_loop(v, effort.trips, effort.rounds) for v in ("vmx", "svm")}
    seen: dict[str, list[float]] = {"raw": [], "vmx": [], "svm": [], "qemu": []}
    for _ in range(effort.turns):
        seen["raw"].append(m.raw_exit(effort.exits))
        for vendor, loop in loops.items():
            seen[vendor].append(m.nested(loop).cpu / effort.trips)
        if (theirs := m.on_qemu(loops["svm"])) is not None:
            seen["qemu"].append(theirs.cpu / effort.trips)
    ratio = _ratio(seen["vmx"], seen["raw"])
    rows = [
        Row("raw silicon exit", median(seen["raw"]) * 1e6, "µs"),
        Row("VMX round trip", median(seen["vmx"]) * 1e6, "µs"),
        Row("VMX round trip / raw exit", ratio, "", "at most 12", ratio <= 12),
        Row("SVM round trip", median(seen["svm"]) * 1e6, "µs"),
        Row("SVM round trip / raw exit", _ratio(seen["svm"], seen["raw"]), ""),
    ]
    return rows + _against_qemu(seen["svm"], seen["qemu"])


def _against_qemu(ours: list[float], theirs: list[float]) -> list[Row]:
    if not theirs:
        return [Row("SVM round trip on QEMU TCG: not measured, no QEMU here", 0, "", "")]
    if not all(theirs):
        return [Row("SVM round trip on QEMU TCG: too short for its clock to see", 0, "", "")]
    ratio = _ratio(ours, theirs)
    return [
        Row("SVM round trip on QEMU TCG", median(theirs) * 1e6, "µs"),
        Row("SVM round trip / QEMU's", ratio, "", "less than 1", ratio < 1),
    ]


def _ratio(ones: list[float], others: list[float]) -> float:
    """The median of the ratios of what was measured next to each other."""
    return median(one / other for one, other in zip(ones, others, strict=True))


def _work(effort: Effort, kind: str) -> list[Row]:
    from undervisor.cli import measure as m

    count = effort.compute if kind == "compute" else effort.memory
    raw, speeds = [], dict[str, list[float]](vmx=[], svm=[])
    for _ in range(effort.turns):
        for vendor, found in speeds.items():
            raw.append(m.raw_loop(m.work_loop(kind, count, effort.rounds)).cpu)
            nested = m.nested(m.work_loop(kind, count, effort.rounds, vendor)).cpu
            found.append(raw[-1] / nested)
    rows = [Row(f"{kind} loop on raw silicon", median(raw) / count * 1e9, "ns/iteration")]
    for vendor, found in speeds.items():
        speed = median(found)
        name = f"{kind} loop in L2 ({vendor.upper()}), speed / raw silicon"
        rows.append(Row(name, speed, "", "at least 0.9", speed >= 0.9))
    return rows


def _starts(effort: Effort) -> list[Row]:
    from undervisor.cli import measure as m

    rows = []
    for vendor in ("vmx", "svm"):
        spent = min(m.first_l2(vendor, effort.starts))
        name = f"process start to first L2 instruction ({vendor.upper()})"
        rows.append(Row(name, spent, "s", "under 0.5 s", spent < 0.5))
    return rows


def _memory() -> list[Row]:
    from undervisor.cli import measure as m

    size = max(m.example_resident(vendor, 4) for vendor in ("svm", "vmx")) / MIB
    return [Row("resident memory beside guest RAM", size, "MiB", "under 200 MB", size < 190.7)]


def _checks(effort: Effort) -> list[Row]:
    from undervisor.cli import measure as m

    rates = m.checks(effort.check_seconds)
    full, incremental = rates.full, rates.incremental
    return [
        Row("VM-entry checks, every rule", full, "states/s", "at least 5,000", full >= 5_000),
        Row("VM-entry checks, every rule / a plain pass over the fields", rates.plain / full, ""),
        Row(
            "VM-entry checks, after a write of guest RIP",
            incremental,
            "states/s",
            "at least 50,000",
            incremental >= 50_000,
        ),
    ]


def _tests(effort: Effort) -> list[Row]:
    """Boot the probe and run one test, on our L0 and on its peers in turn."""
    from undervisor.cli import measure as m

    rows = []
    for vendor, peers in TEST_LIMITS.items():
        seen = m.one_test(vendor, list(peers), effort.turns)
        ours = seen.pop("builtin")
        rows.append(Row(f"probe and one {vendor.upper()} test", median(ours) * 1e3, "ms"))
        for peer, times in seen.items():
            if not times:
                rows.append(Row(f"the same on {peer}: not measured, it is not here", 0, ""))
                continue
            ratio, most = _ratio(ours, times), peers[peer]
            rows.append(Row(f"the same on {peer}", median(times) * 1e3, "ms"))
            rows.append(Row(f"ours / {peer}'s", ratio, "", f"at most {most}", ratio <= most))
    return rows


def _growth(vendor: str) -> list[Row]:
    from undervisor.cli import measure as m

    grown = m.growth(vendor, 1_000_000) / MIB
    name = f"growth over a million {vendor.upper()} round trips"
    return [Row(name, grown, "MiB", "none (under 1 MiB)", grown < 1)]


def _print(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("measurement", title="undervisor bench", title_justify="left")
    table.add_column("value", justify="right")
    table.add_column("unit")
    table.add_column("wanted")
    table.add_column("")
    for row in rows:
        value = f"{row.value:,.0f}" if row.value >= 1000 else f"{row.value:.3g}"
        word = {True: "[green]ok[/]", False: "[red]miss[/]", None: ""}[row.good]
        table.add_row(row.name, value, row.unit, row.limit, word)
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 110)
    console.print(table)
