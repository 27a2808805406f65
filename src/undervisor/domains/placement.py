"""Where the vCPUs of a guest run: which node, which cores, whose siblings stay idle."""

from __future__ import annotations

from dataclasses import dataclass

from undervisor.domains.host_topology import HostTopology, Node
from undervisor.domains.model import CpuSet, Topology


@dataclass(frozen=True, slots=True)
class Placement:
    """A host processor for each vCPU, what is left for the emulator, and the guest's topology."""

    node: Node
    vcpus: tuple[int, ...]
    rest: CpuSet
    topology: Topology
    why: str


def place(vcpus: int, memory: int, host: HostTopology) -> Placement | None:
    """The best placement on one node for `vcpus` and `memory` KiB; None where no node has room.

    A core for each vCPU comes before a thread for each: siblings share everything but registers,
    and an L1's vCPU that waits for its sibling delays the L2 that runs on it.
    """
    for attempt in (_whole_cores, _threads):
        for node in sorted(host.nodes, key=lambda n: (_free(n) < memory, -_free(n), n.id)):
            found = attempt(vcpus, node, host)
            if found is not None:
                return found
    return None


def _free(node: Node) -> int:
    """Memory that a guest can get there, huge pages included; KiB."""
    return node.free + sum(p.size * p.free for p in node.pages)


def _spared(cores: list[CpuSet], wanted: int) -> list[CpuSet]:
    """The cores to use: not the node's first, where the host's own work gathers, if it can be."""
    return cores[1 : wanted + 1] if len(cores) > wanted else cores[:wanted]


def _whole_cores(vcpus: int, node: Node, host: HostTopology) -> Placement | None:
    cores = host.cores_of(node)
    if len(cores) < vcpus:
        return None
    used = _spared(cores, vcpus)
    pins = tuple(min(core) for core in used)
    taken = frozenset().union(*used)
    siblings = "their siblings stay idle" if host.threads > 1 else "they have no siblings"
    return Placement(
        node, pins, (node.cpus - taken) or (node.cpus - frozenset(pins)),
        Topology(cores=vcpus), f"a core of node {node.id} for each vCPU; {siblings}",
    )  # fmt: skip


def _threads(vcpus: int, node: Node, host: HostTopology) -> Placement | None:
    cores = host.cores_of(node)
    width = host.threads
    if width < 2 or vcpus % width or any(len(core) != width for core in cores):
        return None
    wanted = vcpus // width
    if len(cores) < wanted:
        return None
    used = _spared(cores, wanted)
    pins = tuple(cpu for core in used for cpu in sorted(core))
    return Placement(
        node, pins, node.cpus - frozenset(pins), Topology(cores=wanted, threads=width),
        f"node {node.id} has fewer cores than vCPUs, so each core's {width} threads are the "
        "threads of one guest core: the guest's scheduler then knows which vCPUs share a core",
    )  # fmt: skip
