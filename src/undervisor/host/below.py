"""Is it really KVM on KVM?  Who executes this machine's instructions, with the evidence.

One sign alone can mislead: a signature can be copied, a flag hidden.  So signs of different kinds
are held together, and where they contradict each other the answer is unknown.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from undervisor.host.checks.place import exits
from undervisor.host.fact import Absent, Known
from undervisor.host.facts.machine import Machine
from undervisor.host.facts.software import Guest


class Below(Enum):
    """What is below."""

    NOTHING = "bare metal"
    KVM = "KVM"
    TCG = "emulation (QEMU TCG)"
    OTHER = "another hypervisor"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Answer:
    """The verdict and its evidence."""

    below: Below
    evidence: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.below.value} ({'; '.join(self.evidence)})"

    def as_json(self) -> dict[str, Any]:
        """The answer as JSON has it."""
        return {"below": self.below.name.lower(), "evidence": list(self.evidence)}


def below(machine: Machine) -> Answer:
    """What is below this machine, seen from inside."""
    place = machine.place
    exited, told = _timing(machine)
    if isinstance(place.hypervisor, Absent):
        if exited:
            return Answer(Below.UNKNOWN, ("no hypervisor shows", told))
        return Answer(Below.NOTHING, tuple(filter(None, (*place.evidence, told))))
    if not isinstance(place.hypervisor, Known):
        return Answer(Below.UNKNOWN, (str(place.hypervisor),))
    name = place.hypervisor.value
    evidence = [*place.evidence, *filter(None, [told])]
    if place.emulated:
        if exited:
            # TCG executes CPUID in a helper, which is slow, but so is everything else there.
            return Answer(Below.UNKNOWN, (*evidence, "an emulator's CPUID is not that dear"))
        return Answer(Below.TCG, tuple(evidence))
    if name != "KVM":
        verdict = Below.UNKNOWN if " or " in name else Below.OTHER
        return Answer(verdict, (name, *evidence))
    if isinstance(place.kvm_features, Known):
        evidence.append(f"KVM's feature leaf is {place.kvm_features.value:#x}")
    if exited is False:
        return Answer(Below.UNKNOWN, (*evidence, "yet CPUID does not exit, as it does under KVM"))
    return Answer(Below.KVM, tuple(evidence))


def _timing(machine: Machine) -> tuple[bool | None, str]:
    """Whether CPUID exits, and the words for it; None where it was not measured."""
    timing = machine.place.timing
    if not isinstance(timing, Known):
        return None, ""
    ticks = timing.value
    exited = exits(ticks.cpuid_ticks, ticks.plain_ticks)
    verb = "exits" if exited else "does not exit"
    return exited, f"CPUID {verb}: {ticks.cpuid_ticks} ticks, plain code {ticks.plain_ticks}"


def guest_answer(guest: Guest) -> Answer:
    """What a running guest of this machine runs on, seen from its hypervisor."""
    asks = "its command line asks for KVM" if guest.wants_kvm else "its command line has no KVM"
    if guest.holds_kvm is True:
        return Answer(Below.KVM, (asks, f"process {guest.pid} holds a KVM virtual machine"))
    if guest.holds_kvm is False:
        return Answer(Below.TCG, (asks, f"process {guest.pid} holds no KVM virtual machine"))
    files = f"the open files of process {guest.pid} can't be read"
    return Answer(Below.UNKNOWN if guest.wants_kvm else Below.TCG, (asks, files))
