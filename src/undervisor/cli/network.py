"""`undervisor network`: isolated libvirt networks for guests that nest."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Annotated

import typer

from undervisor.cli.check import JsonOption
from undervisor.cli.guest import ConnectOption, DryRunOption, YesOption
from undervisor.cli.guest_documents import confirm, is_file, local, read_file
from undervisor.cli.printing import console, put, put_json, table
from undervisor.domains.connection import SYSTEM, Libvirt
from undervisor.domains.limits import Problem, Weight
from undervisor.domains.network import Network, from_xml, isolated, problems, to_xml
from undervisor.domains.schema import violations
from undervisor.errors import BadInput
from undervisor.host.access.live import LiveHost
from undervisor.host.fact import Known

network = typer.Typer(no_args_is_help=True, help="Isolated networks for guests that nest.")

AddressOption = Annotated[
    str, typer.Option("--address", help="The bridge's own address, with the network's length.")
]
BridgeOption = Annotated[
    str, typer.Option("--bridge", help="The bridge's name; libvirt picks one where it is empty.")
]
_ADDRESS = "192.168.100.1/24"


@network.command()
def new(
    name: Annotated[str, typer.Argument(help="The network's name.")] = "isolated",
    address: AddressOption = _ADDRESS,
    bridge: BridgeOption = "",
) -> None:
    """Print the XML of an isolated network, its limits checked."""
    made = isolated(name, address, bridge)
    _refuse(problems(made), force=False)
    fact = violations(to_xml(made), "network")
    if isinstance(fact, Known) and fact.value:
        raise BadInput(f"libvirt's schema refuses it: {fact.value[0]}")
    sys.stdout.write(to_xml(made))


@network.command()
def up(
    name: Annotated[str, typer.Argument(help="A network, or a file of XML.")] = "isolated",
    address: AddressOption = _ADDRESS,
    bridge: BridgeOption = "",
    autostart: Annotated[bool, typer.Option(help="Start it with the host.")] = True,
    connect: ConnectOption = SYSTEM,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    force: Annotated[bool, typer.Option("--force", help="Also one that leads out.")] = False,
) -> None:
    """Define a network where it is not, start it, and start it with the host."""
    with Libvirt(connect) as libvirt:
        text, exists = _definition(libvirt, name, address, bridge)
        wanted = from_xml(text)
        runs = libvirt.networks().get(wanted.name, False)
        _refuse(problems(wanted, LiveHost() if local(connect) and not runs else None), force)
        steps = [] if exists else [f"define the network {wanted.name}:\n{text}"]
        steps += [] if runs else [f"start {wanted.name}"]
        steps.append(f"{'start' if autostart else 'do not start'} it with the host")
        print("\n".join(steps), flush=True)
        if dry_run:
            return
        confirm(yes)
        if not exists:
            libvirt.define_network(text)
        libvirt.start_network(wanted.name, autostart)


@network.command()
def remove(
    name: Annotated[str, typer.Argument(help="The network.")],
    connect: ConnectOption = SYSTEM,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
) -> None:
    """Stop a network and remove its definition; refused while guests are defined on it."""
    with Libvirt(connect) as libvirt:
        text = libvirt.network_text(name)
        users = [domain for domain in libvirt.domains()
                 if any(i.kind == "network" and i.source == name
                        for i in libvirt.document(domain).guest.interfaces)]  # fmt: skip
        if users:
            raise BadInput(f"{', '.join(users[:5])} use the network {name}",
                           hint="change or remove them first")  # fmt: skip
        print(f"stop and remove the network {name}:\n{text}", flush=True)
        if not dry_run:
            confirm(yes)
            libvirt.remove_network(name)


@network.command()
def show(
    name: Annotated[str, typer.Argument(help="A network; all where it is left out.")] = "",
    connect: ConnectOption = SYSTEM,
    as_json: JsonOption = False,
) -> None:
    """Show networks: whether each runs, and whether it is isolated."""
    with Libvirt(connect) as libvirt:
        active = libvirt.networks()
        names = [name] if name else sorted(active)
        found = [(from_xml(libvirt.network_text(n)), active.get(n, False)) for n in names]
    if as_json:
        put_json([_as_json(*row) for row in found])
        return
    rows = table("network", "runs", "isolated", "bridge", "address")
    for one, runs in found:
        rows.add_row(one.name, "yes" if runs else "no", "no" if one.forward else "yes", one.bridge,
                     str(one.address or ""))  # fmt: skip
    out = console()
    out.print(rows, markup=False)
    for one, _ in found:
        for problem in problems(one):
            put(out, f"{one.name}: {problem}")


def _definition(libvirt: Libvirt, name: str, address: str, bridge: str) -> tuple[str, bool]:
    """The XML that is meant, and whether libvirt has it."""
    if is_file(name):
        text = read_file(name).decode("utf-8", "replace")
        return text, from_xml(text).name in libvirt.networks()
    if name in libvirt.networks():
        return libvirt.network_text(name), True
    return to_xml(isolated(name, address, bridge)), False


def _refuse(found: Iterable[Problem], force: bool) -> None:
    """Problems go to stderr; what can't work, or is not isolated, ends the command."""
    for problem in found:
        print(problem, file=sys.stderr)
        if problem.weight is Weight.REFUSED or (problem.weight is Weight.WARN and not force):
            raise BadInput(problem.what, hint=problem.remedy)


def _as_json(one: Network, runs: bool) -> dict[str, object]:
    return {
        "name": one.name,
        "runs": runs,
        "isolated": not one.forward,
        "bridge": one.bridge,
        "address": str(one.address or ""),
        "problems": [str(problem) for problem in problems(one)],
    }
