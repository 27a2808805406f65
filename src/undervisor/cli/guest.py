"""`undervisor guest`: make, tune, harden, compare, apply and verify guests that nest."""

from __future__ import annotations

import difflib
import sys
from typing import Annotated

import typer

from undervisor.cli.check import (
    HostOption,
    JsonOption,
    RecordingOption,
    ShellOption,
    SshConfigOption,
    machine,
)
from undervisor.cli.guest_documents import (
    AS_HELP,
    Form,
    confirm,
    from_libvirt,
    load,
    local,
    put_document,
    tell,
)
from undervisor.cli.printing import console, put, put_json
from undervisor.domains import apply as applying
from undervisor.domains.connection import SYSTEM, Libvirt
from undervisor.domains.console import GREETING_SECONDS
from undervisor.domains.cpu_features import known_to_libvirt
from undervisor.domains.create import Wishes, create
from undervisor.domains.harden import Options
from undervisor.domains.harden import harden as hardened
from undervisor.domains.host_topology import medium, topology
from undervisor.domains.libvirt_xml import DomainXml
from undervisor.domains.limits import Problem, Weight, problems
from undervisor.domains.model import Boot
from undervisor.domains.nesting import View, able, lacks
from undervisor.domains.recommend import MEANING, Need
from undervisor.domains.tune import tune as tuned
from undervisor.domains.workarounds import WORKAROUNDS
from undervisor.errors import BadInput, ExitCode
from undervisor.host.access.live import LiveHost
from undervisor.host.access.protocol import Host
from undervisor.host.fact import Known, value_or
from undervisor.host.facts.processor import processor

guest = typer.Typer(no_args_is_help=True, help="Guests that run guests: definitions and proof.")

GuestArgument = Annotated[
    str, typer.Argument(help="A libvirt domain, a file of XML (its name has a / or .xml), or -.")
]
ConnectOption = Annotated[str, typer.Option("--connect", help="libvirt's URI.")]
AsOption = Annotated[Form, typer.Option("--as", help=AS_HELP)]
VendorOption = Annotated[
    str, typer.Option("--vendor", help="intel or amd; else the vendor of the host looked at.")
]
NeedOption = Annotated[
    Need, typer.Option("--for", help="; ".join(f"{n.value}: {MEANING[n]}" for n in Need))
]
YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show the plan, change nothing.")]
_AROUND = "; ".join(
    f"{w.name}{'=' if w.takes else ''}{w.takes}: {w.what}" for w in WORKAROUNDS.values()
)


@guest.command()
def new(
    name: Annotated[str, typer.Argument(help="The domain's name.")],
    need: NeedOption = Need.HERE,
    vendor: VendorOption = "",
    type_: Annotated[str, typer.Option("--type", help="kvm, or qemu (emulated).")] = "kvm",
    arch: Annotated[str, typer.Option("--arch", help="x86_64 or s390x.")] = "x86_64",
    machine_: Annotated[str, typer.Option("--machine", help="QEMU's machine type.")] = "",
    memory: Annotated[str, typer.Option("--memory", help="Such as 8G.")] = "4G",
    vcpus: Annotated[int, typer.Option("--vcpus", help="Else as other options need; 2.")] = 0,
    cpu: Annotated[
        str, typer.Option("--cpu", help="host-passthrough, host-model, maximum, or a model's name.")
    ] = "",
    check: Annotated[str, typer.Option("--check", help="none, partial or full.")] = "",
    migratable: Annotated[str, typer.Option("--migratable", help="on or off.")] = "",
    require: Annotated[str, typer.Option("--require", help="CPU features, with commas.")] = "",
    disable: Annotated[str, typer.Option("--disable", help="CPU features, with commas.")] = "",
    workaround: Annotated[list[str], typer.Option("--workaround", help=_AROUND)] = [],  # noqa: B006
    topology_: Annotated[
        str, typer.Option("--topology", help="SOCKETSxCORESxTHREADS, such as 1x4x2.")
    ] = "",
    numa: Annotated[
        list[str], typer.Option("--numa", help="VCPUS=SIZE of a NUMA node, such as 0-7=8G.")
    ] = [],  # noqa: B006
    pin: Annotated[str, typer.Option("--pin", help="A host processor for each vCPU: 0-7.")] = "",
    allow: Annotated[
        str, typer.Option("--allow", help="Host processors for all vCPUs: 0,2,4,6.")
    ] = "",
    huge_pages: Annotated[str, typer.Option("--huge-pages", help="default, 2M or 1G.")] = "",
    balloon: Annotated[
        str, typer.Option("--balloon", help="virtio, virtio@0000:00:08.0 or none.")
    ] = "",
    hard_limit: Annotated[str, typer.Option("--hard-limit", help="Of QEMU's memory.")] = "",
    soft_limit: Annotated[str, typer.Option("--soft-limit", help="Of QEMU's memory.")] = "",
    shares: Annotated[int | None, typer.Option("--shares", help="A weight, no limit.")] = None,
    period: Annotated[int | None, typer.Option("--period", help="Microseconds.")] = None,
    quota: Annotated[
        int | None, typer.Option("--quota", help="Microseconds in a period, of each vCPU.")
    ] = None,
    disk: Annotated[
        list[str],
        typer.Option("--disk", help="PATH[,format=][,cache=][,io=][,bus=][,queues=]; fat:FOLDER."),
    ] = [],  # noqa: B006
    network: Annotated[
        list[str], typer.Option("--network", help="A libvirt network, or user; [,queues=N].")
    ] = [],  # noqa: B006
    bridge: Annotated[list[str], typer.Option("--bridge", help="A bridge[,queues=N].")] = [],  # noqa: B006
    firmware: Annotated[str, typer.Option("--firmware", help="Flash images: CODE[,VARS].")] = "",
    kernel: Annotated[str, typer.Option("--kernel", help="A kernel to start directly.")] = "",
    initrd: Annotated[str, typer.Option("--initrd", help="Its initial RAM disk.")] = "",
    append: Annotated[str, typer.Option("--append", help="Its command line.")] = "",
    gdb: Annotated[bool, typer.Option("--gdb", help="QEMU's debugger port, -s.")] = False,
    agent: Annotated[bool, typer.Option(help="A channel for the guest agent.")] = True,
    host: HostOption = "",
    recording: RecordingOption = "",
    ssh_config: SshConfigOption = "",
    as_: AsOption = Form.XML,
) -> None:
    """Print a definition of a guest that nests; what was chosen, and why, goes to stderr."""
    code, _, variables = firmware.partition(",")
    wishes = Wishes(
        name=name, need=need, type=type_, architecture=arch, machine=machine_, memory=memory,
        vcpus=vcpus, cpu=cpu, check=check, migratable=migratable, require=_names(require),
        disable=_names(disable), workarounds=workaround, topology=topology_, numa=numa, pin=pin,
        allow=allow, huge_pages=huge_pages, balloon=balloon, hard_limit=hard_limit,
        soft_limit=soft_limit, shares=shares, period=period, quota=quota, disks=disk,
        networks=network, bridges=bridge, gdb=gdb, agent=agent,
        boot=Boot(code, variables, kernel, initrd, append),
    )  # fmt: skip
    with machine(host, "", recording, ssh_config) as opened:
        extension = "sie" if arch == "s390x" else _extension(vendor, opened)
        known = value_or(known_to_libvirt(opened), None)
        found = create(wishes, extension, processor(opened), known)
    tell(found.choices, problems(found.guest))
    put_document(DomainXml.new(found.guest), as_, found.choices)


@guest.command()
def tune(
    definition: GuestArgument,
    need: NeedOption = Need.HERE,
    vendor: VendorOption = "",
    connect: ConnectOption = SYSTEM,
    host: HostOption = "",
    recording: RecordingOption = "",
    ssh_config: SshConfigOption = "",
    as_: AsOption = Form.XML,
) -> None:
    """Fit a guest to the host that runs it: CPU, pins, NUMA, huge pages, disks, network.

    The definition goes to stdout, each choice with its reason to stderr.
    """
    document = load(definition, connect)
    with machine(host, "", recording, ssh_config) as opened:
        seen = topology(opened)
        extension = _extension(vendor, opened)
        paths = [d.path for d in document.guest.disks if d.path]
        found_media = {path: medium(opened, path) for path in paths}
    media = {path: fact.value for path, fact in found_media.items() if isinstance(fact, Known)}
    found = tuned(document.guest, seen, need, extension, media)
    tell(found.choices, problems(found.guest, seen))
    put_document(document.with_guest(found.guest), as_, found.choices)


@guest.command()
def harden(
    definition: GuestArgument,
    network: Annotated[
        str, typer.Option("--network", help="The isolated network to put it on.")
    ] = "isolated",
    keep_network: Annotated[
        bool, typer.Option("--keep-network", help="Leave its interfaces alone.")
    ] = False,
    cpu_percent: Annotated[
        int, typer.Option("--cpu-percent", min=1, max=100, help="Of a processor, for each vCPU.")
    ] = 100,
    connect: ConnectOption = SYSTEM,
    as_: AsOption = Form.XML,
) -> None:
    """Limits, isolation, mitigations; and what guides advise that would weaken the guest."""
    document = load(definition, connect)
    found = hardened(document.guest, Options("" if keep_network else network, cpu_percent))
    tell(found.choices, problems(found.guest))
    put_document(document.with_guest(found.guest), as_, found.choices)


@guest.command()
def show(
    definition: GuestArgument,
    connect: ConnectOption = SYSTEM,
    as_: AsOption = Form.TEXT,
) -> None:
    """Show a guest: as text, XML, JSON or a QEMU command line."""
    put_document(load(definition, connect), as_, ())


@guest.command()
def diff(
    definition: GuestArgument,
    vendor: VendorOption = "",
    connect: ConnectOption = SYSTEM,
    host: HostOption = "",
    recording: RecordingOption = "",
    ssh_config: SshConfigOption = "",
    as_json: JsonOption = False,
) -> None:
    """Say what a guest lacks for nesting, why, and which lines would change.

    Exit code 0: nothing that keeps it from being an L1. 1: something does.
    """
    document = load(definition, connect)
    with machine(host, "", recording, ssh_config) as opened:
        seen = topology(opened)
        known = value_or(known_to_libvirt(opened), None)
        extension = _extension(vendor, opened)
    host_model = from_libvirt(definition, connect)
    view = View(extension, host_model, seen, known)
    found = [*lacks(document, view), *problems(document.guest)]
    better = document.with_guest(able(document.guest, view))
    lines = list(difflib.unified_diff(document.text.splitlines(), better.text.splitlines(),
                                      "as it is", "able to nest", lineterm=""))  # fmt: skip
    if as_json:
        put_json({"guest": document.guest.name, "problems": [_problem(p) for p in found],
                  "diff": lines, "xml": better.text})  # fmt: skip
    else:
        out = console()
        for problem in found:
            put(out, f"{problem.weight.value}: {problem.what} [{problem.id}]")
            put(out, f"remedy: {problem.remedy}", indent=4)
        put(out, "\n".join(lines) if lines else f"{document.guest.name} can be an L1 as it is")
    bad = any(p.weight is Weight.REFUSED for p in found)
    raise typer.Exit(ExitCode.NEGATIVE if bad else ExitCode.OK)


def _problem(problem: Problem) -> dict[str, str]:
    return {"id": problem.id, "weight": problem.weight.value, "what": problem.what,
            "remedy": problem.remedy}  # fmt: skip


@guest.command()
def apply(
    definition: Annotated[str, typer.Argument(help="A file of XML, or -; with --undo a name.")],
    connect: ConnectOption = SYSTEM,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    undo: Annotated[
        bool, typer.Option("--undo", help="Take our last change of the domain back.")
    ] = False,
    start: Annotated[bool, typer.Option("--start", help="Start it afterwards.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Also what will not start as it is.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Define a guest with libvirt: the plan first; --undo brings the old definition back."""
    history = applying.History()
    document = None if undo else load(definition, connect, file_only=True)
    with Libvirt(connect) as libvirt:
        if document is None:
            planned = applying.plan_undo(libvirt, definition, history)
        else:
            _refuse_broken(document, connect, force)
            planned = applying.plan(libvirt, document)
        _show_plan(planned, as_json)
        if not (dry_run or planned.empty):
            confirm(yes, from_stdin=definition == "-")
            if undo:
                applying.undo(libvirt, planned, history)
            else:
                applying.apply(libvirt, planned, history)
        if start and not dry_run and not libvirt.active(planned.name):
            libvirt.start(planned.name)


@guest.command()
def remove(
    name: Annotated[str, typer.Argument(help="The domain.")],
    connect: ConnectOption = SYSTEM,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Remove a guest's definition; its disks stay, and `apply --undo` brings it back."""
    with Libvirt(connect) as libvirt:
        planned = applying.plan_removal(libvirt, name)
        _show_plan(planned, as_json)
        if not dry_run:
            confirm(yes)
            applying.apply(libvirt, planned, applying.History())


@guest.command()
def verify(
    name: Annotated[str, typer.Argument(help="A running domain, or a lab's level: lab:l1.")] = "",
    agent: Annotated[bool, typer.Option("--agent", help="Through its agent.")] = False,
    console_: Annotated[bool, typer.Option("--console", help="Through its console.")] = False,
    connect: ConnectOption = SYSTEM,
    host: HostOption = "",
    shell: ShellOption = "",
    ssh_config: SshConfigOption = "",
    wait: Annotated[
        float, typer.Option("--wait", min=1, help="Seconds that the console's shell may take.")
    ] = GREETING_SECONDS,
    as_json: JsonOption = False,
) -> None:
    """Look from inside of a guest whether it is an L1, and run a nested guest there.

    A domain is reached through its agent where it has one, else through its console; a guest of
    another kind by --host or --shell. Exit code 0: a nested guest ran. 1: it did not.
    """
    from undervisor.cli.guest_verify import inside, put_verification, verified

    with inside(name, agent, console_, connect, host, shell, ssh_config, wait) as opened:
        found = verified(opened)
    if as_json:
        put_json(found.as_json())
    else:
        put_verification(found)
    raise typer.Exit(ExitCode.OK if found.good else ExitCode.NEGATIVE)


def _names(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _extension(vendor: str, host: Host) -> str:
    """By the vendor that is named, else by that of the host."""
    from undervisor.domains.cpu_features import extension_of

    if vendor:
        return extension_of(vendor)
    found = processor(host).extension
    if not found:
        raise BadInput(f"the vendor of {host.name}'s processor is not known", hint="--vendor intel")
    return found


def _refuse_broken(document: DomainXml, connect: str, force: bool) -> None:
    """What would not start is not defined, unless it is forced."""
    seen = topology(LiveHost()) if local(connect) else None
    found = [p for p in problems(document.guest, seen) if p.weight is Weight.REFUSED]
    tell((), found)
    if found and not force:
        raise BadInput(f"it would not start: {found[0].what}", hint="repair it, or --force")


def _show_plan(planned: applying.Plan, as_json: bool) -> None:
    if as_json:
        put_json(planned.as_json())
    else:
        print("\n".join(planned.lines()))
    sys.stdout.flush()
