"""What makes a definition fail at its start, do nothing, or harm: checked before it is applied."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from undervisor.domains.cpu_features import MITIGATIONS
from undervisor.domains.harden import overhead
from undervisor.domains.host_topology import HostTopology
from undervisor.domains.model import Guest
from undervisor.domains.quantities import show_cpus, show_size

SHARES = range(2, 262145)
PERIODS = range(1000, 1000001)
QUOTA_LEAST = 1000
"""The kernel's ranges of weight (cgroup v1), period and quota."""


class Weight(Enum):
    """How bad it is."""

    REFUSED = "refused"
    WARN = "warn"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Problem:
    """`refused`: libvirt or QEMU will not start it."""

    id: str
    weight: Weight
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.weight.value}: {self.what}; {self.remedy} [{self.id}]"


def problems(guest: Guest, host: HostTopology | None = None) -> tuple[Problem, ...]:
    """All problems; those that depend on a host only where it is given."""
    found = [p for check in CHECKS for p in check(guest)]
    if host is not None and host.nodes:
        found += [p for on_host in HOST_CHECKS for p in on_host(guest, host)]
    return tuple(found)


def _bad(id_: str, what: str, remedy: str) -> Problem:
    return Problem(id_, Weight.REFUSED, what, remedy)


def _warn(id_: str, what: str, remedy: str) -> Problem:
    return Problem(id_, Weight.WARN, what, remedy)


def _topology(guest: Guest) -> Iterator[Problem]:
    topology = guest.cpu.topology
    if topology is not None and topology.total != guest.vcpus:
        yield _bad(
            "topology",
            f"the topology has {topology.total} vCPUs, the guest {guest.vcpus}",
            "make them equal",
        )


def _cells(guest: Guest) -> Iterator[Problem]:
    cells = guest.cpu.cells
    if not cells:
        return
    total = sum(cell.memory for cell in cells)
    if total != guest.memory.size:
        yield _warn(
            "cells-memory",
            f"the NUMA cells have {show_size(total)}, the guest {show_size(guest.memory.size)}",
            "libvirt takes the sum of the cells; say the same in both places",
        )
    for cell in cells:
        beyond = frozenset(c for c in cell.cpus if c >= guest.vcpus)
        if beyond:
            yield _bad(
                "cells-vcpus",
                f"cell {cell.id} names vCPUs {show_cpus(beyond)} of {guest.vcpus}",
                "number them from 0",
            )
    if sum(len(cell.cpus) for cell in cells) > len(frozenset().union(*(c.cpus for c in cells))):
        yield _bad("cells-overlap", "a vCPU is in two NUMA cells", "give each to one")


def _memory(guest: Guest) -> Iterator[Problem]:
    limits = guest.memory_limits
    if limits.hard is not None and limits.hard < guest.memory.size + overhead(guest) // 2:
        yield _warn(
            "hard-limit",
            f"the hard limit of {show_size(limits.hard)} leaves QEMU little or "
            f"nothing beside {show_size(guest.memory.size)} of RAM: the kernel will kill it",
            f"at least {show_size(guest.memory.size + overhead(guest))}: undervisor guest harden",
        )
    if limits.soft is not None and limits.hard is not None and limits.soft > limits.hard:
        yield _warn("soft-limit", "the soft limit is above the hard one", "it never acts; lower it")
    if limits.soft is not None and limits.soft < guest.memory.size:
        yield _warn(
            "soft-below-ram",
            f"the soft limit of {show_size(limits.soft)} is below the RAM",
            "the guest is swapped while others want memory; raise it to the RAM",
        )


def _cpu_time(guest: Guest) -> Iterator[Problem]:
    limits = guest.cpu_limits
    if limits.shares is not None and limits.shares not in SHARES:
        yield _bad("shares", f"{limits.shares} shares", "2 to 262144; on cgroup v2 1 to 10000")
    for period in (limits.period, limits.emulator_period):
        if period is not None and period not in PERIODS:
            yield _bad("period", f"a period of {period} us", "1000 to 1000000")
    for quota in (limits.quota, limits.emulator_quota):
        if quota is not None and 0 < quota < QUOTA_LEAST:
            yield _bad("quota", f"a quota of {quota} us", "at least 1000, or -1 for no limit")
    if limits.quota and limits.quota > (limits.period or 100_000):
        yield Problem(
            "quota-idle",
            Weight.NOTE,
            f"a quota of {limits.quota} us is more than the "
            "period: it is each vCPU's, and limits nothing",
            "at most the period",
        )


def _devices(guest: Guest) -> Iterator[Problem]:
    for disk in guest.disks:
        if disk.io == "native" and disk.cache not in ("none", "directsync"):
            yield _bad(
                "disk-native",
                f"{disk.target}: io=native with cache={disk.cache or 'default'}",
                "cache=none or directsync",
            )
        if disk.iothread and disk.iothread > (guest.iothreads or 0):
            yield _bad(
                "disk-iothread",
                f"{disk.target}: there is no I/O thread {disk.iothread}",
                "raise <iothreads>",
            )
        if disk.read_only and disk.device == "disk" and disk.bus in ("ide", "sata"):
            yield _bad(
                "disk-read-only", f"{disk.target}: {disk.bus} disks can't be read-only", "virtio"
            )
    targets = [disk.target for disk in guest.disks]
    for target in sorted({t for t in targets if targets.count(t) > 1}):
        yield _bad("disk-twice", f"two disks are {target}", "give each a name of its own")
    for number, interface in enumerate(guest.interfaces):
        if (interface.queues or 1) > guest.vcpus:
            yield _warn(
                "queues",
                f"interface {number} has {interface.queues} queues for {guest.vcpus} vCPUs",
                "a queue for each vCPU at most",
            )
    if guest.memory.huge is not None and guest.balloon and guest.balloon.model == "virtio":
        yield Problem(
            "balloon", Weight.NOTE, "a balloon beside huge pages gives nothing back", "model='none'"
        )


def _pins(guest: Guest) -> Iterator[Problem]:
    for vcpu, _ in guest.pinning.vcpus:
        if vcpu >= guest.vcpus:
            yield _warn("pin-beyond", f"a pin for vCPU {vcpu} of {guest.vcpus}", "libvirt drops it")
    single = [min(where) for _, where in guest.pinning.vcpus if len(where) == 1]
    for cpu in sorted({c for c in single if single.count(c) > 1}):
        yield _warn("pin-twice", f"two vCPUs are pinned to processor {cpu}", "give each its own")


def _mitigations(guest: Guest) -> Iterator[Problem]:
    for name, policy in guest.cpu.features:
        if name in MITIGATIONS and not policy.gives:
            yield _warn(
                "mitigation-off",
                f"{name} is switched off: {MITIGATIONS[name]}",
                "undervisor guest harden",
            )


def _online(guest: Guest, host: HostTopology) -> Iterator[Problem]:
    online = frozenset().union(*host.cores) if host.cores else frozenset()
    named = frozenset().union(guest.pinning.allowed, *(w for _, w in guest.pinning.vcpus))
    if online and named - online:
        yield _bad(
            "pin-offline",
            f"the host has no processor {show_cpus(named - online)}",
            "undervisor guest tune",
        )
    if online and guest.vcpus > len(online):
        yield _warn(
            "overcommitted",
            f"{guest.vcpus} vCPUs on {len(online)} processors",
            "an L2 that waits for a lock holder which does not run stalls",
        )


def _siblings(guest: Guest, host: HostTopology) -> Iterator[Problem]:
    """Two vCPUs on one core, of which the guest does not know."""
    if guest.cpu.topology is not None and guest.cpu.topology.threads > 1:
        return
    pinned = {cpu for _, where in guest.pinning.vcpus if len(where) == 1 for cpu in where}
    shared = [core for core in host.cores if len(core & pinned) > 1]
    if shared:
        names = ", ".join(show_cpus(core) for core in shared[:4])
        yield _warn(
            "siblings",
            f"vCPUs share the cores {names}, and the guest does not know it",
            "pin to one thread of each core, or give the guest threads: tune",
        )


def _pages(guest: Guest, host: HostTopology) -> Iterator[Problem]:
    if guest.memory.huge is None:
        return
    size = guest.memory.huge[0].size if guest.memory.huge else 2048
    needed = -(-guest.memory.size // size)
    free = sum(node.free_pages(size) for node in host.nodes)
    if free < needed:
        yield _bad(
            "huge-pages",
            f"{needed} huge pages of {show_size(size)} needed, {free} free",
            "reserve them: undervisor guest tune says how",
        )


CHECKS: tuple[Callable[[Guest], Iterator[Problem]], ...] = (
    _topology,
    _cells,
    _memory,
    _cpu_time,
    _devices,
    _pins,
    _mitigations,
)
HOST_CHECKS: tuple[Callable[[Guest, HostTopology], Iterator[Problem]], ...] = (
    _online,
    _siblings,
    _pages,
)
