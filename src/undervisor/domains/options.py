"""Parts of a guest from the words of a command line.  Every function raises BadInput."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from undervisor.domains.model import (
    Balloon,
    Cell,
    CpuSet,
    Disk,
    HugePages,
    Interface,
    Pinning,
    Topology,
)
from undervisor.domains.quantities import parse_cpus, parse_size
from undervisor.errors import BadInput

T = TypeVar("T")

_NAME = re.compile(r"[^\x00-\x20/\x7f](?:[^\x00-\x1f/\x7f]{0,98}[^\x00-\x20/\x7f])?")
_PCI = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]")


def guest_name(text: str) -> str:
    """A domain's name: printable, no slash, no blank at its ends."""
    if not _NAME.fullmatch(text) or text.startswith("-"):
        raise BadInput(f"{text!r} can't be the name of a domain", hint="letters, digits, - and _")
    return text


def cpu_set(text: str) -> CpuSet:
    """`0-3,8`."""
    try:
        return parse_cpus(text)
    except ValueError as error:
        raise BadInput(str(error), hint="such as 0-3,8") from error


def topology(text: str) -> Topology:
    """SOCKETSxCORESxTHREADS, such as 1x4x2."""
    match = re.fullmatch(r"(\d{1,3})x(\d{1,4})x(\d{1,2})", text)
    if not match or not all(map(int, match.groups())):
        raise BadInput(f"{text!r} is no topology", hint="SOCKETSxCORESxTHREADS, such as 1x4x2")
    sockets, cores, threads = map(int, match.groups())
    return Topology(sockets=sockets, cores=cores, threads=threads)


def cells(words: Sequence[str]) -> tuple[Cell, ...]:
    """CPUS=SIZE for each NUMA node of the guest, such as 0-7=8G."""
    found = []
    for number, word in enumerate(words):
        cpus, equals, size = word.partition("=")
        if not equals:
            raise BadInput(f"{word!r} is no NUMA node", hint="VCPUS=SIZE, such as 0-7=8G")
        found.append(Cell(number, cpu_set(cpus), parse_size(size)))
    return tuple(found)


def pinning(pin: str, allow: str, vcpus: int) -> Pinning:
    """`pin` gives each vCPU a processor of its own, in order; `allow` only says where they may
    run."""
    if pin and allow:
        raise BadInput("--pin and --allow exclude each other", hint="--pin implies the other")
    if allow:
        return Pinning("static", cpu_set(allow))
    if not pin:
        return Pinning()
    where = sorted(cpu_set(pin))
    if len(where) != vcpus:
        raise BadInput(f"{len(where)} processors for {vcpus} vCPUs", hint="a processor for each")
    pins = tuple((vcpu, frozenset({cpu})) for vcpu, cpu in enumerate(where))
    return Pinning("static", frozenset(where), pins)


def huge_pages(text: str) -> tuple[HugePages, ...] | None:
    """`default`, or a size; empty for ordinary pages."""
    if not text:
        return None
    if text == "default":
        return ()
    size = parse_size(text)
    if size not in (2048, 1 << 20):
        raise BadInput(f"{text!r} is no size of a huge page", hint="2M, 1G, or default")
    return (HugePages(size),)


def balloon(text: str) -> Balloon | None:
    """`virtio`, `virtio@0000:00:08.0` or `none`."""
    if not text:
        return None
    model, at, address = text.partition("@")
    if model not in ("virtio", "none") or (at and not _PCI.fullmatch(address)):
        raise BadInput(f"{text!r} is no balloon", hint="virtio, virtio@0000:00:08.0 or none")
    return Balloon(model, address)


_DISK_WORDS: dict[str, tuple[str, ...]] = {
    "format": ("raw", "qcow2", "qed", "vmdk", "vdi", "vhdx"),
    "cache": ("none", "writeback", "writethrough", "directsync", "unsafe"),
    "io": ("native", "threads", "io_uring"),
    "bus": ("virtio", "scsi", "sata", "ide", "usb"),
    "device": ("disk", "cdrom"),
}


def disks(words: Sequence[str]) -> tuple[Disk, ...]:
    """PATH[,format=qcow2][,cache=][,io=][,bus=][,queues=N][,target=vda]; `fat:FOLDER` is a folder
    that the guest sees as a FAT disk."""
    found: list[Disk] = []
    for word in words:
        path, settings = _settings(word, {**_DISK_WORDS, "queues": (), "target": ()}, "disk")
        bus = settings.get("bus", "virtio")
        prefix = {"virtio": "vd", "ide": "hd"}.get(bus, "sd")
        used = {disk.target for disk in found}
        free = (f"{prefix}{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")
        target = settings.get("target") or next((name for name in free if name not in used), "")
        if not re.fullmatch(r"[hsv]d[a-z]{1,2}", target) or target in used:
            raise BadInput(f"{target!r} is no free name of a disk", hint="target=vdb")
        disk = Disk(
            target=target,
            path=path,
            kind="block" if path.startswith("/dev/") else "file",
            device=settings.get("device", "disk"),
            bus=bus,
            format=settings.get("format", "raw" if path.startswith("/dev/") else "qcow2"),
            cache=settings.get("cache", ""),
            io=settings.get("io", ""),
            queues=_count(settings.get("queues", "")),
        )
        if path.startswith("fat:"):
            disk = replace(disk, path=path[4:], kind="dir", format="fat")
        if not disk.path.startswith("/"):
            raise BadInput(f"{disk.path!r} is no absolute path", hint="libvirt takes no other")
        found.append(disk)
    return tuple(found)


def interfaces(networks: Sequence[str], bridges: Sequence[str]) -> tuple[Interface, ...]:
    """Names of libvirt networks (`user`: QEMU's own NAT) and of bridges, each with [,queues=N]."""
    found = []
    for kind, words in (("network", networks), ("bridge", bridges)):
        for word in words:
            name, settings = _settings(word, {"queues": ()}, kind)
            if not re.fullmatch(r"[A-Za-z0-9_.+-]{1,50}", name):
                raise BadInput(f"{name!r} is no name of a {kind}")
            queues = _count(settings.get("queues", ""))
            driver = "vhost" if queues else ""
            real = "user" if kind == "network" and name == "user" else kind
            source = "" if real == "user" else name
            found.append(Interface(real, source, "virtio", driver, queues))
    return tuple(found)


def _settings(
    word: str, allowed: dict[str, tuple[str, ...]], what: str
) -> tuple[str, dict[str, str]]:
    """The head and the `key=value` words of an option."""
    head, *rest = word.split(",")
    found = {}
    for piece in rest:
        key, equals, value = piece.partition("=")
        if not equals or key not in allowed or (allowed[key] and value not in allowed[key]):
            choice = ", ".join(allowed.get(key, ())) or ", ".join(allowed)
            raise BadInput(f"{piece!r} is no setting of a {what}", hint=f"one of {choice}")
        found[key] = value
    if not head:
        raise BadInput(f"{word!r} names no {what}")
    return head, found


def _count(text: str) -> int | None:
    if not text:
        return None
    if not text.isdigit() or not 0 < int(text[:6]) <= 256:
        raise BadInput(f"{text!r} queues", hint="1 to 256")
    return int(text)


def one_of(text: str, allowed: Sequence[str], what: str, convert: Callable[[str], T]) -> T:
    """`text` if it is allowed, converted."""
    if text not in allowed:
        raise BadInput(f"{text!r} is no {what}", hint=", ".join(allowed))
    return convert(text)
