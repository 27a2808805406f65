"""The command lines of QEMU: of the host's, which is L0, and of the one inside each level."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from undervisor.host.access import kvm_device
from undervisor.host.access.protocol import KvmOffer
from undervisor.host.fact import Fact, Known
from undervisor.lab import vmm
from undervisor.lab.images import Images
from undervisor.lab.plan import Plan
from undervisor.lab.ports import CONSOLE, carried, of_lab, port

KVM: Final = "kvm"
TCG: Final = "tcg"

EMULATED_CPU: Final = "EPYC,+svm,-xsave"
"""The nearest to hardware that TCG emulates with SVM.  Its XSAVE has a size that makes the kernel
of L2 complain, so it has none."""
_MOST_PORTS: Final = 31
_DISK: Final = "/dev/vda"

# No RTC costs Linux three seconds of polling; ACPI is how a kernel without CONFIG_VIRTIO_MMIO_
# CMDLINE_DEVICES finds the devices of a microvm.
_MICROVM: Final = "microvm,acpi=on,rtc=on"


def accelerator(plan: Plan, offer: Fact[KvmOffer] | None = None) -> str:
    """KVM where this host's offers nesting to a guest, else TCG; or what the plan says."""
    if plan.accelerator:
        return plan.accelerator
    known = kvm_device.ask() if offer is None else offer
    usable = isinstance(known, Known) and (known.value.vmx or known.value.svm)
    return KVM if usable else TCG


def outer(plan: Plan, images: Images, qemu: Path, accelerated: str) -> list[str]:
    """QEMU for L1, started in the folder where its streams are to be."""
    cpu = "host" if accelerated == KVM else EMULATED_CPU
    threads = "tcg,thread=multi" if accelerated == TCG else KVM
    words = [str(qemu), "-accel", threads, "-machine", "q35", "-cpu", cpu]
    words += [*_common(plan, 1), "-kernel", str(images.kernel), "-initrd", str(images.initramfs)]
    words += ["-append", _command_line(plan, 1)]
    for name in of_lab(plan.depth):
        words += ["-chardev", f"socket,id={name},path={stream(name)},server=on,wait=off"]
    words += ["-serial", f"chardev:{port(CONSOLE, 1)}"]
    if plan.disk:
        words += _disk(plan.disk.resolve(), "pci")
    return [*words, "-device", f"virtio-serial-pci,max_ports={_MOST_PORTS}", *_ports(plan, 1)]


def inner(plan: Plan, level: int) -> str:
    """The shell command by which the level outside starts `level` under its own KVM."""
    words = [vmm.QEMU, "-name", f"l{level}", "-L", "/lab/firmware", "-accel", "kvm"]
    words += ["-machine", _MICROVM, "-cpu", "host", *_common(plan, level)]
    words += ["-kernel", "/lab/kernel", "-initrd", "/lab/initramfs"]
    words += ["-append", _command_line(plan, level)]
    console = port(CONSOLE, level)
    for name in (console, *carried(level, plan.depth)):
        words += ["-chardev", f"pipe,id={name},path=/lab/ports/{name}"]
    words += ["-serial", f"chardev:{console}"]
    if plan.disk:
        words += _disk(_DISK, "device")
    words += ["-device", f"virtio-serial-device,max_ports={_MOST_PORTS}", *_ports(plan, level)]
    return shlex.join(words)


def stream(name: str) -> str:
    """The socket that QEMU listens on for the stream `name`, in the lab's folder."""
    return f"{name}.qemu"


def _common(plan: Plan, level: int) -> list[str]:
    words = ["-smp", str(plan.cpus), "-m", str(plan.memory(level))]
    return [*words, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]


def _disk(path: Path | str, kind: str) -> list[str]:
    """A disk whose reads and writes pass by the page cache outside."""
    name = str(path).replace(",", ",,")
    drive = f"if=none,id=disk,format=raw,cache=none,file={name}"
    return ["-drive", drive, "-device", f"virtio-blk-{kind},drive=disk"]


def _command_line(plan: Plan, level: int) -> str:
    ports = sum(1 for _ in carried(level, plan.depth))
    return f"console=ttyS0 panic=-1 quiet lab.level={level} lab.ports={ports}"


def _ports(plan: Plan, level: int) -> Iterator[str]:
    for name in carried(level, plan.depth):
        yield from ("-device", f"virtserialport,chardev={name},name={name}")
