"""What a bug report about a nested setup has to hold, level by level.

The list is that of the kernel's document "Running nested guests with KVM", Reporting bugs from
nested setups, and what answers to such reports asked for besides.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from undervisor.host.access.protocol import Host
from undervisor.host.fact import Absent, Denied, Fact, Known, Unknown, value_or
from undervisor.host.facts.machine import Machine
from undervisor.host.facts.software import parse_guest, processes, split_command

FILE_LIMIT = 8 << 20
"""Bytes of one item; a dmesg or a libvirt log of a busy host can reach some MiB."""

_SLOW = 30.0
"""Seconds that dmidecode and x86info may take."""


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to collect: a file or a command, on which architectures, and how to get it by
    hand where we could not."""

    name: str
    title: str
    by_hand: str
    path: str = ""
    argv: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    asked_for: bool = True

    def applies(self, architecture: str) -> bool:
        """Whether this item belongs into a report from `architecture`."""
        return not self.architectures or architecture in self.architectures


_X86 = ("x86_64", "i686", "i386")

ITEMS: tuple[Item, ...] = (
    Item("kernel", "Kernel version", "uname -a", argv=("uname", "-a")),
    Item("os-release", "Distribution", "cat /etc/os-release", path="/etc/os-release"),
    Item("qemu-version", "QEMU version", "qemu-system-x86_64 --version",
         argv=("qemu-system-x86_64", "--version"), architectures=_X86),
    Item("qemu-version", "QEMU version", "qemu-system-s390x --version",
         argv=("qemu-system-s390x", "--version"), architectures=("s390x",)),
    Item("libvirt-version", "libvirt version", "virsh --version", argv=("virsh", "--version")),
    Item("cpuinfo", "/proc/cpuinfo", "cat /proc/cpuinfo", path="/proc/cpuinfo"),
    Item("lscpu", "lscpu", "lscpu", argv=("lscpu",)),
    Item("dmesg", "Full dmesg", "sudo dmesg", argv=("dmesg",)),
    Item("kernel-command-line", "Kernel command line", "cat /proc/cmdline", path="/proc/cmdline"),
    Item("modules", "Loaded modules", "cat /proc/modules", path="/proc/modules", asked_for=False),
    Item("x86info", "x86info -a", "sudo x86info -a", argv=("x86info", "-a"), architectures=_X86),
    Item("dmidecode", "dmidecode", "sudo dmidecode", argv=("dmidecode",), architectures=_X86),
    Item("sysinfo", "/proc/sysinfo, which holds all levels of IBM Z", "cat /proc/sysinfo",
         path="/proc/sysinfo", architectures=("s390x",)),
    Item("domain-capabilities", "libvirt's domain capabilities", "virsh domcapabilities",
         argv=("virsh", "-r", "-c", "qemu:///system", "domcapabilities"), asked_for=False),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Collected:
    """An item with its text, or with the reason why it is missing."""

    item: Item
    text: str
    missing: str = ""


def collect(host: Host, machine: Machine) -> list[Collected]:
    """Every item that applies to `machine`; what could not be had says why."""
    architecture = value_or(machine.processor.architecture, "x86_64")
    wanted = [item for item in ITEMS if item.applies(architecture)]
    return [*(_collect(host, item) for item in wanted), _command_lines(host), _parameters(machine)]


def _collect(host: Host, item: Item) -> Collected:
    if item.path:
        fact: Fact[str] = host.read_text(item.path, FILE_LIMIT)
    else:
        ran = host.run(item.argv, timeout=_SLOW)
        if isinstance(ran, Known) and ran.value.status and not ran.value.stdout.strip():
            why = ran.value.stderr.strip()[:200] or f"status {ran.value.status}"
            return Collected(item, "", why)
        fact = Known(ran.value.stdout, ran.source) if isinstance(ran, Known) else ran
    if isinstance(fact, Known):
        return Collected(item, fact.value)
    return Collected(item, "", _why(fact))


def _why(fact: Absent | Denied | Unknown) -> str:
    if isinstance(fact, Absent):
        return "not installed or not there"
    return "needs root" if isinstance(fact, Denied) else fact.why


_COMMAND_LINES = Item(
    "qemu-command-lines", "QEMU command lines of the guests",
    "ps -eww -o args= | grep qemu; cat /var/log/libvirt/qemu/*.log",
)  # fmt: skip


def _command_lines(host: Host) -> Collected:
    """Running guests from ps, and those that libvirt logged."""
    parts = []
    ran = processes(host)
    listed = ran.value.stdout.splitlines() if isinstance(ran, Known) else []
    for line in listed:
        pid, _, command = line.strip().partition(" ")
        if pid.isdigit() and len(pid) < 9 and parse_guest(int(pid), split_command(command)):
            # The process's own list of words is whole; ps may cut it.
            raw = host.read_bytes(f"/proc/{pid}/cmdline")
            words = value_or(raw, b"").decode("utf-8", "replace").rstrip("\0").split("\0")
            parts.append(f"{pid} {shlex.join(words)}" if words != [""] else line)
    folder = "/var/log/libvirt/qemu"
    for name in value_or(host.listdir(folder), ())[:50]:
        if name.endswith(".log"):
            text = host.read_text(f"{folder}/{name}", FILE_LIMIT)
            parts.append(f"== {name}\n{value_or(text, str(text))}")
    if parts:
        return Collected(_COMMAND_LINES, "\n".join(parts) + "\n")
    return Collected(_COMMAND_LINES, "", "no running QEMU and no libvirt log")


_PARAMETERS = Item(
    "kvm-parameters", "Parameters of the KVM modules", "grep . /sys/module/kvm*/parameters/*",
    asked_for=False,
)  # fmt: skip


def _parameters(machine: Machine) -> Collected:
    lines = [
        f"{module}.{name}={value_or(fact, str(fact))}"
        for module, parameters in machine.kvm.parameters.items()
        for name, fact in parameters.items()
    ]
    if lines:
        return Collected(_PARAMETERS, "\n".join(lines) + "\n")
    return Collected(_PARAMETERS, "", "no KVM module is loaded")
