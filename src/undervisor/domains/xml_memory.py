"""libvirt's memory: its size, what backs it, from which nodes it comes and what limits it."""

from __future__ import annotations

from undervisor.domains import xml_tree as x
from undervisor.domains.model import HugePages, Memory, MemoryLimits, NumaTuning
from undervisor.domains.quantities import to_kib
from undervisor.domains.xml_tree import Element
from undervisor.errors import BadInput

_LIMITS = {"hard": "hard_limit", "soft": "soft_limit", "swap": "swap_hard_limit"}


def read(root: Element) -> Memory:
    """The memory of a domain; BadInput where it has none."""
    size = x.scaled(root.find("memory"))
    if size is None:
        raise BadInput("the domain has no <memory>")
    backing = root.find("memoryBacking")
    return Memory(
        size=size,
        current=x.scaled(root.find("currentMemory")),
        huge=None if backing is None else _pages(backing),
        locked=backing is not None and backing.find("locked") is not None,
        source=x.attribute(root, "memoryBacking/source", "type"),
        access=x.attribute(root, "memoryBacking/access", "mode"),
        numa=_numa(root),
    )


def write(root: Element, memory: Memory) -> None:
    """Make the document say `memory`."""
    x.put_scaled(root, "memory", memory.size)
    x.put_scaled(root, "currentMemory", memory.current)
    _write_pages(root, memory.huge)
    locked = root.find("memoryBacking/locked")
    if memory.locked and locked is None:
        x.ensure(root, "memoryBacking/locked")
    elif not memory.locked and locked is not None:
        x.drop(locked)
    x.put_attribute(root, "memoryBacking/source", "type", memory.source)
    x.put_attribute(root, "memoryBacking/access", "mode", memory.access)
    if _numa(root) != memory.numa:
        found = root.find("numatune/memory")
        if memory.numa is None:
            if found is not None:
                x.drop(found)
            return
        x.put_attribute(root, "numatune/memory", "mode", memory.numa.mode)
        x.put_cpus(root, "numatune/memory", "nodeset", memory.numa.nodes)


def read_limits(root: Element) -> MemoryLimits:
    """<memtune>."""
    return MemoryLimits(
        **{key: x.scaled(root.find(f"memtune/{tag}")) for key, tag in _LIMITS.items()}
    )


def write_limits(root: Element, limits: MemoryLimits) -> None:
    """Make <memtune> say `limits`."""
    for key, tag in _LIMITS.items():
        x.put_scaled(root, f"memtune/{tag}", getattr(limits, key))


def _numa(root: Element) -> NumaTuning | None:
    if root.find("numatune/memory") is None:
        return None
    nodes = x.cpus(root, "numatune/memory", "nodeset")
    return NumaTuning(x.attribute(root, "numatune/memory", "mode") or "strict", nodes)


def _pages(backing: Element) -> tuple[HugePages, ...] | None:
    pages = backing.find("hugepages")
    return None if pages is None else tuple(_page(page) for page in pages.findall("page"))


def _page(page: Element) -> HugePages:
    unit, text = page.get("unit") or "KiB", page.get("size") or ""
    size = x.understood("size of <page>", lambda t: to_kib(x.integer(t), unit), text)
    return HugePages(size, x.cpus(page, ".", "nodeset"))


def _write_pages(root: Element, wanted: tuple[HugePages, ...] | None) -> None:
    backing = root.find("memoryBacking")
    if wanted == (None if backing is None else _pages(backing)):
        return
    element = None if backing is None else backing.find("hugepages")
    if wanted is None:
        if element is not None:
            x.drop(element)
        return
    element = x.ensure(root, "memoryBacking/hugepages")
    for page in element.findall("page"):
        element.remove(page)
    for pages in wanted:
        made = x.make(element, "page", size=str(pages.size), unit="KiB")
        x.put_cpus(made, ".", "nodeset", pages.nodes)
