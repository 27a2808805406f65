"""Tune an L1 to the host that runs it: CPU, placement, memory, disks, network, each with a reason.

Nothing is promised that the host has not: what must be done there first is a choice "to do", with
the command, and the definition stays one that starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from undervisor.domains.choice import Choice, Chosen, Outcome
from undervisor.domains.host_topology import HostTopology, Medium, Node
from undervisor.domains.model import Balloon, Disk, Guest, HugePages, NumaTuning, Pinning
from undervisor.domains.placement import Placement, place
from undervisor.domains.quantities import show_cpus, show_size
from undervisor.domains.recommend import Need, recommend
from undervisor.host.fact import Known

_GIB, _MIB2 = 1 << 20, 2048
_QUEUES_MOST = 8
"""More queues than this gain nothing for a guest, and each costs a vhost thread."""


@dataclass(frozen=True, slots=True)
class Context:
    """What the measures look at besides the guest."""

    host: HostTopology
    need: Need
    extension: str
    media: Mapping[str, Medium]
    placement: Placement | None


def tune(
    guest: Guest, host: HostTopology, need: Need, extension: str, media: Mapping[str, Medium]
) -> Chosen:
    """The guest tuned to `host`; `media` tells what each disk's path lies on."""
    placement = place(guest.vcpus, guest.memory.size, host)
    context = Context(host, need, extension, media, placement)
    choices: list[Choice] = []
    for measure in MEASURES:
        chosen = measure(guest, context)
        guest = chosen.guest
        choices += chosen.choices
    return Chosen(guest, tuple(choices))


def _one(
    guest: Guest, outcome: Outcome, id_: str, what: str, why: str, command: str = ""
) -> Chosen:
    return Chosen(guest, (Choice(id_, outcome, what, why, command),))


def _settle(old: Guest, new: Guest, id_: str, what: str, why: str) -> Chosen:
    """Changed or, where it was so already, kept."""
    return _one(new, Outcome.KEPT if old == new else Outcome.CHANGED, id_, what, why)


def _cpu(guest: Guest, context: Context) -> Chosen:
    policy = guest.cpu.policy(context.extension)
    if policy is not None and policy.gives:
        what = f"{context.extension} is required; mode {guest.cpu.mode or 'custom'}"
        return _one(guest, Outcome.KEPT, "cpu", what, "the guest can be an L1")
    found = recommend(context.need, context.extension, context.host.processor)
    kept = replace(found.cpu, topology=guest.cpu.topology, cells=guest.cpu.cells)
    what = f"{found.cpu.mode.value} {found.cpu.model}".strip()
    return _settle(guest, replace(guest, cpu=kept), "cpu", what, "; ".join(found.why))


def _pins(guest: Guest, context: Context) -> Chosen:
    placement = context.placement
    if placement is None:
        why = "no node has so many cores, nor threads in whole cores"
        why = why if context.host.cores else "the host's processors can't be read"
        return _one(
            guest,
            Outcome.REFUSED,
            "pinning",
            f"{guest.vcpus} vCPUs stay unpinned",
            f"{why}; pins across nodes make every access of the other half remote",
        )
    emulator = placement.rest
    pinning = Pinning(
        placement="static",
        allowed=frozenset(placement.vcpus),
        vcpus=tuple((v, frozenset({cpu})) for v, cpu in enumerate(placement.vcpus)),
        emulator=emulator,
        iothreads=tuple((i, emulator) for i in range(1, (guest.iothreads or 0) + 1) if emulator),
    )
    new = replace(guest, pinning=pinning, cpu=replace(guest.cpu, topology=placement.topology))
    what = f"vCPUs on {show_cpus(frozenset(placement.vcpus))}"
    what += f", the emulator on {show_cpus(emulator)}" if emulator else ""
    return _settle(guest, new, "pinning", what, placement.why)


def _numa(guest: Guest, context: Context) -> Chosen:
    placement = context.placement
    if placement is None:
        return _one(guest, Outcome.KEPT, "numa", "memory from any node", "no node holds the vCPUs")
    if len(context.host.nodes) < 2:
        why = "the host has one node" if context.host.nodes else "the host's nodes can't be read"
        return _one(guest, Outcome.KEPT, "numa", "memory from any node", why)
    wanted = NumaTuning("strict", frozenset({placement.node.id}))
    new = replace(guest, memory=replace(guest.memory, numa=wanted))
    return _settle(
        guest,
        new,
        "numa",
        f"memory from node {placement.node.id} only",
        "the vCPUs run there; strict fails at the start rather than run slowly",
    )


def _huge_pages(guest: Guest, context: Context) -> Chosen:
    node = context.placement.node if context.placement else _roomiest(context.host)
    if node is None or not node.pages:
        return _one(
            guest, Outcome.REFUSED, "huge-pages", "ordinary pages", "the host shows no huge pages"
        )
    size = _affordable(guest, node)
    why = (
        "L2's addresses go through two sets of page tables, and a miss in the TLB costs the "
        "product of their levels; KVM can map L2 with large pages only where L0 gives L1 large "
        "pages. They are also never swapped. L1 must use huge pages for its own guests, too"
    )
    if size:
        pages = HugePages(size)
        new = replace(guest, memory=replace(guest.memory, huge=(pages,)))
        what = (
            f"{pages.needed(guest.memory.size)} pages of {show_size(size)}, free on node {node.id}"
        )
        return _settle(guest, new, "huge-pages", what, why)
    size = _wanted_size(guest)
    missing = HugePages(size).needed(guest.memory.size) - node.free_pages(size)
    total = sum(p.total for p in node.pages if p.size == size)
    what = f"reserve {missing} more pages of {show_size(size)} on node {node.id}, then tune again"
    return _one(
        guest,
        Outcome.TODO,
        "huge-pages",
        what,
        why,
        _reserve(node, size, total + missing, len(context.host.nodes)),
    )


def _wanted_size(guest: Guest) -> int:
    """The size that the definition names; else 2 MiB, which can be reserved on a running host."""
    return guest.memory.huge[0].size if guest.memory.huge else _MIB2


def _affordable(guest: Guest, node: Node) -> int:
    """The largest page of which enough are free there; 0 for none."""
    memory = guest.memory.size
    for size in (_GIB, _MIB2):
        if not memory % size and node.free_pages(size) >= memory // size:
            return size
    return 0


def _reserve(node: Node, size: int, total: int, nodes: int) -> str:
    if nodes < 2 and size == _MIB2:
        return (
            f"echo 'vm.nr_hugepages = {total}' | sudo tee /etc/sysctl.d/60-hugepages.conf && "
            "sudo sysctl --system"
        )
    path = f"/sys/devices/system/node/node{node.id}/hugepages/hugepages-{size}kB/nr_hugepages"
    return f"echo {total} | sudo tee {path}"


def _roomiest(host: HostTopology) -> Node | None:
    return max(host.nodes, key=lambda n: n.free, default=None)


def _balloon(guest: Guest, context: Context) -> Chosen:
    if guest.memory.huge is not None:
        new = replace(guest, balloon=Balloon("none"))
        return _settle(
            guest,
            new,
            "balloon",
            "no balloon",
            "huge pages are reserved: what a balloon gives back nobody else can use, and "
            "it breaks the guest's large mappings",
        )
    if guest.balloon is not None and guest.balloon.model == "none":
        return _one(guest, Outcome.KEPT, "balloon", "no balloon", "the definition says so")
    new = replace(guest, balloon=guest.balloon or Balloon("virtio"))
    return _settle(
        guest,
        new,
        "balloon",
        "virtio",
        "the host can take back memory that L1 and its guests do not use",
    )


def _disks(guest: Guest, context: Context) -> Chosen:
    choices: list[Choice] = []
    disks: list[Disk] = []
    for disk in guest.disks:
        new, choice = _disk(disk, guest, context.media)
        disks.append(new)
        choices += [choice] if choice else []
    threads = 1 if any(d.iothread for d in disks) else guest.iothreads
    new_guest = replace(
        guest, disks=tuple(disks), iothreads=max(threads or 0, guest.iothreads or 0) or None
    )
    return Chosen(new_guest, tuple(choices))


def _disk(disk: Disk, guest: Guest, media: Mapping[str, Medium]) -> tuple[Disk, Choice | None]:
    if disk.device != "disk" or disk.kind not in ("file", "block"):
        return disk, None
    medium = media.get(disk.path)
    direct = disk.kind == "block" or (medium is not None and medium.takes_direct)
    if direct:
        new = replace(disk, cache="none", io="native")
        why = (
            "O_DIRECT: no second copy in the host's page cache (L1 has its own), and a flush of "
            "L2 is a flush; native AIO needs no thread for each request. Guides say writeback "
            "with threads: faster where a copy in RAM counts, slower and unsafe to migrate else"
        )
    else:
        where = f"on {medium.filesystem}" if medium and medium.filesystem else "not seen"
        new = replace(disk, cache="writeback", io="threads")
        why = f"the file's system is {where}: O_DIRECT may fail there, so the host's cache is used"
    if disk.bus == "virtio":
        new = replace(new, iothread=disk.iothread or 1)
        new = replace(new, queues=min(guest.vcpus, _QUEUES_MOST) if guest.vcpus > 1 else None)
        why += "; an I/O thread of its own keeps the disk out of the emulator's lock"
    outcome = Outcome.KEPT if new == disk else Outcome.CHANGED
    queues = f" queues={new.queues}" if new.queues else ""
    return new, Choice(
        f"disk-{disk.target}", outcome, f"cache={new.cache} io={new.io}{queues}", why
    )


def _network(guest: Guest, context: Context) -> Chosen:
    interfaces = []
    choices: list[Choice] = []
    present = isinstance(context.host.vhost, Known) and context.host.vhost.value
    for number, interface in enumerate(guest.interfaces):
        if interface.kind not in ("network", "bridge") or interface.model not in ("virtio", ""):
            interfaces.append(interface)
            continue
        queues = min(guest.vcpus, _QUEUES_MOST)
        new = replace(
            interface,
            model="virtio",
            driver="vhost" if present else interface.driver,
            queues=queues if present and queues > 1 else interface.queues,
        )
        interfaces.append(new)
        outcome = Outcome.KEPT if new == interface else Outcome.CHANGED
        choices.append(
            Choice(
                f"network-{number}",
                outcome,
                f"vhost, {queues} queues",
                "packets by the kernel, not by QEMU: each exit to QEMU is dear under nesting; a "
                "queue for each vCPU, at most 8",
            )
            if present
            else Choice(
                f"network-{number}",
                Outcome.TODO,
                "no vhost yet",
                "the host has no /dev/vhost-net",
                "sudo modprobe vhost_net",
            )
        )
    return Chosen(replace(guest, interfaces=tuple(interfaces)), tuple(choices))


Measure = Callable[[Guest, Context], Chosen]
MEASURES: tuple[Measure, ...] = (_cpu, _disks, _pins, _numa, _huge_pages, _balloon, _network)
"""In this order: the disks' I/O thread is there when threads are pinned, huge pages are decided
when the balloon is."""
