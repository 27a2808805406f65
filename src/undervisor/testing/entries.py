"""A VM entry that failed, with every rule that it broke."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.explain.diagnosis import AnyViolation, diagnose, failure_sentence
from undervisor.explain.dump import VMX, Dump, Failure
from undervisor.explain.text import violation_lines
from undervisor.hypervisor.nested.svm import NestedSvm
from undervisor.hypervisor.nested.vmx import NestedVmx
from undervisor.hypervisor.trace import Transition
from undervisor.hypervisor.vcpu import Vcpu

_INSTRUCTIONS: Final = frozenset({"VMLAUNCH", "VMRESUME", "VMRUN"})
_FAILURE: Final = 1 << 31


@dataclass(frozen=True, slots=True)
class FailedEntry:
    """`how` it failed, in the manual's words; `rules` are the ids of the broken rules.

    `lines` say what `undervisor explain` says of them: rule, values, remedy, section.
    """

    transition: Transition
    how: str
    rules: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()

    def __str__(self) -> str:
        t = self.transition
        head = f"{t.reason} on vCPU {t.vcpu} at rip {t.rip:#x} failed: {self.how}"
        return "\n".join((head, *self.lines))


def failed_entry(vcpu: Vcpu, transition: Transition) -> FailedEntry | None:
    """What was wrong, asked right after the transition; None where no entry failed in it."""
    if transition.reason not in _INSTRUCTIONS or (transition.level, transition.to) != (1, 1):
        return None
    nested = vcpu.nested
    if isinstance(nested, NestedSvm):
        return _failed_vmrun(nested, transition)
    return _failed_vmx(nested, transition) if isinstance(nested, NestedVmx) else None


def _failed_vmrun(nested: NestedSvm, transition: Transition) -> FailedEntry | None:
    verdict = nested.state.broken
    if nested.reason != "#VMEXIT(INVALID)" or verdict is None:
        return None
    return _entry(transition, failure_sentence(Failure(code=-1)), list(verdict.broken))


def _failed_vmx(nested: NestedVmx, transition: Transition) -> FailedEntry | None:
    vmcs = nested.vmx.current
    if vmcs is None:
        # A fault is in the trace; this is the instruction that ended with CF set.
        good = transition.action.startswith("emulate")
        return _entry(transition, failure_sentence(Failure(error=0)), []) if good else None
    reason = vmcs.fields[F.EXIT_REASON]
    if nested.reason.startswith("VMfailValid"):
        failure = Failure(error=vmcs.fields[F.VM_INSTRUCTION_ERROR])
    elif reason & _FAILURE and transition.action == "go on in L1":
        failure = Failure(reason=reason, qualification=vmcs.fields[F.EXIT_QUALIFICATION])
    else:
        return None
    state = {field: value for field, value in vmcs.fields.items() if field != F.EXIT_REASON}
    found = diagnose(Dump("VMCS", VMX, state, failure=failure), nested.capabilities)
    return _entry(transition, failure_sentence(failure), found.broken)


def _entry(transition: Transition, how: str, broken: list[AnyViolation]) -> FailedEntry:
    lines = [
        str(line)
        for place, violation in enumerate(broken)
        for line in violation_lines(violation, place == 0, known=True)
    ]
    return FailedEntry(transition, how, tuple(v.rule.id for v in broken), tuple(lines))
