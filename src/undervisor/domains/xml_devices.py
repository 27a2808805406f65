"""libvirt's <devices>: disks, interfaces, consoles, the agent's channel and the balloon."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from undervisor.domains import xml_tree as x
from undervisor.domains.model import Balloon, Console, Disk, Guest, Interface
from undervisor.domains.xml_tree import Element

Part = TypeVar("Part", Disk, Interface, Console)

AGENT = "org.qemu.guest_agent.0"
_DISK_SOURCE = {"file": "file", "block": "dev", "dir": "dir"}
_NET_SOURCE = {"network": "network", "bridge": "bridge", "direct": "dev"}
_PCI = ("domain", "bus", "slot", "function")


def read_disks(root: Element) -> tuple[Disk, ...]:
    """The disks, in the document's order."""
    return tuple(_disk(e, at) for at, e in enumerate(root.findall("devices/disk")))


def read_interfaces(root: Element) -> tuple[Interface, ...]:
    """The network interfaces, in the document's order."""
    return tuple(_interface(e, at) for at, e in enumerate(root.findall("devices/interface")))


def read_consoles(root: Element) -> tuple[Console, ...]:
    """Serial ports and other consoles."""
    return tuple(
        Console(e.get("type") or "pty", _target(e), at) for at, e in enumerate(_consoles(root))
    )


def read_agent(root: Element) -> bool:
    """Whether there is a channel for the guest agent."""
    return _agent(root) is not None


def read_balloon(root: Element) -> Balloon | None:
    """The balloon; None where none is named, which for libvirt means virtio."""
    element = root.find("devices/memballoon")
    return None if element is None else Balloon(element.get("model") or "", _address(element))


def write(root: Element, guest: Guest) -> None:
    """Make <devices> say what `guest` has."""
    disks, interfaces = root.findall("devices/disk"), root.findall("devices/interface")
    _write_list(root, lambda _: "disk", guest.disks, disks, _write_disk)
    _write_list(root, lambda _: "interface", guest.interfaces, interfaces, _write_interface)
    ports = root.find("devices/serial") is not None

    def tag(console: Console) -> str:
        return "serial" if ports and console.target == "serial" else "console"

    _write_list(root, tag, guest.consoles, _consoles(root), _write_console)
    agent = _agent(root)
    if guest.agent and agent is None:
        channel = x.make(x.ensure(root, "devices"), "channel", type="unix")
        x.make(channel, "target", type="virtio", name=AGENT)
    elif not guest.agent and agent is not None:
        x.drop(agent)
    _write_balloon(root, guest.balloon)


def _write_list(
    root: Element,
    tag: Callable[[Part], str],
    parts: Sequence[Part],
    elements: Sequence[Element],
    write_one: Callable[[Element, Part], None],
) -> None:
    def create(at: int) -> Element:
        return x.make(x.ensure(root, "devices"), tag(parts[at]))

    matched = x.match_by_ordinal(elements, [p.ordinal for p in parts], create)
    for part, element in zip(parts, matched, strict=True):
        write_one(element, part)


def _disk(e: Element, ordinal: int) -> Disk:
    kind = e.get("type") or "file"
    return Disk(
        target=x.attribute(e, "target", "dev"),
        path=x.attribute(e, "source", _DISK_SOURCE[kind]) if kind in _DISK_SOURCE else "",
        kind=kind,
        device=e.get("device") or "disk",
        bus=x.attribute(e, "target", "bus"),
        format=x.attribute(e, "driver", "type"),
        cache=x.attribute(e, "driver", "cache"),
        io=x.attribute(e, "driver", "io"),
        queues=x.number_attribute(e, "driver", "queues"),
        iothread=x.number_attribute(e, "driver", "iothread"),
        read_only=e.find("readonly") is not None,
        ordinal=ordinal,
    )


def _write_disk(e: Element, disk: Disk) -> None:
    has = _disk(e, disk.ordinal)
    new = not len(e) and not e.attrib
    if has == disk and not new:
        return
    if new or has.kind != disk.kind:
        e.set("type", disk.kind)
    if new or has.device != disk.device:
        e.set("device", disk.device)
    said = (disk.format, disk.cache, disk.io, disk.queues, disk.iothread)
    if any(said) and e.find("driver") is None:
        x.make(e, "driver", name="qemu")
    for name, value in (("type", disk.format), ("cache", disk.cache), ("io", disk.io)):
        x.put_attribute(e, "driver", name, value)
    x.put_number_attribute(e, "driver", "queues", disk.queues)
    x.put_number_attribute(e, "driver", "iothread", disk.iothread)
    if disk.kind in _DISK_SOURCE:
        x.put_attribute(e, "source", _DISK_SOURCE[disk.kind], disk.path)
    x.put_attribute(e, "target", "dev", disk.target)
    x.put_attribute(e, "target", "bus", disk.bus)
    if disk.read_only and not has.read_only:
        x.make(e, "readonly")
    elif has.read_only and not disk.read_only:
        x.drop(x.ensure(e, "readonly"))


def _interface(e: Element, ordinal: int) -> Interface:
    kind = e.get("type") or ""
    return Interface(
        kind=kind,
        source=x.attribute(e, "source", _NET_SOURCE[kind]) if kind in _NET_SOURCE else "",
        model=x.attribute(e, "model", "type"),
        driver=x.attribute(e, "driver", "name"),
        queues=x.number_attribute(e, "driver", "queues"),
        mac=x.attribute(e, "mac", "address"),
        ordinal=ordinal,
    )


def _write_interface(e: Element, interface: Interface) -> None:
    has = _interface(e, interface.ordinal)
    if has == interface and e.get("type"):
        return
    if has.kind != interface.kind:
        source = e.find("source")
        if source is not None:
            e.remove(source)
        e.set("type", interface.kind)
    if interface.mac != has.mac:
        x.put_attribute(e, "mac", "address", interface.mac)
    if interface.kind in _NET_SOURCE:
        x.put_attribute(e, "source", _NET_SOURCE[interface.kind], interface.source)
    x.put_attribute(e, "model", "type", interface.model)
    x.put_attribute(e, "driver", "name", interface.driver)
    x.put_number_attribute(e, "driver", "queues", interface.queues)


def _consoles(root: Element) -> list[Element]:
    """Serial ports, then consoles; where there are ports, the first console is one of them."""
    ports, consoles = root.findall("devices/serial"), root.findall("devices/console")
    if ports and consoles and x.attribute(consoles[0], "target", "type") in ("serial", ""):
        consoles = consoles[1:]
    return ports + consoles


def _target(element: Element) -> str:
    """What the guest sees; a port's own type (isa-serial, pci-serial) is a serial port to us."""
    if element.tag == "serial":
        return "serial"
    return x.attribute(element, "target", "type") or "serial"


def _write_console(e: Element, console: Console) -> None:
    if (e.get("type") or "pty") != console.kind or not (e.attrib or len(e)):
        e.set("type", console.kind)
    if _target(e) != console.target:
        x.put_attribute(e, "target", "type", console.target)


def _agent(root: Element) -> Element | None:
    for channel in root.findall("devices/channel"):
        if x.attribute(channel, "target", "name") == AGENT:
            return channel
    return None


def _address(element: Element) -> str:
    """A PCI address in the usual form; empty where it is of another kind or not said."""
    if x.attribute(element, "address", "type") != "pci":
        return ""
    words = [x.attribute(element, "address", part) or "0" for part in _PCI]
    if not all(re.fullmatch(r"(0x)?[0-9a-fA-F]{1,4}", word) for word in words):
        return ""
    domain, bus, slot, function = (int(word, 16) for word in words)
    return f"{domain:04x}:{bus:02x}:{slot:02x}.{function:x}"


def _write_balloon(root: Element, balloon: Balloon | None) -> None:
    if read_balloon(root) == balloon:
        return
    element = root.find("devices/memballoon")
    if balloon is None:
        if element is not None:
            x.drop(element)
        return
    if element is None:
        element = x.make(x.ensure(root, "devices"), "memballoon")
    x.put_attribute(element, ".", "model", balloon.model)
    if _address(element) != balloon.address:
        old = element.find("address")
        if old is not None:
            element.remove(old)
        if balloon.address:
            numbers = re.split(r"[:.]", balloon.address)
            words = {p: f"0x{n}" for p, n in zip(_PCI, numbers, strict=True)}
            x.make(element, "address", type="pci", **words)
