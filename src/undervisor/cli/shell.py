"""`undervisor shell`: a Python prompt on the probe."""

from __future__ import annotations

import sys
from typing import Annotated, Final

import typer

from undervisor.cli.run import check_cpus
from undervisor.errors import BadInput

LONGEST: Final = 3600.0


def shell(
    on: Annotated[
        str, typer.Option("--on", help="The target: builtin, qemu, bochs, kvm.")
    ] = "builtin",
    cpu: Annotated[
        str, typer.Option("--cpu", help="A CPU model of the target; its first one by default.")
    ] = "",
    cpus: Annotated[int, typer.Option("--cpus", help="Processors, 1 to 8.")] = 1,
    quirk: Annotated[
        list[str] | None,
        typer.Option("--quirk", help="Make the built-in L0 wrong in this way; may be repeated."),
    ] = None,
    command: Annotated[
        str | None, typer.Option("-c", help="Execute this in place of the prompt.")
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", help="Seconds that an answer of the machine may take.")
    ] = 10.0,
) -> None:
    """Drive a processor by hand: every VMX and SVM instruction as a Python function.

    On a terminal, a prompt with completion and history; else a script on standard input.

    Exit code of a script: 0 when it ran to its end; 1: a statement raised, or the processor
    refused; 2: bad input; 4: the machine died; 6: no answer in time; 8: the target died.
    """
    check_cpus(cpus)
    if not 0 < timeout <= LONGEST:
        raise BadInput(f"--timeout {timeout:g}", hint="seconds, more than 0 and at most an hour")

    from undervisor.shell.console import interact, run_script
    from undervisor.shell.machine import Machine
    from undervisor.shell.namespace import Namespace
    from undervisor.targets import catalogue

    machine = Machine(catalogue.named(on, cpu, quirk or ()), cpus, timeout)
    try:
        space = Namespace(machine)
        if command is not None:
            code = run_script(command, space.names, "-c")
        elif sys.stdin.isatty():
            interact(space.names, space.banner())
            code = 0
        else:
            code = run_script(sys.stdin.read(), space.names, "stdin")
    finally:
        machine.close()
    raise typer.Exit(code)
