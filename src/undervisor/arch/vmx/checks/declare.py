"""How the rules of VM entry are declared: a section of the manual collects its rules in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from undervisor.arch.rules import Outcome, Rule
from undervisor.arch.vmx.capabilities import VmxCapabilities
from undervisor.arch.vmx.controls import PrimaryControls
from undervisor.arch.vmx.fields import VmcsField as F

VmxRule = Rule[int, VmxCapabilities]
State = Mapping[Any, int]
Holds = Callable[[State, VmxCapabilities], Any]
Condition = Callable[[State], Any]

ACTIVATE_SECONDARY = PrimaryControls.activate_secondary_controls
ACTIVATE_TERTIARY = PrimaryControls.activate_tertiary_controls

SECONDARY = (F.SECONDARY_CONTROLS, F.PRIMARY_CONTROLS)
TERTIARY = (F.TERTIARY_CONTROLS, F.PRIMARY_CONTROLS)
EXIT_2 = (F.SECONDARY_EXIT_CONTROLS, F.EXIT_CONTROLS)


class Section:
    """A section of the manual and the rules that it states."""

    def __init__(self, prefix: str, title: str, outcome: Outcome) -> None:
        self.prefix = prefix
        self.title = title
        self.outcome = outcome
        self.rules: list[VmxRule] = []

    def rule(
        self,
        name: str,
        text: str,
        reads: tuple[int, ...],
        holds: Holds,
        remedy: str,
        *,
        assumes: str = "",
        qualification: int = 0,
    ) -> None:
        """Add the rule `prefix.name`; the arguments are those of `Rule`."""
        self.rules.append(
            Rule(
                id=f"{self.prefix}.{name}",
                text=text,
                section=self.title,
                reads=tuple(dict.fromkeys(reads)),
                holds=holds,
                outcome=self.outcome,
                remedy=remedy,
                assumes=assumes,
                qualification=qualification,
            )
        )


def primary(bit: int) -> Condition:
    """Whether a primary processor-based control is 1."""
    field = F.PRIMARY_CONTROLS
    return lambda s: s[field] & bit


def secondary(bit: int) -> Condition:
    """Whether a secondary control is 1; all are 0 unless the secondary controls are active."""
    first, second, activate = F.PRIMARY_CONTROLS, F.SECONDARY_CONTROLS, ACTIVATE_SECONDARY
    return lambda s: s[first] & activate and s[second] & bit


def tertiary(bit: int) -> Condition:
    """Whether a tertiary control is 1; all are 0 unless the tertiary controls are active."""
    first, third, activate = F.PRIMARY_CONTROLS, F.TERTIARY_CONTROLS, ACTIVATE_TERTIARY
    return lambda s: s[first] & activate and s[third] & bit


def exit_2(bit: int) -> Condition:
    """Whether a secondary VM-exit control is 1; all are 0 unless they are active."""
    first, second, activate = F.EXIT_CONTROLS, F.SECONDARY_EXIT_CONTROLS, 1 << 31
    return lambda s: s[first] & activate and s[second] & bit


def address(
    section: Section,
    name: str,
    label: str,
    field: F,
    *,
    alignment: int,
    condition: Condition,
    given: str,
    reads: tuple[int, ...],
) -> None:
    """Two rules for the address of a structure: aligned, and within the address width."""
    low = alignment - 1
    section.rule(
        f"{name}.aligned",
        f"If {given}, the {label} must be aligned to {alignment} bytes",
        (field, *reads),
        lambda s, c: not s[field] & low or not condition(s),
        f"clear the low {low.bit_length()} bits of the {label}, or give the physical address of "
        f"a structure that is aligned to {alignment} bytes",
    )
    section.rule(
        f"{name}.width",
        f"If {given}, the {label} must not set bits beyond the physical-address width",
        (field, *reads),
        lambda s, c: not s[field] & c.beyond_width or not condition(s),
        f"give the {label} as a physical address, not a virtual one, below the width that CPUID "
        "80000008H:EAX[7:0] reports",
        assumes="the processor's physical-address width",
    )
