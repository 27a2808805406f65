"""`undervisor migrate`: may this guest move, be saved, be restored?"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding

from undervisor.cli.check import PLACES, JsonOption, SshConfigOption
from undervisor.errors import BadInput, ExitCode
from undervisor.host.access.opening import open_place
from undervisor.host.facts.machine import gather
from undervisor.host.migration.capabilities import vmx_msrs
from undervisor.host.migration.judge import Move, Side, Verdict, judge
from undervisor.host.migration.rules import Case

_COLOURS = {
    Verdict.SAFE: "green",
    Verdict.SAFE_IF: "cyan",
    Verdict.RISKY: "yellow",
    Verdict.UNKNOWN: "magenta",
    Verdict.UNSAFE: "bold red",
}


def migrate(
    source: Annotated[str, typer.Argument(help=f"The machine: {PLACES}")],
    destination: Annotated[str, typer.Argument(help="The same; equal to SOURCE for a snapshot.")],
    case: Annotated[
        str, typer.Option("--case", help=f"One of {', '.join(c.word for c in Case)}; else all.")
    ] = "",
    ssh_config: SshConfigOption = "",
    as_json: JsonOption = False,
) -> None:
    """Judge live migration, snapshots and save/restore of guests that nest or are nested.

    SOURCE and DESTINATION are the machines whose KVM runs the guest before and after: hosts for an
    L1, L1s for an L2. Exit code 0: safe, or safe under the conditions shown. 1: anything else;
    without --case that of an L1 with running L2 guests decides.
    """
    chosen = [c for c in Case if case in ("", c.word)]
    if not chosen:
        raise BadInput(f"no case {case!r}", hint=", ".join(c.word for c in Case))
    here = _side("source", source, ssh_config)
    there = _side("destination", destination, ssh_config)
    moves = [judge(here, there, c) for c in chosen]
    if as_json:
        json.dump([move.as_json() for move in moves], sys.stdout, indent=2)
        print()
    else:
        for move in moves:
            _print(Console(), move)
    good = moves[0].verdict in (Verdict.SAFE, Verdict.SAFE_IF)
    raise typer.Exit(ExitCode.OK if good else ExitCode.NEGATIVE)


def _side(role: str, word: str, ssh_config: str) -> Side:
    """Read one machine, and call it by its role: recordings have no names."""
    host = open_place(word, ssh_config)
    try:
        machine = gather(host)
        return Side(
            dataclasses.replace(machine, name=f"{role}, {machine.name}"), vmx_msrs(host, machine)
        )
    finally:
        host.close()


def _print(console: Console, move: Move) -> None:
    colour = _COLOURS[move.verdict]
    console.print(f"{move.case.title}: [{colour}]{move.verdict.value}[/]", highlight=False)
    for finding in move.findings:
        console.print(
            f"  {finding.kind.level.value:7} {escape(finding.kind.title)} "
            f"[dim]\\[{finding.kind.id}][/]",
            highlight=False,
        )
        for piece in finding.evidence:
            console.print(
                Padding(escape(piece), (0, 0, 0, 10), expand=False), style="dim", highlight=False
            )
        if finding.remedy:
            console.print(
                Padding("→ " + escape(finding.remedy), (0, 0, 0, 10), expand=False), highlight=False
            )
        if finding.kind.sources:
            text = "source: " + "; ".join(finding.kind.sources)
            console.print(
                Padding(escape(text), (0, 0, 0, 10), expand=False), style="dim", highlight=False
            )
