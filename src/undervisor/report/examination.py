"""An examination as text for a terminal, and as one line for a CI job's log."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding

from undervisor.host.checks.engine import Examination, Verdict
from undervisor.host.checks.finding import Finding, Layer, Level

MARKS: dict[Level, tuple[str, str]] = {
    Level.OK: ("ok", "green"),
    Level.NOTE: ("note", "cyan"),
    Level.WARN: ("warn", "yellow"),
    Level.UNKNOWN: ("unknown", "magenta"),
    Level.FAIL: ("FAIL", "bold red"),
}
"""How a level is written and coloured."""

_COLOURS = {Verdict.USABLE: "green", Verdict.NOT_USABLE: "bold red", Verdict.UNKNOWN: "magenta"}


def one_line(examination: Examination) -> str:
    """The verdict, the cause and its evidence in one line."""
    line = f"{examination.machine}: {examination.verdict.value}"
    if examination.cause:
        line += f": {examination.cause.kind.title} [{examination.cause.kind.id}]"
        if examination.cause.evidence:
            line += f" ({'; '.join(examination.cause.evidence[:2])})"
    return line


def print_examination(console: Console, examination: Examination) -> None:
    """The findings by layer, then the verdict and what to do first."""
    for layer in Layer:
        found = [finding for finding in examination.findings if finding.kind.layer is layer]
        if found:
            console.print(f"[bold]{layer.title}[/bold]")
        for finding in found:
            _print_finding(console, finding)
    colour = _COLOURS[examination.verdict]
    console.print(f"\n[{colour}]{escape(examination.machine)}: {examination.verdict.value}[/]")
    if examination.cause:
        console.print(f"Start with [bold]{examination.cause.kind.id}[/bold]:", highlight=False)
        remedy = Padding(escape(examination.cause.remedy), (0, 0, 0, 2), expand=False)
        console.print(remedy, highlight=False, soft_wrap=False)


def _print_finding(console: Console, finding: Finding) -> None:
    word, colour = MARKS[finding.kind.level]
    console.print(
        f"  [{colour}]{word:7}[/] {escape(finding.kind.title)} [dim]\\[{finding.kind.id}][/]",
        highlight=False,
    )
    for piece in finding.evidence:
        console.print(
            Padding(escape(piece), (0, 0, 0, 10), expand=False), style="dim", highlight=False
        )
    if finding.remedy and finding.kind.level not in (Level.OK, Level.NOTE):
        console.print(
            Padding("→ " + escape(finding.remedy), (0, 0, 0, 10), expand=False), highlight=False
        )
