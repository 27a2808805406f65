"""libvirt's <cpu>: mode, model, features, topology, address width, NUMA nodes of the guest."""

from __future__ import annotations

from undervisor.domains import xml_tree as x
from undervisor.domains.model import AddressBits, Cell, Cpu, Mode, Policy, Topology
from undervisor.domains.quantities import to_kib
from undervisor.domains.xml_tree import Element

_ON = {"on": True, "off": False, "": None}
_PARTS = ("sockets", "dies", "cores", "threads")


def read(root: Element) -> Cpu:
    """The CPU of a domain."""
    cpu = root.find("cpu")
    if cpu is None:
        return Cpu()
    return Cpu(
        mode=_mode(cpu),
        model=x.text_of(cpu, "model"),
        vendor=x.text_of(cpu, "vendor"),
        features=tuple(_features(cpu).items()),
        check=x.attribute(cpu, ".", "check"),
        match=x.attribute(cpu, ".", "match"),
        fallback=x.attribute(cpu, "model", "fallback"),
        migratable=x.understood(
            "migratable of <cpu>", _switch, x.attribute(cpu, ".", "migratable")
        ),
        topology=_topology(cpu),
        address_bits=_address_bits(cpu),
        cells=tuple(_cell(cell, at) for at, cell in enumerate(cpu.findall("numa/cell"))),
    )


def write(root: Element, cpu: Cpu) -> None:
    """Make the document's <cpu> say `cpu`."""
    element = root.find("cpu")
    if element is None:
        if cpu == Cpu():
            return
        element = x.ensure(root, "cpu")
    if _mode(element) is not cpu.mode:
        x.put_attribute(element, ".", "mode", cpu.mode.value)
    for name in ("match", "check"):
        x.put_attribute(element, ".", name, getattr(cpu, name))
    migratable = {None: "", True: "on", False: "off"}[cpu.migratable]
    x.put_attribute(element, ".", "migratable", migratable)
    if cpu.model != x.text_of(element, "model"):
        x.put(element, "model", cpu.model or None)
    x.put_attribute(element, "model", "fallback", cpu.fallback)
    if cpu.vendor != x.text_of(element, "vendor"):
        x.put(element, "vendor", cpu.vendor or None)
    _write_topology(element, cpu.topology)
    _write_address_bits(element, cpu.address_bits)
    _write_features(element, dict(cpu.features))
    _write_cells(element, cpu.cells)


def _mode(cpu: Element) -> Mode:
    said = x.attribute(cpu, ".", "mode")
    default = "custom" if x.text_of(cpu, "model") else ""
    return x.understood("mode of <cpu>", Mode, said or default)


def _switch(text: str) -> bool | None:
    if text not in _ON:
        raise ValueError(f"{text[:20]!r} is neither on nor off")
    return _ON[text]


def _features(cpu: Element) -> dict[str, Policy]:
    """Policies by name; libvirt's default is require, and the last word counts."""
    return {
        name: x.understood(f"policy of {name[:40]}", Policy, f.get("policy") or "require")
        for f in cpu.findall("feature")
        if (name := f.get("name") or "")
    }


def _write_features(cpu: Element, wanted: dict[str, Policy]) -> None:
    has = _features(cpu)
    for feature in cpu.findall("feature"):
        if (feature.get("name") or "") not in wanted and feature.get("name"):
            x.drop(feature)
    for name, policy in wanted.items():
        if name not in has:
            made = x.make(cpu, "feature", policy=policy.value)
            made.set("name", name)
        elif has[name] is not policy:
            for feature in cpu.findall("feature"):
                if feature.get("name") == name:
                    feature.set("policy", policy.value)


def _topology(cpu: Element) -> Topology | None:
    if cpu.find("topology") is None:
        return None
    values = {part: x.number_attribute(cpu, "topology", part) for part in _PARTS}
    return Topology(**{part: 1 if value is None else value for part, value in values.items()})


def _write_topology(cpu: Element, topology: Topology | None) -> None:
    if _topology(cpu) == topology:
        return
    if topology is None:
        found = cpu.find("topology")
        if found is not None:
            x.drop(found)
        return
    element = x.ensure(cpu, "topology")
    for part in _PARTS:
        value = getattr(topology, part)
        if part != "dies" or value != 1 or element.get(part):
            element.set(part, str(value))


def _address_bits(cpu: Element) -> AddressBits | None:
    if cpu.find("maxphysaddr") is None:
        return None
    return AddressBits(
        host=x.attribute(cpu, "maxphysaddr", "mode") == "passthrough",
        bits=x.number_attribute(cpu, "maxphysaddr", "bits") or 0,
        limit=x.number_attribute(cpu, "maxphysaddr", "limit") or 0,
    )


def _write_address_bits(cpu: Element, width: AddressBits | None) -> None:
    if _address_bits(cpu) == width:
        return
    found = cpu.find("maxphysaddr")
    if width is None:
        if found is not None:
            x.drop(found)
        return
    element = x.ensure(cpu, "maxphysaddr")
    element.set("mode", "passthrough" if width.host else "emulate")
    x.put_number_attribute(element, ".", "bits", width.bits or None)
    x.put_number_attribute(element, ".", "limit", width.limit or None)


def _cell(element: Element, ordinal: int) -> Cell:
    said = x.number_attribute(element, ".", "id")
    return Cell(
        id=ordinal if said is None else said,
        cpus=x.cpus(element, ".", "cpus"),
        memory=_cell_memory(element),
        ordinal=ordinal,
    )


def _cell_memory(element: Element) -> int:
    unit = element.get("unit") or "KiB"
    text = element.get("memory") or "0"
    return x.understood("memory of <cell>", lambda t: to_kib(x.integer(t), unit), text)


def _write_cells(cpu: Element, cells: tuple[Cell, ...]) -> None:
    elements = cpu.findall("numa/cell")
    if not elements and not cells:
        return
    pairs = x.match_by_ordinal(
        elements, [c.ordinal for c in cells], lambda _: x.make(x.ensure(cpu, "numa"), "cell")
    )
    for cell, element in zip(cells, pairs, strict=True):
        if cell != _cell(element, cell.ordinal if cell.ordinal >= 0 else cell.id):
            element.set("id", str(cell.id))
            x.put_cpus(element, ".", "cpus", cell.cpus)
            if _cell_memory(element) != cell.memory:
                element.set("memory", str(cell.memory))
                element.set("unit", "KiB")
