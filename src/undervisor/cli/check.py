"""`undervisor check`: which layer is wrong, and what to type."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console

from undervisor.errors import BadInput, ExitCode
from undervisor.host.access.live import LiveHost
from undervisor.host.access.opening import open_host
from undervisor.host.access.protocol import Host, KvmOffer
from undervisor.host.access.shell import ShellHost
from undervisor.host.below import Below, guest_answer
from undervisor.host.below import below as what_is_below
from undervisor.host.checks.engine import Examination, Verdict, examine
from undervisor.host.checks.live import Proof
from undervisor.host.fact import Fact, Known, value_or
from undervisor.host.facts.machine import Machine, gather
from undervisor.host.facts.software import Guest
from undervisor.report.examination import one_line, print_examination

PLACES = "`here`, user@name, lab:l1, guest:NAME (its libvirt agent), or a recording's folder."
"""What the commands that look at several machines take for each."""

HostOption = Annotated[
    str, typer.Option("--host", help="A machine over SSH, user@name, or a lab's: lab:l1.")
]
GuestOption = Annotated[str, typer.Option("--guest", help="A libvirt guest, through its agent.")]
ShellOption = Annotated[
    str,
    typer.Option("--shell", help="A command that gives a plain sh: 'kubectl exec -i POD -- sh'."),
]
RecordingOption = Annotated[
    str, typer.Option("--recording", help="A folder that `undervisor record` made.")
]
SshConfigOption = Annotated[
    str, typer.Option("--ssh-config", help="An ssh configuration file with ports and keys.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@contextlib.contextmanager
def machine(
    host: str, guest: str, recording: str, ssh_config: str, shell: str = ""
) -> Iterator[Host]:
    """The machine that the options name, closed at the end."""
    opened = open_host(host, recording, guest, ssh_config, shell=shell)
    try:
        yield opened
    finally:
        opened.close()


def check(
    host: HostOption = "",
    guest: GuestOption = "",
    shell: ShellOption = "",
    recording: RecordingOption = "",
    ssh_config: SshConfigOption = "",
    security: Annotated[
        bool, typer.Option("--security", help="Also known vulnerabilities and hardening.")
    ] = False,
    inside: Annotated[
        bool, typer.Option("--inside", help="One line for a CI job inside L1: is nesting usable?")
    ] = False,
    live: Annotated[
        bool, typer.Option("--live", help="Also run a guest on /dev/kvm that runs its own.")
    ] = False,
    below: Annotated[
        str, typer.Option("--below", help="One line: is this below us? kvm, tcg, nothing, other.")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Say which layer keeps nested KVM from working, with the evidence and the remedy.

    Exit code 0: nested KVM is usable and nothing failed. 1: it is not, or it is unknown.
    With --below: 0 where that is what is below this machine, 1 otherwise.
    """
    if below and below.upper() not in Below.__members__:
        raise BadInput(f"{below!r} is nothing that can be below", hint="kvm, tcg, other, nothing")
    with machine(host, guest, recording, ssh_config, shell) as opened:
        facts = gather(opened)
        offer, proof = _proof(opened) if live else (None, None)
    answer = what_is_below(facts)
    examination = examine(facts, with_security=security, offer=offer, proof=proof)
    if as_json:
        said = examination.as_json() | answer.as_json() | {"guests": _guests(facts)}
        json.dump(said, sys.stdout, indent=2)
        print()
    elif below:
        print(f"{examination.machine} runs on {answer}")
    elif inside:
        print(one_line(examination))
    else:
        print_examination(Console(), examination)
    if below:
        raise typer.Exit(ExitCode.OK if answer.below.name == below.upper() else ExitCode.NEGATIVE)
    raise typer.Exit(exit_code(examination))


def _proof(opened: Host) -> tuple[Fact[KvmOffer], Proof | None]:
    """What KVM says, and what comes of a guest, where KVM can be asked to run one."""
    if isinstance(opened, ShellHost):
        from undervisor.cli.live_elsewhere import ask_and_prove

        return ask_and_prove(opened)
    offer = opened.kvm()
    if not (isinstance(opened, LiveHost) and isinstance(offer, Known)):
        return offer, None
    from undervisor.cli.live_proof import prove
    from undervisor.targets.kvm.target import KvmTarget

    said = offer.value
    return offer, prove(KvmTarget(), "vmx" if said.vmx else "svm" if said.svm else "")


def _guests(facts: Machine) -> list[dict[str, Any]]:
    """What this machine's own running guests run on."""
    guests: tuple[Guest, ...] = value_or(facts.software.guests, ())
    return [{"name": g.name, "pid": g.pid} | guest_answer(g).as_json() for g in guests]


def exit_code(examination: Examination) -> int:
    """0 only where the verdict is good and no check failed."""
    good = examination.verdict is Verdict.USABLE and examination.safe
    return ExitCode.OK if good else ExitCode.NEGATIVE
