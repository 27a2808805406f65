"""A guest as a QEMU command line, and what such a line can't say.

libvirt does part of its work outside of QEMU: limits are the cgroup's, pins the scheduler's.  The
limits become a `systemd-run` before the command; the rest is said in notes, never left out.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from undervisor.domains import qemu_devices
from undervisor.domains.model import AddressBits, Cpu, CpuSet, Guest, Mode, NumaTuning
from undervisor.domains.quantities import show_cpus

_RENAMED = {"pclmuldq": "pclmulqdq", "ffxsr": "fxsr-opt"}
"""Features that libvirt calls otherwise than QEMU; `_` and `-` are the same to QEMU."""

_POLICIES = {"strict": "bind", "preferred": "preferred", "interleave": "interleave"}


@dataclass(frozen=True, slots=True)
class Command:
    """`prefix` sets the limits, `argv` is QEMU's, `notes` are for the operator."""

    argv: tuple[str, ...]
    prefix: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """For a shell, an option on each line."""
        lines = [shlex.join([*self.prefix, self.argv[0]])]
        for word in self.argv[1:]:
            if word.startswith("-"):
                lines.append(f"    {word}")
            else:
                lines[-1] += f" {shlex.quote(word)}"
        return " \\\n".join(lines)


def qemu_command(guest: Guest, binary: str = "") -> Command:
    """The command that starts `guest`."""
    argv = [
        binary or f"qemu-system-{guest.architecture or 'x86_64'}",
        "-name",
        qemu_devices.quoted(guest.name),
    ]
    argv += [*_machine(guest), *_cpu(guest), *_processors(guest), *_memory(guest)]
    argv += ["-nodefaults", "-display", "none", *_boot(guest)]
    devices = qemu_devices.devices(guest)
    return Command(
        argv=(*argv, *devices.argv, *guest.extra),
        prefix=tuple(_limits(guest)),
        notes=(*_notes(guest), *devices.notes),
    )


def cpu_word(guest: Guest) -> str:
    """The value of `-cpu`; empty for the machine's own CPU as it is."""
    cpu = guest.cpu
    emulated = guest.type == "qemu"
    names = {
        Mode.PASSTHROUGH: "max" if emulated else "host",
        Mode.HOST_MODEL: "max" if emulated else "host",
        Mode.MAXIMUM: "max",
        Mode.CUSTOM: cpu.model,
        Mode.DEFAULT: "qemu64" if cpu.features or cpu.address_bits else "",
    }
    name = names[cpu.mode]
    return ",".join([name, *_properties(cpu, name)]) if name else ""


def feature_name(name: str) -> str:
    """QEMU's name of a CPU feature."""
    return _RENAMED.get(name, name.replace("_", "-"))


def _properties(cpu: Cpu, name: str) -> Iterator[str]:
    for feature, policy in cpu.features:
        yield f"{feature_name(feature)}={'on' if policy.gives else 'off'}"
    if cpu.migratable is not None and name in ("host", "max"):
        yield f"migratable={'on' if cpu.migratable else 'off'}"
    if cpu.address_bits is not None:
        yield from _address_bits(cpu.address_bits)
    if cpu.check == "full":
        yield "enforce"


def _address_bits(width: AddressBits) -> Iterator[str]:
    yield f"host-phys-bits={'on' if width.host else 'off'}"
    if width.host and width.limit:
        yield f"host-phys-bits-limit={width.limit}"
    if not width.host and width.bits:
        yield f"phys-bits={width.bits}"


def _machine(guest: Guest) -> list[str]:
    accelerator = "tcg" if guest.type == "qemu" else "kvm"
    backend = ",memory-backend=ram0" if _backed(guest) and not guest.cpu.cells else ""
    if not guest.machine and not backend:
        return ["-accel", accelerator]
    return ["-machine", f"{guest.machine or 'pc'},accel={accelerator}{backend}"]


def _cpu(guest: Guest) -> list[str]:
    word = cpu_word(guest)
    return ["-cpu", word] if word else []


def _processors(guest: Guest) -> list[str]:
    words = [str(guest.vcpus)]
    topology = guest.cpu.topology
    if topology:
        parts = ("sockets", "cores", "threads") if topology.dies == 1 else (
            "sockets", "dies", "cores", "threads")  # fmt: skip
        words += [f"{part}={getattr(topology, part)}" for part in parts]
    return ["-smp", ",".join(words)]


def _size(kib: int) -> str:
    return f"{kib}k" if kib % 1024 else f"{kib // 1024}M"


def _backed(guest: Guest) -> bool:
    """Whether the RAM needs an object of its own."""
    memory = guest.memory
    return memory.huge is not None or bool(memory.source or memory.access or memory.numa)


def _memory(guest: Guest) -> Iterator[str]:
    yield from ("-m", _size(guest.memory.size))
    if guest.memory.locked:
        yield from ("-overcommit", "mem-lock=on")
    if guest.cpu.cells:
        for cell in guest.cpu.cells:
            yield from ("-object", _backend(guest, cell.id, cell.memory))
            cpus = "".join(f",cpus={piece}" for piece in _pieces(cell.cpus))
            yield from ("-numa", f"node,nodeid={cell.id}{cpus},memdev=ram{cell.id}")
    elif _backed(guest):
        yield from ("-object", _backend(guest, 0, guest.memory.size))


def _backend(guest: Guest, cell: int, size: int) -> str:
    """A memory object; huge pages come by memfd, which needs no mounted hugetlbfs."""
    memory = guest.memory
    huge = memory.huge is not None
    kind = "memfd" if huge or memory.source == "memfd" else "ram"
    words = [f"memory-backend-{kind}", f"id=ram{cell}", f"size={_size(size)}"]
    if memory.access:
        words.append(f"share={'on' if memory.access == 'shared' else 'off'}")
    if huge:
        words.append("hugetlb=on")
        pages = [p for p in memory.huge or () if not p.nodes or cell in p.nodes]
        words += [f"hugetlbsize={_size(pages[0].size)}"] if pages else []
        words.append("prealloc=on")
    return ",".join(words + _nodes(memory.numa))


def _nodes(numa: NumaTuning | None) -> list[str]:
    if numa is None or not numa.nodes or numa.mode not in _POLICIES:
        return []
    nodes = [f"host-nodes={piece}" for piece in _pieces(numa.nodes)]
    return [*nodes, f"policy={_POLICIES[numa.mode]}"]


def _pieces(cpus: CpuSet) -> list[str]:
    return show_cpus(cpus).split(",") if cpus else []


def _boot(guest: Guest) -> Iterator[str]:
    boot = guest.boot
    flash = "if=pflash,format=raw,unit={},{}file={}"
    if boot.loader:
        yield from ("-drive", flash.format(0, "readonly=on,", qemu_devices.quoted(boot.loader)))
    if boot.nvram:
        yield from ("-drive", flash.format(1, "", qemu_devices.quoted(boot.nvram)))
    for option, value in (("-kernel", boot.kernel), ("-initrd", boot.initrd),
                          ("-append", boot.append)):  # fmt: skip
        if value:
            yield from (option, value)


def _limits(guest: Guest) -> Iterator[str]:
    """The cgroup that libvirt would make, by systemd."""
    memory, cpu = guest.memory_limits, guest.cpu_limits
    words = []
    if memory.hard:
        words.append(f"MemoryMax={memory.hard}K")
    if memory.soft:
        words.append(f"MemoryHigh={memory.soft}K")
    if cpu.shares:
        # Weight 100 is systemd's default as 1024 shares are the kernel's.
        words.append(f"CPUWeight={max(1, min(10000, cpu.shares * 100 // 1024))}")
    if cpu.quota and cpu.quota > 0:
        # libvirt's quota is each vCPU's, systemd's the whole scope's.
        words.append(f"CPUQuota={cpu.quota * 100 // (cpu.period or 100000) * guest.vcpus}%")
    if words:
        yield from ("systemd-run", "--scope")
        for word in words:
            yield from ("-p", word)


def _notes(guest: Guest) -> Iterator[str]:
    cpu = guest.cpu
    if cpu.mode is Mode.HOST_MODEL:
        yield "QEMU has no host-model: this is the host's whole CPU, not libvirt's nearest model"
    if cpu.mode is Mode.PASSTHROUGH and guest.type == "qemu":
        yield "-cpu host needs KVM: under emulation the nearest is -cpu max"
    if cpu.vendor:
        yield f"libvirt checks that the host is from {cpu.vendor}; QEMU does not"
    for vcpu, where in guest.pinning.vcpus:
        yield (f"vCPU {vcpu} on {show_cpus(where)}: taskset -pc {show_cpus(where)} TID, the TID "
               "from QMP's query-cpus-fast")  # fmt: skip
    if guest.pinning.allowed:
        yield f"all threads on {show_cpus(guest.pinning.allowed)}: taskset -c before the command"
    if guest.pinning.emulator:
        yield f"the emulator on {show_cpus(guest.pinning.emulator)}: taskset -pc, with its PID"
    numa = guest.memory.numa
    if numa is not None and numa.nodes and numa.mode not in _POLICIES:
        yield f"QEMU has no NUMA policy {numa.mode}: numactl --membind before the command"
    if guest.memory_limits.swap:
        yield "the limit of memory and swap together has no property of systemd's"
    if guest.cpu_limits.emulator_quota:
        yield "a quota of the emulator alone needs a cgroup of its own, as libvirt makes it"
