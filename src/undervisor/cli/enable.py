"""`undervisor enable` and `disable`: switch nesting on or off, now and for good."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from undervisor.errors import BadInput, ExitCode
from undervisor.host.access.live import LiveHost
from undervisor.host.access.opening import open_host
from undervisor.host.facts.machine import gather
from undervisor.host.fixes.apply import System, apply, undo, undo_plan
from undervisor.host.fixes.nested import plan_nested, plan_root
from undervisor.host.fixes.plan import Plan

DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan and change nothing.")]
Undo = Annotated[bool, typer.Option("--undo", help="Take back what was changed before.")]
Later = Annotated[
    bool, typer.Option("--later", help="Only the configuration; leave the loaded module alone.")
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
Root = Annotated[
    str, typer.Option("--root", help="Another system's root folder; its kernel is not running.")
]
ModuleName = Annotated[
    str, typer.Option("--module", help="With --root: kvm_intel (the default), kvm_amd or kvm.")
]
Facts = Annotated[
    str, typer.Option("--recording", help="Plan for a recorded machine; needs --dry-run.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")]


def enable(
    dry_run: DryRun = False,
    undo: Undo = False,
    later: Later = False,
    yes: Yes = False,
    root: Root = "/",
    module: ModuleName = "",
    recording: Facts = "",
    as_json: AsJson = False,
) -> None:
    """Switch nesting on: reload the module, and configure it for every later start."""
    _switch(True, dry_run, undo, later, yes, root, module, recording, as_json)


def disable(
    dry_run: DryRun = False,
    undo: Undo = False,
    later: Later = False,
    yes: Yes = False,
    root: Root = "/",
    module: ModuleName = "",
    recording: Facts = "",
    as_json: AsJson = False,
) -> None:
    """Switch nesting off: reload the module, and configure it for every later start."""
    _switch(False, dry_run, undo, later, yes, root, module, recording, as_json)


def _switch(
    on: bool,
    dry: bool,
    back: bool,
    later: bool,
    yes: bool,
    root: str,
    module: str,
    recording: str,
    json_: bool,
) -> None:
    if recording and not dry:
        raise BadInput("a recorded machine can't be changed", hint="add --dry-run")
    if module not in ("", "kvm_intel", "kvm_amd", "kvm"):
        raise BadInput(
            f"{module!r} is no module of KVM", hint="kvm_intel, kvm_amd, or kvm on s390x"
        )
    system = System(root)
    plan = undo_plan(system) if back else _plan(on, later, root, module, recording)
    if json_:
        json.dump(plan.as_json(), sys.stdout, indent=2)
        print()
    else:
        print("\n".join(plan.lines()))
    if plan.refusal:
        raise typer.Exit(ExitCode.NEGATIVE)
    if dry or plan.empty:
        raise typer.Exit(ExitCode.OK)
    _confirm(yes)
    if back:
        undo(system, print)
    else:
        apply(plan, system, print)
    raise typer.Exit(ExitCode.OK)


def _plan(on: bool, later: bool, root: str, module: str, recording: str) -> Plan:
    """The plan for this machine, a recorded one, or the system in a folder."""
    if recording:
        host = open_host(recording=recording)
        return plan_nested(host, gather(host), on, now=not later)
    if root != "/":
        return plan_root(LiveHost(root), module or "kvm_intel", on)
    machine = gather(LiveHost())
    return plan_nested(LiveHost(), machine, on, now=not later)


def _confirm(yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise BadInput("nobody is there to ask", hint="add --yes, or --dry-run to look only")
    if not typer.confirm("Apply it?"):
        raise typer.Exit(ExitCode.NEGATIVE)
