"""A domain definition as libvirt has it: read into a `Guest`, changed without losing anything.

    document = DomainXml.parse(text)
    changed = document.with_guest(dataclasses.replace(document.guest, vcpus=8))
    print(changed.text)

Writing changes only what the new guest says otherwise: elements and attributes that we do not
know, comments and order stay.  Source: libvirt, "Domain XML format".
"""

from __future__ import annotations

import copy
from functools import cached_property

from lxml import etree

from undervisor.domains import xml_cpu, xml_devices, xml_memory, xml_processors
from undervisor.domains import xml_tree as x
from undervisor.domains.model import Boot, Guest
from undervisor.domains.safe_xml import parse, to_text
from undervisor.domains.xml_tree import Element
from undervisor.errors import BadInput

QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
"""The namespace of words for QEMU's command line."""

_ARGUMENT = f"{{{QEMU_NAMESPACE}}}arg"
_COMMAND = f"{{{QEMU_NAMESPACE}}}commandline"
_BOOT = {"loader": "loader", "nvram": "nvram", "kernel": "kernel", "initrd": "initrd",
         "append": "cmdline"}  # fmt: skip


class DomainXml:
    """One document; immutable, a change gives another."""

    def __init__(self, root: Element) -> None:
        self._root = root

    @classmethod
    def parse(cls, raw: bytes | str) -> DomainXml:
        """A document from outside; BadInput says what is wrong with it."""
        document = cls(parse(raw, "domain"))
        _ = document.guest
        return document

    @classmethod
    def new(cls, guest: Guest) -> DomainXml:
        """A new document that says `guest`."""
        namespaces = {"qemu": QEMU_NAMESPACE} if guest.extra else None
        root = etree.Element("domain", {"type": guest.type}, namespaces)
        for path, text in (("name", guest.name), ("memory", str(guest.memory.size))):
            x.put(root, path, text)
        x.ensure(root, "memory").set("unit", "KiB")
        system = x.make(x.ensure(root, "os"), "type")
        system.text = "hvm"
        if guest.architecture == "x86_64":
            features = x.ensure(root, "features")
            for tag in ("acpi", "apic"):
                x.make(features, tag)
        x.ensure(root, "devices")
        x.put(root, "vcpu", str(guest.vcpus))
        return cls(root).with_guest(guest)

    @cached_property
    def guest(self) -> Guest:
        """What the document says, as far as the model goes."""
        root = self._root
        return Guest(
            name=x.text_of(root, "name"),
            memory=xml_memory.read(root),
            type=root.get("type") or "",
            vcpus=xml_processors.read_count(root),
            architecture=x.attribute(root, "os/type", "arch"),
            machine=x.attribute(root, "os/type", "machine"),
            cpu=xml_cpu.read(root),
            pinning=xml_processors.read_pinning(root),
            iothreads=x.number(root, "iothreads"),
            memory_limits=xml_memory.read_limits(root),
            cpu_limits=xml_processors.read_limits(root),
            boot=Boot(**{key: x.text_of(root, f"os/{tag}") for key, tag in _BOOT.items()}),
            disks=xml_devices.read_disks(root),
            interfaces=xml_devices.read_interfaces(root),
            consoles=xml_devices.read_consoles(root),
            agent=xml_devices.read_agent(root),
            balloon=xml_devices.read_balloon(root),
            extra=tuple(a.get("value") or "" for a in root.iterfind(f"{_COMMAND}/{_ARGUMENT}")),
        )

    def with_guest(self, guest: Guest) -> DomainXml:
        """The document that says `guest`, and everything else as this one does."""
        if not guest.name:
            raise BadInput("a domain needs a name")
        root = copy.deepcopy(self._root.getroottree()).getroot()
        if guest.name != x.text_of(root, "name"):
            x.put(root, "name", guest.name)
        x.put_attribute(root, ".", "type", guest.type)
        xml_memory.write(root, guest.memory)
        xml_processors.write_count(root, guest.vcpus)
        x.put_number(root, "iothreads", guest.iothreads)
        xml_processors.write_limits(root, guest.cpu_limits)
        xml_processors.write_pinning(root, guest.pinning, guest.vcpus)
        xml_memory.write_limits(root, guest.memory_limits)
        _write_system(root, guest)
        xml_cpu.write(root, guest.cpu)
        xml_devices.write(root, guest)
        _write_extra(root, guest.extra)
        return DomainXml(root)

    @property
    def uuid(self) -> str:
        """The domain's UUID; empty where it has none yet."""
        return x.text_of(self._root, "uuid")

    def with_uuid(self, uuid: str) -> DomainXml:
        """With another UUID: libvirt knows a domain by it, not by its name."""
        root = copy.deepcopy(self._root.getroottree()).getroot()
        x.put(root, "uuid", uuid)
        return DomainXml(root)

    @property
    def text(self) -> str:
        """The document."""
        return to_text(self._root)

    @property
    def root(self) -> Element:
        """A copy of the tree, to look at what the model does not hold."""
        return copy.deepcopy(self._root.getroottree()).getroot()


def _write_system(root: Element, guest: Guest) -> None:
    """<os>: type, machine, firmware, kernel."""
    x.put_attribute(root, "os/type", "arch", guest.architecture)
    x.put_attribute(root, "os/type", "machine", guest.machine)
    new_loader = guest.boot.loader and root.find("os/loader") is None
    for key, tag in _BOOT.items():
        value = getattr(guest.boot, key)
        if value != x.text_of(root, f"os/{tag}"):
            x.put(root, f"os/{tag}", value or None)
    if new_loader:
        loader = x.ensure(root, "os/loader")
        loader.set("readonly", "yes")
        loader.set("type", "pflash")


def _write_extra(root: Element, words: tuple[str, ...]) -> None:
    command = root.find(_COMMAND)
    has = () if command is None else tuple(a.get("value") or "" for a in command.iter(_ARGUMENT))
    if has == words:
        return
    if command is None:
        command = etree.Element(_COMMAND, nsmap={"qemu": QEMU_NAMESPACE})
        x.place(root, command)
    for argument in command.findall(_ARGUMENT):
        command.remove(argument)
    for word in words:
        x.place(command, etree.Element(_ARGUMENT, value=word))
    if not len(command):
        x.drop(command)
