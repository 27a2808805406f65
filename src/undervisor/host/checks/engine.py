"""Run the checks of all layers and say what follows from them together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from undervisor.host.access.protocol import KvmOffer
from undervisor.host.checks import (
    device,
    firmware,
    kernel,
    live,
    place,
    processor,
    security,
    software,
    zsystem,
)
from undervisor.host.checks.finding import Finding, Layer, Level
from undervisor.host.fact import Fact
from undervisor.host.facts.machine import Machine

Check = Callable[[Machine], Iterator[Finding]]

CHECKS: tuple[Check, ...] = (
    place.check,
    firmware.check,
    processor.check,
    kernel.check,
    zsystem.check,
    device.check,
    software.check,
)
"""The layers from the ground up."""


class Verdict(Enum):
    """Whether this machine can run guests that run guests."""

    USABLE = "nested KVM is usable here"
    NOT_USABLE = "nested KVM is not usable here"
    UNKNOWN = "whether nested KVM is usable here is unknown"


@dataclass(frozen=True, slots=True)
class Examination:
    """All findings in the order of the layers, and what they amount to.

    `cause` is the lowest layer's failure: the one to remedy first.
    """

    machine: str
    findings: tuple[Finding, ...]
    verdict: Verdict
    cause: Finding | None

    @property
    def safe(self) -> bool:
        """No failure of any layer, security included."""
        return all(finding.kind.level is not Level.FAIL for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """The examination as JSON has it."""
        return {
            "machine": self.machine,
            "verdict": self.verdict.name.lower().replace("_", "-"),
            "cause": self.cause.kind.id if self.cause else None,
            "findings": [finding.as_json() for finding in self.findings],
        }


def examine(
    machine: Machine,
    *,
    with_security: bool = False,
    offer: Fact[KvmOffer] | None = None,
    proof: live.Proof | None = None,
) -> Examination:
    """Every finding on `machine`.

    With `offer`, what KVM itself answered counts too, and with `proof` what came of a guest on it.
    """
    checks = (*CHECKS, security.check) if with_security else CHECKS
    found = [finding for check in checks for finding in check(machine)]
    if offer is not None:
        found += live.check(machine, offer, proof)
    found.sort(key=lambda finding: finding.kind.layer)
    nesting = [f for f in found if f.kind.layer is not Layer.SECURITY]
    failures = [f for f in nesting if f.kind.level is Level.FAIL]
    doubts = [f for f in nesting if f.kind.decides]
    if failures:
        verdict, cause = Verdict.NOT_USABLE, failures[0]
    elif doubts:
        verdict, cause = Verdict.UNKNOWN, doubts[0]
    else:
        verdict, cause = Verdict.USABLE, None
    return Examination(machine.name, tuple(found), verdict, cause)
