"""A guest as far as nesting goes: what libvirt's XML and QEMU's command line both express.

Sizes are in KiB, times in microseconds.  None, an empty text and 0 mean "not said": libvirt and
QEMU then use their defaults.  An `ordinal` is the place of an element in the document that a part
was read from, -1 for a new part; it is no property of the guest and does not count in comparisons.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

CpuSet = frozenset[int]


class Mode(StrEnum):
    """libvirt's ways to choose a CPU; DEFAULT is the machine type's own CPU."""

    DEFAULT = ""
    CUSTOM = "custom"
    HOST_MODEL = "host-model"
    PASSTHROUGH = "host-passthrough"
    MAXIMUM = "maximum"


class Policy(StrEnum):
    """What libvirt does with a CPU feature."""

    FORCE = "force"
    REQUIRE = "require"
    OPTIONAL = "optional"
    DISABLE = "disable"
    FORBID = "forbid"

    @property
    def gives(self) -> bool:
        """Whether the guest shall have the feature."""
        return self not in (Policy.DISABLE, Policy.FORBID)


@dataclass(frozen=True, slots=True)
class Topology:
    """How the vCPUs are arranged; the product is their number."""

    sockets: int = 1
    dies: int = 1
    cores: int = 1
    threads: int = 1

    @property
    def total(self) -> int:
        """The vCPUs that it has room for."""
        return self.sockets * self.dies * self.cores * self.threads


@dataclass(frozen=True, slots=True)
class Cell:
    """A NUMA node of the guest."""

    id: int
    cpus: CpuSet
    memory: int
    ordinal: int = field(default=-1, compare=False)


@dataclass(frozen=True, slots=True)
class AddressBits:
    """The physical-address width that CPUID.80000008H:EAX[7:0] reports: `bits` of our own, or the
    host's, at most `limit`."""

    host: bool
    bits: int = 0
    limit: int = 0


@dataclass(frozen=True, slots=True)
class Cpu:
    """The guest's processor; `features` are (name, policy), a name counts once."""

    mode: Mode = Mode.DEFAULT
    model: str = ""
    vendor: str = ""
    features: tuple[tuple[str, Policy], ...] = ()
    check: str = ""
    match: str = ""
    fallback: str = ""
    migratable: bool | None = None
    topology: Topology | None = None
    address_bits: AddressBits | None = None
    cells: tuple[Cell, ...] = ()

    def policy(self, name: str) -> Policy | None:
        """The policy of a feature; None where it is not named."""
        return dict(self.features).get(name)

    def with_feature(self, name: str, policy: Policy | None) -> Cpu:
        """With one feature's policy changed or, with None, no longer named."""
        policies = dict(self.features)
        if policy is None:
            policies.pop(name, None)
        else:
            policies[name] = policy
        return replace(self, features=tuple(policies.items()))


@dataclass(frozen=True, slots=True)
class Pinning:
    """Which host processors run what: `allowed` for vCPUs without a pin of their own."""

    placement: str = ""
    allowed: CpuSet = frozenset()
    vcpus: tuple[tuple[int, CpuSet], ...] = ()
    emulator: CpuSet = frozenset()
    iothreads: tuple[tuple[int, CpuSet], ...] = ()


@dataclass(frozen=True, slots=True)
class NumaTuning:
    """From which host nodes the memory comes."""

    mode: str
    nodes: CpuSet


@dataclass(frozen=True, slots=True)
class HugePages:
    """Pages of one size (0: the host's default) for the guest's NUMA nodes `nodes` (empty: all)."""

    size: int = 0
    nodes: CpuSet = frozenset()

    def needed(self, memory: int) -> int:
        """How many pages `memory` KiB takes; x86's default page is 2 MiB."""
        return -(-memory // (self.size or 2048))


@dataclass(frozen=True, slots=True)
class Memory:
    """RAM, and what backs it; `huge` is None where ordinary pages do."""

    size: int
    current: int | None = None
    huge: tuple[HugePages, ...] | None = None
    locked: bool = False
    source: str = ""
    access: str = ""
    numa: NumaTuning | None = None


@dataclass(frozen=True, slots=True)
class MemoryLimits:
    """What the cgroup of the guest's QEMU may use."""

    hard: int | None = None
    soft: int | None = None
    swap: int | None = None


@dataclass(frozen=True, slots=True)
class CpuLimits:
    """Weight of the whole guest; period and quota of each vCPU thread, and of the emulator."""

    shares: int | None = None
    period: int | None = None
    quota: int | None = None
    emulator_period: int | None = None
    emulator_quota: int | None = None


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk; `kind` is libvirt's type: file, block, dir or another that has no path."""

    target: str
    path: str = ""
    kind: str = "file"
    device: str = "disk"
    bus: str = "virtio"
    format: str = ""
    cache: str = ""
    io: str = ""
    queues: int | None = None
    iothread: int | None = None
    read_only: bool = False
    ordinal: int = field(default=-1, compare=False)


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface; `kind` is libvirt's type: network, bridge, user or another."""

    kind: str
    source: str = ""
    model: str = ""
    driver: str = ""
    queues: int | None = None
    mac: str = ""
    ordinal: int = field(default=-1, compare=False)


@dataclass(frozen=True, slots=True)
class Console:
    """A text console: where its text goes (pty, file, tcp, ...) and what the guest sees."""

    kind: str = "pty"
    target: str = "serial"
    ordinal: int = field(default=-1, compare=False)


@dataclass(frozen=True, slots=True)
class Balloon:
    """The memory balloon; `address` is a PCI address such as 0000:00:08.0."""

    model: str = "virtio"
    address: str = ""


@dataclass(frozen=True, slots=True)
class Boot:
    """What is started: firmware in flash, a kernel, or the first disk."""

    loader: str = ""
    nvram: str = ""
    kernel: str = ""
    initrd: str = ""
    append: str = ""


@dataclass(frozen=True, slots=True)
class Guest:
    """One guest; `type` is kvm or qemu (emulation), `extra` are words for QEMU as they are."""

    name: str
    memory: Memory
    type: str = "kvm"
    vcpus: int = 1
    architecture: str = "x86_64"
    machine: str = ""
    cpu: Cpu = Cpu()
    pinning: Pinning = Pinning()
    iothreads: int | None = None
    memory_limits: MemoryLimits = MemoryLimits()
    cpu_limits: CpuLimits = CpuLimits()
    boot: Boot = Boot()
    disks: tuple[Disk, ...] = ()
    interfaces: tuple[Interface, ...] = ()
    consoles: tuple[Console, ...] = ()
    agent: bool = False
    balloon: Balloon | None = None
    extra: tuple[str, ...] = ()

    @property
    def migratable(self) -> bool | None:
        """Whether QEMU leaves out features that can't be migrated; None where its default counts
        (on for host-passthrough and maximum)."""
        return self.cpu.migratable
