"""Verify from inside a guest that it is an L1: flags, module, parameter, device, a nested guest.

Each step is a function of what was seen there; `verify` works on any `Host`: a guest behind its
agent, SSH, a console, a level of a lab, or this machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from undervisor.domains.nested_proof import Proof, missing, prove
from undervisor.host.access.protocol import Host
from undervisor.host.below import Below, below
from undervisor.host.fact import Fact, Known, value_or
from undervisor.host.facts.kvm import Presence
from undervisor.host.facts.machine import Machine, gather


class Verdict(Enum):
    """What a step says."""

    GOOD = "ok"
    NOTE = "note"
    BAD = "fail"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Step:
    """One step's answer."""

    id: str
    title: str
    verdict: Verdict
    evidence: str
    remedy: str = ""

    def as_json(self) -> dict[str, str]:
        """The step as JSON has it."""
        return {
            "id": self.id,
            "title": self.title,
            "verdict": self.verdict.value,
            "evidence": self.evidence,
            "remedy": self.remedy,
        }


@dataclass(frozen=True, slots=True)
class Verification:
    """All steps on one machine, in order."""

    machine: str
    steps: tuple[Step, ...]

    @property
    def good(self) -> bool:
        """A nested guest ran.  The other steps explain; only this one proves."""
        return all(s.verdict is Verdict.GOOD for s in self.steps if s.id == "nested-guest")

    def as_json(self) -> dict[str, Any]:
        """The verification as JSON has it."""
        return {
            "machine": self.machine,
            "verified": self.good,
            "steps": [step.as_json() for step in self.steps],
        }


def verify(host: Host) -> Verification:
    """Take every step on `host`; the last one runs a guest there."""
    machine = gather(host)
    steps = [Step(id_, title, *look(machine)) for id_, title, look in STEPS]
    steps.append(_nested_guest(prove(host)))
    return Verification(host.name, tuple(steps))


Answer = tuple[Verdict, str, str]


def _flags(machine: Machine) -> Answer:
    flag = machine.processor.extension
    if not flag:
        return Verdict.UNKNOWN, "the processor's vendor has no such extension, or hides", ""
    has = machine.processor.has(flag)
    if has is None:
        return Verdict.UNKNOWN, str(machine.processor.flags), ""
    if has:
        return Verdict.GOOD, f"/proc/cpuinfo has {flag}", ""
    return (Verdict.BAD, f"/proc/cpuinfo has no {flag}",
            "the definition does not give it: undervisor guest diff NAME")  # fmt: skip


def _below_here(machine: Machine) -> Answer:
    answer = below(machine)
    verdicts = {Below.KVM: Verdict.GOOD, Below.UNKNOWN: Verdict.UNKNOWN}
    return verdicts.get(answer.below, Verdict.NOTE), str(answer), ""


def _module(machine: Machine) -> Answer:
    kvm = machine.kvm
    if kvm.presence in (Presence.LOADED, Presence.BUILT_IN):
        return Verdict.GOOD, f"{kvm.expected} is {kvm.presence.value}", ""
    if kvm.presence is Presence.UNKNOWN:
        return Verdict.UNKNOWN, f"{kvm.expected}: {kvm.presence.value}", ""
    if kvm.others:
        return Verdict.NOTE, f"not {kvm.expected}, but {', '.join(kvm.others)}", ""
    evidence = f"{kvm.expected} is {kvm.presence.value}"
    if kvm.presence is Presence.AVAILABLE:
        return Verdict.BAD, evidence, f"sudo modprobe {kvm.expected}"
    return Verdict.BAD, evidence, "install a kernel with KVM in the guest"


def _nested(machine: Machine) -> Answer:
    fact = machine.kvm.nested
    if not isinstance(fact, Known):
        return Verdict.UNKNOWN, str(fact), ""
    if fact.value:
        return Verdict.GOOD, f"{fact.source} is on: L2 could be a hypervisor, too", ""
    return (Verdict.NOTE, f"{fact.source} is off",
            "only an L3 needs it: sudo undervisor enable, inside the guest")  # fmt: skip


def _device(machine: Machine) -> Answer:
    device = machine.kvm.device
    if not isinstance(device, Known):
        return Verdict.BAD, str(device), "load the module, or make the node"
    usable = value_or(machine.kvm.usable, None)
    if usable is None:
        return Verdict.UNKNOWN, str(machine.kvm.usable), ""
    mode = f"/dev/kvm is {device.value.mode:04o} {device.value.owner}:{device.value.group}"
    if usable:
        return Verdict.GOOD, mode, ""
    return Verdict.BAD, f"{mode}; this user may not use it", "sudo usermod -aG kvm USER"


STEPS: tuple[tuple[str, str, Callable[[Machine], Answer]], ...] = (
    ("below", "what this guest runs on", _below_here),
    ("flags", "the processor shows the extension", _flags),
    ("module", "KVM's module is loaded", _module),
    ("nested-parameter", "KVM's parameter nested is on", _nested),
    ("device", "/dev/kvm can be used", _device),
)
"""What guides tell people to look at by hand, in the order of the layers."""


def _nested_guest(fact: Fact[Proof]) -> Step:
    title = "a nested guest runs under KVM"
    if not isinstance(fact, Known):
        return Step("nested-guest", title, Verdict.UNKNOWN, str(fact), missing(fact))
    proof = fact.value
    if proof.ran:
        return Step("nested-guest", title, Verdict.GOOD, proof.evidence)
    return Step("nested-guest", title, Verdict.BAD, proof.evidence,
                "undervisor check, inside the guest, names the layer")  # fmt: skip
