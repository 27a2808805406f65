"""What a rule of VM entry is, and what a broken one says; both vendors declare theirs with this.

A rule is a pure predicate over named fields and the processor's capabilities.  Checking returns
*all* broken rules, and apart from them the rules that could not be checked because a field they
read is missing: a rule that did not look never passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

Field = TypeVar("Field", bound=int)
Capabilities = TypeVar("Capabilities")
Predicate = Callable[[Mapping[Field, int], Capabilities], bool]


class Outcome(Enum):
    """What the processor does when the rule is broken."""

    FAIL_CONTROL = "VMfailValid 7: VM entry with invalid control field(s)"
    FAIL_HOST = "VMfailValid 8: VM entry with invalid host-state field(s)"
    EXIT_GUEST_STATE = "VM exit 33: VM-entry failure due to invalid guest state"
    EXIT_MSR_LOADING = "VM exit 34: VM-entry failure due to MSR loading"
    ABORT_MSR_SAVING = "VMX abort 1: there was a failure in saving guest MSRs"
    VMEXIT_INVALID = "#VMEXIT with VMEXIT_INVALID (-1)"


@dataclass(frozen=True, slots=True)
class Rule(Generic[Field, Capabilities]):
    """One rule of the manual.

    `reads` names every field that `holds` looks at, the one to blame first.
    `section` is the title of the manual's section.  `remedy` says what to change.
    `assumes` names the capability that the rule depends on, empty where there is none.
    """

    id: str
    text: str
    section: str
    reads: tuple[Field, ...]
    holds: Predicate[Field, Capabilities]
    outcome: Outcome
    remedy: str
    assumes: str = ""
    qualification: int = 0


@dataclass(frozen=True, slots=True)
class Violation(Generic[Field, Capabilities]):
    """A broken rule with the values that broke it, in the order of `rule.reads`.

    A value is None where the state lacks the field and the rule is broken without it.
    """

    rule: Rule[Field, Capabilities]
    values: tuple[int | None, ...]

    def __str__(self) -> str:
        seen = ", ".join(
            f"{getattr(field, 'name', field)} = {value:#x}"
            for field, value in zip(self.rule.reads, self.values, strict=True)
            if value is not None
        )
        return f"{self.rule.id}: {self.rule.text} ({seen}) [{self.rule.section}]"


@dataclass(frozen=True, slots=True)
class Verdict(Generic[Field, Capabilities]):
    """All broken rules, and the rules that could not be checked for lack of a field."""

    broken: list[Violation[Field, Capabilities]]
    unchecked: list[Rule[Field, Capabilities]]


def judge(
    rules: Iterable[Rule[Field, Capabilities]],
    state: Mapping[Field, int],
    capabilities: Capabilities,
) -> Verdict[Field, Capabilities]:
    """Hold `state` against every one of `rules`; never stops at the first."""
    broken, unchecked = [], []
    for rule in rules:
        try:
            if rule.holds(state, capabilities):
                continue
        except KeyError:
            unchecked.append(rule)
            continue
        broken.append(Violation(rule, tuple(state.get(field) for field in rule.reads)))
    return Verdict(broken, unchecked)
