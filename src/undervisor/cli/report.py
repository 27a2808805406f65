"""`undervisor report`: the evidence of all levels for a bug report, in one file."""

from __future__ import annotations

from typing import Annotated

import typer

from undervisor.cli.check import PLACES, SshConfigOption
from undervisor.errors import BadInput, ExitCode
from undervisor.host.access.opening import open_place
from undervisor.report.bundle import Bundle, contents, level, write


def report(
    path: Annotated[str, typer.Argument(help="The zip to write; nothing else is written.")],
    l0: Annotated[str, typer.Option("--l0", help=f"The host: {PLACES}")] = "",
    l1: Annotated[str, typer.Option("--l1", help=f"The guest hypervisor: {PLACES}")] = "",
    l2: Annotated[str, typer.Option("--l2", help=f"The nested guest: {PLACES}")] = "",
    ssh_config: SshConfigOption = "",
) -> None:
    """Collect what the kernel's document asks for from L0, L1 and L2, without secrets.

    Exit code 0: written and complete. 1: written, and something is missing; the table in it says
    what, and the command to get it.
    """
    places = {name: place for name, place in (("L0", l0), ("L1", l1), ("L2", l2)) if place}
    if not places:
        raise BadInput("no level was named", hint="for this machine: --l0 here (or --l1 here)")
    if not path.endswith(".zip"):
        raise BadInput(f"{path} does not end in .zip")
    levels = []
    for name, place in places.items():
        host = open_place(place, ssh_config)
        try:
            levels.append(level(name, host))
        finally:
            host.close()
    bundle = Bundle(tuple(levels))
    files, removed = contents(bundle)
    write(path, files)
    print(bundle.statement)
    print(f"wrote {path}: {len(files)} files")
    if removed:
        print("removed: " + ", ".join(f"{count} {kind}" for kind, count in removed.items()))
    gaps = bundle.gaps()
    for gap in gaps:
        print(f"missing: {gap['level']} {gap['item']} ({gap['why']}); get it with: {gap['get']}")
    raise typer.Exit(ExitCode.NEGATIVE if gaps else ExitCode.OK)
