"""Harden an L1: limits, isolation, mitigations; and what guides advise that would weaken it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from undervisor.domains.choice import Choice, Chosen, Outcome
from undervisor.domains.cpu_features import MITIGATIONS
from undervisor.domains.model import Console, Guest, Interface, Mode, Policy
from undervisor.domains.quantities import show_size

_MIB = 1024
PERIOD = 100_000
"""Microseconds; the kernel's own default."""


@dataclass(frozen=True, slots=True)
class Options:
    """`network` is the isolated network, empty to leave interfaces alone; `cpu_percent` limits each
    vCPU."""

    network: str = "isolated"
    cpu_percent: int = 100


def overhead(guest: Guest) -> int:
    """KiB that QEMU takes beside the guest's RAM: its own, page tables, each vCPU's, each disk's.

    libvirt's manual warns that nobody can say it exactly, so this is generous.
    """
    fixed, each_vcpu, each_disk = 1024 * _MIB, 32 * _MIB, 64 * _MIB
    tables = guest.memory.size // 100
    return fixed + tables + guest.vcpus * each_vcpu + len(guest.disks) * each_disk


def harden(guest: Guest, options: Options) -> Chosen:
    """The hardened guest, and every measure with what became of it."""
    choices: list[Choice] = []
    for measure in MEASURES:
        chosen = measure(guest, options)
        guest = chosen.guest
        choices += chosen.choices
    return Chosen(guest, (*choices, *WRONG_ADVICE))


def _settle(old: Guest, new: Guest, id_: str, what: str, why: str) -> Chosen:
    outcome = Outcome.KEPT if old == new else Outcome.CHANGED
    return Chosen(new, (Choice(id_, outcome, what, why),))


def _memory(guest: Guest, options: Options) -> Chosen:
    least = guest.memory.size + overhead(guest)
    limits = guest.memory_limits
    hard = limits.hard if limits.hard and limits.hard >= least else -(-least // _MIB) * _MIB
    soft = (
        limits.soft
        if limits.soft and guest.memory.size <= limits.soft <= hard
        else (guest.memory.size)
    )
    new = replace(guest, memory_limits=replace(limits, hard=hard, soft=soft))
    return _settle(
        guest,
        new,
        "memory-limit",
        f"hard {show_size(hard)}, soft {show_size(soft)}",
        "an L1 can make its QEMU grow; the hard limit has room for QEMU beside the RAM. "
        "A hard limit that equals the RAM gets the guest killed as soon as it uses it, "
        "a soft limit below the RAM has its memory swapped while others want some",
    )


def _cpu_time(guest: Guest, options: Options) -> Chosen:
    quota = PERIOD * options.cpu_percent // 100
    limits = replace(
        guest.cpu_limits, period=PERIOD, quota=quota, emulator_period=PERIOD, emulator_quota=PERIOD
    )
    new = replace(guest, cpu_limits=limits)
    return _settle(
        guest,
        new,
        "cpu-limit",
        f"{options.cpu_percent} % of a processor for each vCPU, one processor for the emulator",
        "libvirt's quota is that of each vCPU thread: 200000 of 100000 limits nothing, a "
        "thread can't use two processors. What L1 can drive without bound is device "
        "emulation, so the emulator gets a quota",
    )


def _features(guest: Guest, options: Options) -> Chosen:
    """Give back mitigations that the definition takes away."""
    taken = [n for n, p in guest.cpu.features if n in MITIGATIONS and not p.gives]
    if not taken:
        return Chosen(
            guest,
            (
                Choice(
                    "mitigations",
                    Outcome.KEPT,
                    "none is switched off",
                    "the guest's kernel protects itself with them",
                ),
            ),
        )
    cpu = guest.cpu
    for name in taken:
        cpu = cpu.with_feature(name, None)
    reasons = "; ".join(f"{n}: {MITIGATIONS[n]}" for n in taken)
    return _settle(
        guest,
        replace(guest, cpu=cpu),
        "mitigations",
        f"{', '.join(taken)} no longer disabled",
        f"their removal does not protect the host, it weakens the guest ({reasons})",
    )


def _invtsc(guest: Guest, options: Options) -> Chosen:
    cpu = guest.cpu
    if cpu.mode is not Mode.PASSTHROUGH or cpu.migratable is False:
        return Chosen(
            guest,
            (
                Choice(
                    "invtsc",
                    Outcome.KEPT,
                    "as the definition has it",
                    "only host-passthrough could bring it unasked",
                ),
            ),
        )
    new = replace(guest, cpu=cpu.with_feature("invtsc", Policy.DISABLE))
    return _settle(
        guest,
        new,
        "invtsc",
        "disabled",
        "no protection: with it the guest could not be saved or moved, and while "
        "migratable is on QEMU leaves it out anyway. Harmless, so the guide is followed",
    )


def _network(guest: Guest, options: Options) -> Chosen:
    if not options.network:
        return Chosen(
            guest,
            (
                Choice(
                    "network",
                    Outcome.REFUSED,
                    "interfaces stay as they are",
                    "asked for: what L1's guests reach is what L1 reaches",
                ),
            ),
        )
    interfaces = tuple(_isolated(i, options.network) for i in guest.interfaces)
    new = replace(guest, interfaces=interfaces)
    return _settle(
        guest,
        new,
        "network",
        f"interfaces on the isolated network {options.network}",
        "L2 guests, which nobody on this host knows, reach what L1 reaches. The network "
        f"must be there: undervisor network up {options.network}",
    )


def _isolated(interface: Interface, network: str) -> Interface:
    if interface.kind == "network" and interface.source == network:
        return interface
    return replace(interface, kind="network", source=network, model=interface.model or "virtio")


def _console(guest: Guest, options: Options) -> Chosen:
    if guest.consoles:
        return Chosen(
            guest,
            (Choice("console", Outcome.KEPT, "a text console", "a way in that needs no network"),),
        )
    new = replace(guest, consoles=(Console(),))
    return _settle(
        guest,
        new,
        "console",
        "a text console",
        "with an isolated network it is the operator's way in",
    )


MEASURES: tuple[Callable[[Guest, Options], Chosen], ...] = (
    _memory,
    _cpu_time,
    _features,
    _invtsc,
    _network,
    _console,
)

WRONG_ADVICE = (
    Choice(
        "spec-ctrl",
        Outcome.REFUSED,
        "spec-ctrl and amd-stibp are not disabled",
        "guides call them risky features. They are the guest's own protection against Spectre v2; "
        "without them L1 can protect neither itself nor one L2 from another, and the host gains "
        "nothing",
    ),
    Choice(
        "shares",
        Outcome.REFUSED,
        "no shares of 2048",
        "guides list it as a limit. It is a weight, twice the default: the guest gets more than "
        "others, not less",
    ),
    Choice(
        "execmem",
        Outcome.REFUSED,
        "virt_use_execmem stays off",
        "guides switch it on under SELinux. It lets QEMU make writable memory executable, which "
        "only emulation (TCG) needs; with KVM it only helps an attacker",
    ),
    Choice(
        "log-level",
        Outcome.REFUSED,
        "libvirt's log level stays",
        "guides set log_level = 1. That is debug: every call of every client, many lines a second, "
        "in which an attack is lost; audit is in /var/log/audit and the domain's own log",
    ),
)
"""What the guides say and we do not do; always told."""
