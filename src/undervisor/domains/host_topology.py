"""What tuning needs to know of a host: its nodes, cores and siblings, free huge pages, devices."""

from __future__ import annotations

import re
from dataclasses import dataclass

from undervisor.domains.model import CpuSet
from undervisor.domains.quantities import parse_cpus
from undervisor.host.access.protocol import Host, Output
from undervisor.host.fact import Fact, Known, then, value_or
from undervisor.host.facts.processor import Processor, parse_cpuinfo, processor

_CPU = "/sys/devices/system/cpu"
_NODE = "/sys/devices/system/node"
_NODE_LIMIT = 64
_CPU_LIMIT = 2048


@dataclass(frozen=True, slots=True)
class Pages:
    """Huge pages of one size (KiB) on a node: how many there are, how many are free."""

    size: int
    total: int
    free: int


@dataclass(frozen=True, slots=True)
class Node:
    """A NUMA node; memory in KiB."""

    id: int
    cpus: CpuSet
    free: int
    pages: tuple[Pages, ...]

    def free_pages(self, size: int) -> int:
        """Free huge pages of `size` KiB."""
        return sum(p.free for p in self.pages if p.size == size)


@dataclass(frozen=True, slots=True)
class HostTopology:
    """`cores` are sets of sibling threads, in the order of their first; `address_bits` is 0 where
    it is not known."""

    processor: Processor
    nodes: tuple[Node, ...]
    cores: tuple[CpuSet, ...]
    vhost: Fact[bool]
    address_bits: int

    @property
    def threads(self) -> int:
        """Threads of a core; the largest counts on hybrid processors."""
        return max((len(core) for core in self.cores), default=1)

    def cores_of(self, node: Node) -> list[CpuSet]:
        """The cores on a node."""
        return [core for core in self.cores if core <= node.cpus]


def topology(host: Host) -> HostTopology:
    """Read it; what can't be read is missing from it, and tuning then says so."""
    online = value_or(then(host.read_line(f"{_CPU}/online"), parse_cpus), frozenset())
    cpus = sorted(online)[:_CPU_LIMIT]
    return HostTopology(
        processor=processor(host),
        nodes=_nodes(host, online),
        cores=_cores(host, cpus),
        vhost=host.exists("/dev/vhost-net"),
        address_bits=_address_bits(host),
    )


def _cores(host: Host, cpus: list[int]) -> tuple[CpuSet, ...]:
    found: list[CpuSet] = []
    seen: set[int] = set()
    for cpu in cpus:
        if cpu in seen:
            continue
        path = f"{_CPU}/cpu{cpu}/topology/thread_siblings_list"
        siblings = then(host.read_line(path), parse_cpus)
        core = value_or(siblings, frozenset({cpu})) & frozenset(cpus) | {cpu}
        found.append(core)
        seen |= core
    return tuple(found)


def _nodes(host: Host, online: CpuSet) -> tuple[Node, ...]:
    """The nodes; a kernel without NUMA has one, whose pages are the machine's."""
    ids = value_or(then(host.read_line(f"{_NODE}/online"), parse_cpus), frozenset())
    nodes = [_node(host, i, online) for i in sorted(ids)[:_NODE_LIMIT]]
    if nodes:
        return tuple(nodes)
    pages = _pages(host, "/sys/kernel/mm/hugepages")
    free = then(host.read_text("/proc/meminfo"), _available)
    return (Node(0, online, value_or(free, 0), pages),) if online else ()


def _node(host: Host, number: int, online: CpuSet) -> Node:
    folder = f"{_NODE}/node{number}"
    cpus = then(host.read_line(f"{folder}/cpulist"), lambda t: parse_cpus(t) if t else frozenset())
    free = then(host.read_text(f"{folder}/meminfo"), _available)
    return Node(number, value_or(cpus, frozenset()) & online, value_or(free, 0),
                _pages(host, f"{folder}/hugepages"))  # fmt: skip


def _available(text: str) -> int:
    """Free and easily freed memory in KiB, of /proc/meminfo or a node's meminfo."""
    fields = dict(re.findall(r"(\w+(?:\(\w+\))?):\s+(\d{1,15}) kB", text))
    if "MemFree" not in fields:
        raise ValueError("no MemFree")
    return int(fields["MemFree"]) + int(fields.get("Inactive(file)", 0))


def _pages(host: Host, folder: str) -> tuple[Pages, ...]:
    found = []
    for name in value_or(host.listdir(folder), ())[:16]:
        match = re.fullmatch(r"hugepages-(\d{1,9})kB", name)
        if match:
            numbers = [then(host.read_line(f"{folder}/{name}/{file}_hugepages"), int)
                       for file in ("nr", "free")]  # fmt: skip
            total, free = (value_or(fact, 0) for fact in numbers)
            found.append(Pages(int(match[1]), total, free))
    return tuple(found)


def _address_bits(host: Host) -> int:
    """/proc/cpuinfo's "address sizes : 46 bits physical, 48 bits virtual"."""
    text = value_or(host.read_text("/proc/cpuinfo", 4 << 20), "")
    match = re.match(r"(\d{2}) bits physical", parse_cpuinfo(text).get("address sizes", ""))
    return int(match[1]) if match else 0


@dataclass(frozen=True, slots=True)
class Medium:
    """What a disk's file lies on."""

    filesystem: str
    device: str

    @property
    def takes_direct(self) -> bool:
        """Whether files there can be opened with O_DIRECT."""
        return self.filesystem not in ("tmpfs", "ramfs", "overlay", "9p", "fuse", "")


def medium(host: Host, path: str) -> Fact[Medium]:
    """The file system of `path`, or of its folder where there is no such file yet."""
    folder = path.rsplit("/", 1)[0] or "/"
    for place in (path, folder):
        fact = host.run(["findmnt", "-n", "-o", "FSTYPE,SOURCE", "-T", place])
        if isinstance(fact, Known) and fact.value.status == 0:
            return then(fact, _medium)
    return then(fact, _medium)


def _medium(output: Output) -> Medium:
    words = output.stdout.split()
    if output.status or len(words) < 2:
        raise ValueError("findmnt names no file system")
    return Medium(words[0][:40], words[1][:200])
