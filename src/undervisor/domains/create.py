"""A new guest from an operator's wishes: recommended where nothing is said, exact where it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from undervisor.domains import options
from undervisor.domains.choice import Choice, Chosen, Outcome
from undervisor.domains.cpu_features import MITIGATIONS, libvirt_name
from undervisor.domains.model import (
    Boot,
    Console,
    Cpu,
    CpuLimits,
    Guest,
    Memory,
    MemoryLimits,
    Mode,
    Policy,
)
from undervisor.domains.quantities import parse_size
from undervisor.domains.recommend import Need, Recommendation, recommend, required
from undervisor.domains.workarounds import work_around
from undervisor.errors import BadInput
from undervisor.host.facts.processor import Processor

_MODES = {
    "host": Mode.PASSTHROUGH,
    "host-passthrough": Mode.PASSTHROUGH,
    "host-model": Mode.HOST_MODEL,
    "max": Mode.MAXIMUM,
    "maximum": Mode.MAXIMUM,
}
MACHINES = {"x86_64": "q35", "s390x": "s390-ccw-virtio"}


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the command line says; empty and None mean "as recommended" or "not at all"."""

    name: str
    need: Need = Need.HERE
    type: str = "kvm"
    architecture: str = "x86_64"
    machine: str = ""
    memory: str = "4G"
    vcpus: int = 0
    cpu: str = ""
    check: str = ""
    migratable: str = ""
    require: Sequence[str] = ()
    disable: Sequence[str] = ()
    workarounds: Sequence[str] = ()
    topology: str = ""
    numa: Sequence[str] = ()
    pin: str = ""
    allow: str = ""
    huge_pages: str = ""
    balloon: str = ""
    hard_limit: str = ""
    soft_limit: str = ""
    shares: int | None = None
    period: int | None = None
    quota: int | None = None
    disks: Sequence[str] = ()
    networks: Sequence[str] = ()
    bridges: Sequence[str] = ()
    boot: Boot = field(default_factory=Boot)
    gdb: bool = False
    agent: bool = True


def create(
    wishes: Wishes, extension: str, processor: Processor | None, known: frozenset[str] | None
) -> Chosen:
    """The guest, and what was chosen for it.

    `processor` is the weakest host's, `known` the features that libvirt knows, each None where it
    is not known.
    """
    if wishes.architecture not in MACHINES:
        raise BadInput(f"{wishes.architecture!r}: no guests for that are made here",
                       hint=", ".join(MACHINES))  # fmt: skip
    vcpus = _vcpus(wishes)
    found = _cpu(wishes, extension, processor)
    choices = [Choice("cpu", Outcome.CHANGED, _called(found.cpu), "; ".join(found.why))]
    cpu = replace(
        found.cpu,
        topology=options.topology(wishes.topology) if wishes.topology else None,
        cells=options.cells(wishes.numa),
    )
    cpu, about = _features(cpu, wishes, extension, known)
    choices += about
    guest = replace(_rest(wishes, vcpus), cpu=cpu)
    for word in wishes.workarounds:
        guest, why = work_around(guest, word)
        choices.append(Choice("workaround", Outcome.CHANGED, word, why))
    return Chosen(guest, tuple(choices))


def _vcpus(wishes: Wishes) -> int:
    """Said, or what the topology, the pins or the NUMA nodes need; else 2."""
    said = [wishes.vcpus] if wishes.vcpus else []
    if wishes.topology:
        said.append(options.topology(wishes.topology).total)
    if wishes.pin:
        said.append(len(options.cpu_set(wishes.pin)))
    if wishes.numa:
        said.append(
            1 + max((max(c.cpus, default=0) for c in options.cells(wishes.numa)), default=0)
        )
    if len(set(said)) > 1:
        raise BadInput(
            f"the options disagree about the number of vCPUs: {', '.join(map(str, said))}"
        )
    if said and not 0 < said[0] <= 4096:
        raise BadInput(f"{said[0]} vCPUs", hint="1 to 4096")
    return said[0] if said else 2


def _cpu(wishes: Wishes, extension: str, processor: Processor | None) -> Recommendation:
    if not wishes.cpu:
        found = recommend(wishes.need, extension, processor)
    elif wishes.cpu in _MODES:
        mode = _MODES[wishes.cpu]
        check = "none" if mode in (Mode.PASSTHROUGH, Mode.MAXIMUM) else ""
        cpu = Cpu(mode=mode, check=check, features=required(extension))
        found = Recommendation(cpu, ("asked for", f"{extension} required"))
    else:
        options.one_of(wishes.cpu, [wishes.cpu] if _is_model(wishes.cpu) else [], "CPU model", str)
        cpu = Cpu(mode=Mode.CUSTOM, model=wishes.cpu, match="exact", fallback="forbid",
                  features=required(extension))  # fmt: skip
        why = f"{extension} required: a named model does not give it under KVM unless asked"
        found = Recommendation(cpu, ("asked for", why))
    cpu = found.cpu
    if wishes.check:
        cpu = replace(cpu, check=options.one_of(wishes.check, _CHECKS, "check", str))
    if wishes.migratable:
        on = options.one_of(wishes.migratable, ("on", "off"), "switch", lambda t: t == "on")
        cpu = replace(cpu, migratable=on)
    return Recommendation(cpu, found.why)


_CHECKS = ("none", "partial", "full")


def _is_model(text: str) -> bool:
    return len(text) < 64 and all(c.isalnum() or c in "-_." for c in text) and text[0].isalnum()


def _called(cpu: Cpu) -> str:
    return f"{cpu.mode.value} {cpu.model}".strip()


def _features(
    cpu: Cpu, wishes: Wishes, extension: str, known: frozenset[str] | None
) -> tuple[Cpu, list[Choice]]:
    """Features asked for by name, in libvirt's words."""
    choices = []
    for names, policy in ((wishes.require, Policy.REQUIRE), (wishes.disable, Policy.DISABLE)):
        for name in names:
            proper = libvirt_name(name, extension)
            if proper != name:
                choices.append(_renamed(name, proper, known))
            if proper != name and known is not None and proper not in known:
                continue
            if not policy.gives and name in MITIGATIONS:
                why = f"it weakens the guest: {MITIGATIONS[name]}"
                choices.append(Choice("mitigation-off", Outcome.CHANGED, f"{name} disabled", why))
            cpu = cpu.with_feature(proper, policy)
    return cpu, choices


def _renamed(name: str, proper: str, known: frozenset[str] | None) -> Choice:
    why = f"{name} is a word of /proc/cpuinfo; libvirt and QEMU call it {proper}"
    if known is not None and proper not in known:
        why += ". The libvirt here knows neither, and would refuse the start. It comes with vmx"
        return Choice("feature", Outcome.REFUSED, f"{name} is not named", why)
    return Choice("feature", Outcome.CHANGED, f"{proper} for {name}", why)


def _rest(wishes: Wishes, vcpus: int) -> Guest:
    """Everything but the CPU."""
    return Guest(
        name=options.guest_name(wishes.name),
        memory=Memory(_memory(wishes.memory), huge=options.huge_pages(wishes.huge_pages)),
        type=options.one_of(wishes.type, ("kvm", "qemu"), "type", str),
        vcpus=vcpus,
        architecture=wishes.architecture,
        machine=wishes.machine or MACHINES[wishes.architecture],
        pinning=options.pinning(wishes.pin, wishes.allow, vcpus),
        memory_limits=MemoryLimits(
            hard=parse_size(wishes.hard_limit) if wishes.hard_limit else None,
            soft=parse_size(wishes.soft_limit) if wishes.soft_limit else None,
        ),
        cpu_limits=CpuLimits(shares=wishes.shares, period=wishes.period, quota=wishes.quota),
        boot=wishes.boot,
        disks=options.disks(wishes.disks),
        interfaces=options.interfaces(wishes.networks, wishes.bridges),
        consoles=(Console(),),
        agent=wishes.agent,
        balloon=options.balloon(wishes.balloon),
        extra=("-s",) if wishes.gdb else (),
    )


def _memory(text: str) -> int:
    size = parse_size(text)
    if size < 1024:
        raise BadInput(f"{text} of memory", hint="at least 1M; an L1 with guests takes gigabytes")
    return size
