"""libvirt's vCPUs: how many, where they run, and how much of the host's time they get."""

from __future__ import annotations

from undervisor.domains import xml_tree as x
from undervisor.domains.model import CpuLimits, CpuSet, Pinning
from undervisor.domains.xml_tree import Element
from undervisor.errors import BadInput

_LIMITS = ("shares", "period", "quota", "emulator_period", "emulator_quota")


def read_count(root: Element) -> int:
    """<vcpu>; 1 where it is not said."""
    count = x.number(root, "vcpu")
    if count is not None and not 0 < count <= x.integer("65535"):
        raise BadInput(f"<vcpu>: {count} processors are no number of processors")
    return 1 if count is None else count


def write_count(root: Element, count: int) -> None:
    """Make <vcpu> say `count`."""
    if read_count(root) != count:
        x.put(root, "vcpu", str(count))


def read_pinning(root: Element) -> Pinning:
    """Which host processors run what."""
    return Pinning(
        placement=x.attribute(root, "vcpu", "placement"),
        allowed=x.cpus(root, "vcpu", "cpuset"),
        vcpus=tuple(_pins(root, "vcpupin", "vcpu").items()),
        emulator=x.cpus(root, "cputune/emulatorpin", "cpuset"),
        iothreads=tuple(_pins(root, "iothreadpin", "iothread").items()),
    )


def write_pinning(root: Element, pinning: Pinning, count: int) -> None:
    """Make the document say `pinning`."""
    if (pinning.placement or pinning.allowed) and root.find("vcpu") is None:
        x.put(root, "vcpu", str(count))
    if root.find("vcpu") is not None:
        x.put_attribute(root, "vcpu", "placement", pinning.placement)
        x.put_cpus(root, "vcpu", "cpuset", pinning.allowed)
    _write_pins(root, "vcpupin", "vcpu", dict(pinning.vcpus))
    x.put_cpus(root, "cputune/emulatorpin", "cpuset", pinning.emulator)
    _write_pins(root, "iothreadpin", "iothread", dict(pinning.iothreads))


def read_limits(root: Element) -> CpuLimits:
    """Weight, periods and quotas of <cputune>."""
    return CpuLimits(**{name: x.number(root, f"cputune/{name}") for name in _LIMITS})


def write_limits(root: Element, limits: CpuLimits) -> None:
    """Make <cputune> say `limits`."""
    for name in _LIMITS:
        x.put_number(root, f"cputune/{name}", getattr(limits, name))


def _pins(root: Element, tag: str, key: str) -> dict[int, CpuSet]:
    found = {}
    for pin in root.findall(f"cputune/{tag}"):
        which = x.number_attribute(pin, ".", key)
        if which is None or not pin.get("cpuset"):
            raise BadInput(f"a <{tag}> lacks {key} or cpuset")
        found[which] = x.cpus(pin, ".", "cpuset")
    return found


def _write_pins(root: Element, tag: str, key: str, wanted: dict[int, CpuSet]) -> None:
    has = _pins(root, tag, key)
    for pin in root.findall(f"cputune/{tag}"):
        which = x.number_attribute(pin, ".", key)
        if which not in wanted:
            x.drop(pin)
        elif has[which] != wanted[which]:
            x.put_cpus(pin, ".", "cpuset", wanted[which])
    for which, where in wanted.items():
        if which not in has:
            pin = x.make(x.ensure(root, "cputune"), tag, **{key: str(which)})
            x.put_cpus(pin, ".", "cpuset", where)
