"""`undervisor lab`: real Linux levels under each other's KVM, for looking at and working in."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undervisor.cli.printing import console, put, put_json, table
from undervisor.errors import BadInput, ExitCode

if TYPE_CHECKING:
    from undervisor.lab.progress import Progress
    from undervisor.lab.stack import Lab

lab = typer.Typer(
    help="Real Linux levels: L1 with its own KVM, L2 under it, L3 under that.",
    no_args_is_help=True,
)

DepthOption = Annotated[int, typer.Option("--depth", help="Levels: 2 or 3.")]
SmpOption = Annotated[int, typer.Option("--smp", help="Processors of each level.")]
NameArgument = Annotated[str, typer.Argument(help="The lab's name.")]
NameOption = Annotated[str, typer.Option("--name", help="The lab's name.")]
PythonOption = Annotated[bool, typer.Option("--with-python", help="Python and this toolkit in L1.")]
AcceleratorOption = Annotated[
    str, typer.Option("--accel", help="kvm or tcg, for L1; by default what can nest here.")
]
KernelOption = Annotated[
    Path | None, typer.Option("--kernel", help="A bzImage, in place of the distribution's.")
]
ModulesOption = Annotated[Path | None, typer.Option("--modules", help="The folder of its modules.")]
BusyboxOption = Annotated[Path | None, typer.Option("--busybox", help="A static busybox.")]
InitramfsOption = Annotated[
    Path | None,
    typer.Option("--initramfs", help="An archive beneath the lab's, in each level."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@lab.command()
def run(
    depth: DepthOption = 2,
    smp: SmpOption = 1,
    with_python: PythonOption = False,
    accel: AcceleratorOption = "",
    kernel: KernelOption = None,
    modules: ModulesOption = None,
    busybox: BusyboxOption = None,
    initramfs: InitramfsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Build a lab, start every level, prove that each runs under the KVM of the one outside, end.

    Exit code 0: proven. 1: a claim does not hold. 4: a level died. 6: a level took too long.
    """
    from undervisor.lab.plan import Plan
    from undervisor.lab.stack import Lab

    plan = Plan(depth, smp, with_python, accel, kernel, modules, busybox, initramfs)
    with drawn_progress() as progress, Lab(plan=plan, progress=progress) as made:
        said = _prove(made, progress)
    raise typer.Exit(_tell(said, as_json))


@lab.command()
def up(
    name: NameArgument = "lab",
    depth: DepthOption = 2,
    smp: SmpOption = 1,
    with_python: PythonOption = False,
    accel: AcceleratorOption = "",
    kernel: KernelOption = None,
    modules: ModulesOption = None,
    busybox: BusyboxOption = None,
    initramfs: InitramfsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Start a lab that runs on in the background, until `lab down`."""
    from undervisor.lab.plan import Plan
    from undervisor.lab.stack import Lab

    plan = Plan(depth, smp, with_python, accel, kernel, modules, busybox, initramfs)
    with drawn_progress() as progress:
        made = Lab(name=name, plan=plan, progress=progress).start()
        try:
            said = _prove(made, progress)
            made.keep()
        except BaseException:
            made.close()
            raise
    code = _tell(said, as_json)
    if not as_json:
        out = console()
        put(out, f"it runs: undervisor lab sh l2 --name {name}; undervisor lab down {name}")
    raise typer.Exit(code)


@lab.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def sh(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[LEVEL] [COMMAND]...", help="l1, l2, ...; what to run there."),
    ] = None,
    name: NameOption = "lab",
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds for a command.")] = 60.0,
) -> None:
    """Run a command in a level of a running lab, or give its console: Ctrl-] leaves it.

    The exit code is that of the command.
    """
    from undervisor.cli.lab_console import attach
    from undervisor.lab.host import parse_level
    from undervisor.lab.stack import Lab

    words = words or []
    found = Lab.attach(name)
    number = parse_level(words[0] if words else "l1", found.depth)
    if not words[1:]:
        attach(found.place, number)
        raise typer.Exit(ExitCode.OK)
    command = words[1] if len(words) == 2 else shlex.join(words[1:])
    with found:
        answer = found.level(number).run(command, timeout)
    sys.stdout.write(answer.stdout)
    if answer.stderr:  # the shell there takes the last newline off
        print(answer.stderr, file=sys.stderr)
    raise typer.Exit(answer.status)


@lab.command()
def down(name: NameArgument = "lab") -> None:
    """End a lab: power off, and what does not end in time is killed."""
    from undervisor.lab.places import Place
    from undervisor.lab.stack import end

    if not end(Place.named(name)):
        raise BadInput(f"the lab {name} does not run")
    print(f"the lab {name} has ended")
    raise typer.Exit(ExitCode.OK)


@lab.command("ls")
def list_labs(as_json: JsonOption = False) -> None:
    """The labs of this user that run."""
    from undervisor.lab.places import all_places

    found = [
        {"name": place.name, "folder": str(place.folder), **place.record()}
        for place in all_places()
        if place.runs()
    ]
    if as_json:
        put_json(found)
    elif not found:
        print("no lab runs")
    else:
        rows = table("name", "depth", "processors", "L1 on", "keeper", "folder")
        for row in found:
            keys = ("name", "depth", "cpus", "accelerator", "pid", "folder")
            rows.add_row(*(str(row.get(key, "")) for key in keys))
        console().print(rows)
    raise typer.Exit(ExitCode.OK)


# -- what the commands share -----------------------------------------------------------------------


def _prove(made: Lab, progress: Progress) -> dict[str, Any]:
    """The steps, the facts and the verdict."""
    import time

    from undervisor.lab import evidence

    with progress.working("asking every level"):
        start = time.monotonic()
        proof = evidence.gather(made)
        seconds = {step.name: round(step.seconds, 3) for step in made.steps}
        seconds["proof"] = round(time.monotonic() - start, 3)
    said = {"accelerator": made.accelerator, "seconds": seconds, **proof.as_json()}
    made.note(seconds=seconds, proven=proof.proven)
    return said


def _tell(said: dict[str, Any], as_json: bool) -> int:
    from undervisor.cli.lab_view import show

    if as_json:
        put_json(said)
    else:
        show(console(), said)
    return ExitCode.OK if said["proven"] else ExitCode.NEGATIVE


@contextmanager
def drawn_progress() -> Iterator[Progress]:
    """Drawn on stderr, where that is a terminal."""
    from undervisor.cli.lab_view import Drawn
    from undervisor.lab.progress import SILENT

    if not sys.stderr.isatty():
        yield SILENT
        return
    with Drawn() as drawn:
        yield drawn
