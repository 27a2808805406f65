"""Where definitions of guests come from and in which forms they are printed."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any
from urllib.parse import urlparse

import typer
from rich.table import Table

from undervisor.cli.printing import console, put, put_json
from undervisor.domains.choice import Choice
from undervisor.domains.connection import Libvirt
from undervisor.domains.libvirt_xml import DomainXml
from undervisor.domains.limits import Problem
from undervisor.domains.model import Guest
from undervisor.domains.qemu_command import qemu_command
from undervisor.domains.quantities import show_cpus, show_size
from undervisor.domains.safe_xml import SIZE_LIMIT
from undervisor.domains.schema import violations
from undervisor.errors import BadInput, ExitCode
from undervisor.host.fact import Absent, Known


class Form(StrEnum):
    """How a definition is printed."""

    XML = "xml"
    QEMU = "qemu"
    JSON = "json"
    TEXT = "text"


AS_HELP = "xml (libvirt's), qemu (a command line), json (everything), text (for people)."


def load(word: str, connect: str, *, file_only: bool = False) -> DomainXml:
    """The definition that `word` means.  Raises BadInput."""
    if word == "-":
        return DomainXml.parse(sys.stdin.buffer.read(SIZE_LIMIT + 1))
    if file_only or is_file(word):
        return DomainXml.parse(read_file(word))
    with Libvirt(connect) as libvirt:
        return libvirt.document(word)


def is_file(word: str) -> bool:
    """Whether a word means a file rather than a domain."""
    return "/" in word or word.endswith(".xml")


def read_file(path: str) -> bytes:
    """A file, up to one byte more than a definition may have.  Raises BadInput."""
    try:
        with open(path, "rb") as file:
            return file.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from error


def local(connect: str) -> bool:
    """Whether libvirt's URI means QEMU on this machine."""
    parts = urlparse(connect)
    return parts.scheme.split("+")[0] == "qemu" and not parts.netloc


def from_libvirt(word: str, connect: str) -> Mapping[str, str] | None:
    """host-model's features where the definition came from libvirt; None where it is a file."""
    if word == "-" or is_file(word):
        return None
    with Libvirt(connect) as libvirt:
        return libvirt.capabilities().host_model


def confirm(yes: bool, *, from_stdin: bool = False) -> None:
    """Ask the operator; BadInput where nobody is there."""
    if yes:
        return
    if from_stdin or not sys.stdin.isatty():
        raise BadInput("nobody is there to ask", hint="add --yes, or --dry-run to look only")
    if not typer.confirm("Apply it?"):
        raise typer.Exit(ExitCode.NEGATIVE)


def tell(choices: Iterable[Choice], problems: Iterable[Problem]) -> None:
    """Choices and problems on stderr, so that stdout stays a definition."""
    for choice in choices:
        print(f"{choice.outcome.value}: {choice.what} [{choice.id}]", file=sys.stderr)
        print(f"    why: {choice.why}", file=sys.stderr)
        if choice.command:
            print(f"    type: {choice.command}", file=sys.stderr)
    for problem in problems:
        print(problem, file=sys.stderr)


def put_document(document: DomainXml, form: Form, choices: Sequence[Choice]) -> None:
    """Print a definition."""
    guest = document.guest
    if form is Form.XML:
        _validate(document)
        sys.stdout.write(document.text)
    elif form is Form.QEMU:
        command = qemu_command(guest)
        for note in [*command.notes, *_unexpressed(document)]:
            print(f"note: {note}", file=sys.stderr)
        print(command.text)
    elif form is Form.JSON:
        command = qemu_command(guest)
        put_json(
            {
                "guest": _plain(dataclasses.asdict(guest)),
                "xml": document.text,
                "qemu": {
                    "prefix": list(command.prefix),
                    "argv": list(command.argv),
                    "notes": [*command.notes, *_unexpressed(document)],
                },
                "choices": [choice.as_json() for choice in choices],
            }
        )
    else:
        _put_text(guest)


def _validate(document: DomainXml) -> None:
    """What libvirt's schema says; a definition that it refuses is printed all the same."""
    fact = violations(document.text, "domain")
    if isinstance(fact, Absent):
        print(f"note: not validated, {fact}", file=sys.stderr)
    elif isinstance(fact, Known):
        for line in fact.value:
            print(f"schema: {line}", file=sys.stderr)


_DEVICES = {"disk", "interface", "console", "serial", "memballoon", "emulator"}
_PARTS = {"name", "uuid", "title", "description", "metadata", "memory", "currentMemory", "vcpu",
          "memoryBacking", "iothreads", "cputune", "memtune", "numatune", "os", "cpu", "features",
          "on_poweroff", "on_reboot", "on_crash", "resource", "devices"}  # fmt: skip
_FEATURES = {"acpi", "apic", "pae"}


def _unexpressed(document: DomainXml) -> list[str]:
    """What of the definition our command line leaves out, by its elements."""
    root = document.root
    found = [child.tag for child in root if child.tag not in _PARTS]
    for path, known in (("devices", _DEVICES), ("features", _FEATURES)):
        parent = root.find(path)
        found += [] if parent is None else [c.tag for c in parent if c.tag not in known]
    tags = [tag for tag in found if isinstance(tag, str) and not tag.startswith("{")]
    if document.guest.agent:
        tags.remove("channel")  # the agent's
    return [f"not expressed: <{tag}> ({tags.count(tag)})" for tag in sorted(set(tags))]


def _plain(value: Any) -> Any:
    if isinstance(value, frozenset):
        return show_cpus(value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if k != "ordinal"}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _put_text(guest: Guest) -> None:
    out = console()
    rows = Table.grid(padding=(0, 2, 0, 0))
    for title, text in _rows(guest):
        if text:
            rows.add_row(title, text)
    put(out, f"{guest.name} ({guest.type})")
    out.print(rows, markup=False)


def _rows(guest: Guest) -> Iterable[tuple[str, str]]:
    cpu, memory = guest.cpu, guest.memory
    yield "CPU", f"{cpu.mode.value or 'of the machine'} {cpu.model}".strip()
    yield "features", ", ".join(f"{name} {policy.value}" for name, policy in cpu.features)
    shape = cpu.topology
    yield (
        "vCPUs",
        str(guest.vcpus)
        + (
            f": {shape.sockets} sockets, {shape.cores} cores, {shape.threads} threads"
            if shape
            else ""
        ),
    )
    yield "pins", ", ".join(f"{v} on {show_cpus(where)}" for v, where in guest.pinning.vcpus)
    pages = "" if memory.huge is None else ", huge pages of " + (
        ", ".join(show_size(p.size) for p in memory.huge) or "the default size")  # fmt: skip
    yield "memory", show_size(memory.size) + pages
    limits = guest.memory_limits
    yield "memory limit", "" if limits.hard is None else show_size(limits.hard)
    quota = guest.cpu_limits.quota
    yield "CPU limit", "" if quota is None else f"{quota} of {guest.cpu_limits.period} us"
    for disk in guest.disks:
        yield (
            f"disk {disk.target}",
            " ".join((disk.path or disk.kind, disk.format, disk.cache, disk.io)),
        )
    for interface in guest.interfaces:
        words = (interface.kind, interface.source, interface.model, interface.driver)
        yield "network", " ".join(words)
