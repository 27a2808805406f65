"""Disks, interfaces, consoles and the rest of a guest as QEMU's options."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from undervisor.domains.model import Console, Disk, Guest, Interface

_AIO = {"threads": "threads", "native": "native", "io_uring": "io_uring"}
_DISK_DEVICES = {
    ("virtio", "disk"): "virtio-blk-pci",
    ("scsi", "disk"): "scsi-hd",
    ("scsi", "cdrom"): "scsi-cd",
    ("sata", "disk"): "ide-hd",
    ("sata", "cdrom"): "ide-cd",
    ("ide", "disk"): "ide-hd",
    ("ide", "cdrom"): "ide-cd",
    ("usb", "disk"): "usb-storage",
}
_CONTROLLERS = {"scsi": "virtio-scsi-pci", "usb": "qemu-xhci", "sata": "ich9-ahci"}
"""What the machine lacks for a disk on that bus; named, for a USB disk brings a bus scsi.0 along.
Only q35 has a SATA controller of its own, whose ports are called ide."""

_HELPER = "/usr/lib/qemu/qemu-bridge-helper"
_NETWORK_DEVICES = {"virtio": "virtio-net-pci", "": "virtio-net-pci"}


@dataclass(frozen=True, slots=True)
class Devices:
    """Options, and what they can't say."""

    argv: tuple[str, ...]
    notes: tuple[str, ...]


def quoted(text: str) -> str:
    """A value inside of an option: QEMU wants its commas doubled."""
    return text.replace(",", ",,")


def devices(guest: Guest) -> Devices:
    """All devices of `guest`."""
    argv: list[str] = []
    notes: list[str] = []
    for number in range(1, (guest.iothreads or 0) + 1):
        argv += ["-object", f"iothread,id=iothread{number}"]
    for bus, controller in _CONTROLLERS.items():
        if any(disk.bus == bus for disk in guest.disks) and not (bus == "sata" and _q35(guest)):
            argv += ["-device", f"{controller},id={bus}-controller"]
    for number, disk in enumerate(guest.disks):
        argv += _disk(number, disk, _place(number, disk, guest), notes)
    for number, interface in enumerate(guest.interfaces):
        argv += _interface(number, interface, notes)
    if guest.agent or any(c.target == "virtio" for c in guest.consoles):
        argv += ["-device", "virtio-serial-pci"]
    for number, console in enumerate(guest.consoles):
        argv += _console(number, console, notes)
    if guest.agent:
        path = f"{guest.name}-agent.sock"
        argv += ["-chardev", f"socket,id=agent,path={quoted(path)},server=on,wait=off"]
        argv += ["-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"]
        notes.append(f"the guest's agent answers at {path} in the folder of the start")
    argv += _balloon(guest)
    if guest.architecture == "s390x":  # which has channels, not PCI, for virtio
        argv = [word.replace("-pci", "-ccw", 1) if _is_virtio(word) else word for word in argv]
    return Devices(tuple(argv), tuple(notes))


def _is_virtio(word: str) -> bool:
    return word.startswith("virtio-") and word.split(",")[0].endswith("-pci")


def _q35(guest: Guest) -> bool:
    return "q35" in guest.machine


def _place(number: int, disk: Disk, guest: Guest) -> str:
    """Where a disk hangs: QEMU itself finds no free port of IDE and SATA; empty for virtio."""
    bus = disk.bus or "ide"
    if bus in ("scsi", "usb"):
        return f"bus={bus}-controller.0"
    if bus not in ("ide", "sata"):
        return ""
    before = sum((d.bus or "ide") in ("ide", "sata") for d in guest.disks[:number])
    if _q35(guest):
        return f"bus=ide.{before}"
    return (
        f"bus=sata-controller.{before}"
        if bus == "sata"
        else f"bus=ide.{before // 2},unit={before % 2}"
    )


def _disk(number: int, disk: Disk, place: str, notes: list[str]) -> Iterator[str]:
    device = _DISK_DEVICES.get((disk.bus or "ide", disk.device))
    if not disk.path or device is None:
        if disk.device != "cdrom":
            notes.append(f"disk {disk.target}: type {disk.kind} on bus {disk.bus} is not expressed")
        return
    path = f"fat:rw:{disk.path}" if disk.kind == "dir" else disk.path
    form = "raw" if disk.format == "fat" else disk.format or "raw"
    words = [f"file={quoted(path)}", "if=none", f"id=disk{number}", f"format={form}"]
    words += [f"cache={disk.cache}"] if disk.cache not in ("", "default") else []
    words += [f"aio={_AIO[disk.io]}"] if disk.io in _AIO else []
    words += ["readonly=on"] if disk.read_only or disk.device == "cdrom" else []
    yield from ("-drive", ",".join(words))
    made = [device, f"drive=disk{number}"]
    made += [place] if place else []
    made += [f"num-queues={disk.queues}"] if disk.queues and device.startswith("virtio") else []
    made += [f"iothread=iothread{disk.iothread}"] if disk.iothread else []
    yield from ("-device", ",".join(made))


def _interface(number: int, interface: Interface, notes: list[str]) -> Iterator[str]:
    back = _backend(number, interface, notes)
    if not back:
        notes.append(f"interface {number}: type {interface.kind} is not expressed")
        return
    yield from ("-netdev", back)
    words = [_NETWORK_DEVICES.get(interface.model, interface.model), f"netdev=net{number}"]
    words += [f"mac={interface.mac}"] if interface.mac else []
    if (interface.queues or 1) > 1 and interface.model in _NETWORK_DEVICES:
        # Two vectors for each pair of queues, one for control, one for configuration.
        words += ["mq=on", f"vectors={2 * (interface.queues or 1) + 2}"]
    yield from ("-device", ",".join(words))


def _backend(number: int, interface: Interface, notes: list[str]) -> str:
    name = f"id=net{number}"
    queues = interface.queues or 1
    if interface.kind == "user":
        return f"user,{name}"
    if interface.kind == "network":
        notes.append(f"QEMU knows no network {interface.source}: restrict=on keeps the guest from "
                     "everything outside, other guests included")  # fmt: skip
        return f"user,{name},restrict=on"
    if interface.kind != "bridge":
        return ""
    vhost = ",vhost=on" if interface.driver in ("vhost", "") else ",vhost=off"
    if queues == 1:
        return f"tap,{name},br={quoted(interface.source)},helper={_HELPER}{vhost}"
    tap = f"tap{number}"
    make = f"ip tuntap add {tap} mode tap multi_queue"
    notes.append(f"the bridge helper gives one queue; for {queues}, before the start: "
                 f"{make} && ip link set {tap} master {interface.source} up")  # fmt: skip
    return f"tap,{name},ifname={tap},script=no,downscript=no{vhost},queues={queues}"


def _console(number: int, console: Console, notes: list[str]) -> Iterator[str]:
    kind = console.kind
    if kind not in ("pty", "stdio", "null", "vc"):
        notes.append(f"console {number}: type {kind} needs a path; a pty stands for it")
        kind = "pty"
    if console.target == "virtio":
        yield from ("-chardev", f"{kind},id=console{number}")
        yield from ("-device", f"virtconsole,chardev=console{number}")
    else:
        yield from ("-serial", kind)


def _balloon(guest: Guest) -> Iterator[str]:
    balloon = guest.balloon
    if balloon is None or balloon.model in ("none", ""):
        return
    words = ["virtio-balloon-pci"]
    if balloon.address:
        words.append(f"addr={balloon.address.rpartition(':')[2]}")
    yield from ("-device", ",".join(words))
