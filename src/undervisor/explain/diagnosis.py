"""From a dump to its broken rules, the likely cause first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from undervisor.arch.rules import Outcome, Rule, Verdict, Violation
from undervisor.arch.svm.capabilities import ANY_PROCESSOR, SvmCapabilities
from undervisor.arch.svm.checks import RULES as SVM_RULES
from undervisor.arch.svm.exits import ExitCode, signed_exit_code
from undervisor.arch.svm.vmcb import VmcbField
from undervisor.arch.vmx.capabilities import CURRENT_PROCESSOR, VmxCapabilities
from undervisor.arch.vmx.checks import ENTRY_RULES
from undervisor.arch.vmx.checks import RULES as VMX_RULES
from undervisor.arch.vmx.checks.inputs import EntryInput
from undervisor.arch.vmx.errors import VmInstructionError
from undervisor.arch.vmx.exits import EntryFailureQualification, ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.explain.dump import (
    SVM,
    SVM_WIDTHS,
    VMX,
    VMX_WIDTHS,
    Dump,
    Failure,
    Observation,
    field_name,
)
from undervisor.explain.partial import judge_partly

AnyRule = Rule[Any, Any]
AnyViolation = Violation[Any, Any]
AnyCapabilities = VmxCapabilities | SvmCapabilities

_EVERY: tuple[AnyRule, ...] = (*VMX_RULES, *SVM_RULES)
ALL_RULES: dict[str, AnyRule] = {rule.id: rule for rule in _EVERY}
"""Every rule of both vendors by its id."""

_MANUAL_ORDER = {rule_id: number for number, rule_id in enumerate(ALL_RULES)}

_OUTCOMES = {
    VmInstructionError.ENTRY_WITH_INVALID_CONTROL_FIELDS: Outcome.FAIL_CONTROL,
    VmInstructionError.ENTRY_WITH_INVALID_HOST_STATE_FIELDS: Outcome.FAIL_HOST,
}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What is wrong with a dump.

    `broken` is ordered by likelihood.  `unchecked` could not be decided for lack of fields.
    `checked` counts the rules that were decided.  `capabilities_known`: they were given, not
    assumed.
    """

    dump: Dump
    broken: list[AnyViolation]
    unchecked: list[AnyRule]
    checked: int
    failure: Failure | None
    observations: list[Observation]
    named: list[AnyRule]
    capabilities_known: bool

    @property
    def is_clean(self) -> bool:
        """Whether nothing speaks of a failure: no broken rule, no failure that the input shows."""
        bad = any(observation.bad for observation in self.observations)
        return not self.broken and not self.failure and not bad and not self.named

    def missing(self, rule: AnyRule) -> list[str]:
        """The names of the fields that the rule reads and the dump lacks."""
        return [
            field_name(int(field), self.dump.vendor)
            for field in rule.reads
            if field not in self.dump.state
        ]


def explain(
    state: Mapping[Any, int], capabilities: AnyCapabilities | None = None
) -> list[AnyViolation]:
    """The rules of entry that `state` breaks, the likeliest cause first.

    `state` maps `VmcsField`s (and `EntryInput`s) or `VmcbField`s to values; it may lack fields,
    and a rule that their values decide is then left out.  Without capabilities a processor with
    everything is assumed.
    """
    svm = isinstance(capabilities, SvmCapabilities) or any(isinstance(f, VmcbField) for f in state)
    if svm and isinstance(capabilities, VmxCapabilities):
        raise TypeError("a VMCB is not checked against VMX capabilities")
    verdict = _judge(SVM if svm else VMX, state, {}, capabilities)
    return sorted(verdict.broken, key=lambda v: _MANUAL_ORDER[v.rule.id])


def diagnose(dump: Dump, capabilities: AnyCapabilities | None = None) -> Diagnosis:
    """Every broken rule of a dump, what is unknown, and what else the input says."""
    _complete(dump)
    if capabilities is None and dump.msrs and dump.vendor == VMX:
        capabilities = _from_msrs(dump.msrs)
    if not _fits(capabilities, dump.vendor):
        capabilities = None
    observations = list(dump.observations)
    verdict: Verdict[Any, Any] = Verdict([], [])
    rules = 0
    if dump.vendor and (dump.state or dump.partial):
        verdict = _judge(dump.vendor, dump.state, dump.partial, capabilities)
        rules = len(_rules(dump.vendor))
    failure = dump.failure or _failure(dump)
    stale = _stale(dump, failure, verdict)
    if stale is not None:
        observations.append(stale)
    return Diagnosis(
        dump=dump,
        broken=_ranked(verdict.broken, dump, failure, capabilities is not None),
        unchecked=verdict.unchecked,
        checked=rules - len(verdict.unchecked),
        failure=failure,
        observations=sorted(observations, key=lambda o: -o.weight),
        named=[ALL_RULES[name] for name in dict.fromkeys(dump.named) if name in ALL_RULES],
        capabilities_known=capabilities is not None,
    )


def first_with_findings(dumps: list[Dump], capabilities: AnyCapabilities | None) -> Diagnosis:
    """The diagnosis of the first dump that breaks a rule, else of the last one."""
    diagnosis = None
    for dump in dumps:
        diagnosis = diagnose(dump, capabilities)
        if diagnosis.broken:
            return diagnosis
    assert diagnosis is not None, "reading gives at least one dump"
    return diagnosis


def _rules(vendor: str) -> tuple[AnyRule, ...]:
    return tuple(SVM_RULES) if vendor == SVM else ENTRY_RULES


def _fits(capabilities: AnyCapabilities | None, vendor: str) -> bool:
    kind = SvmCapabilities if vendor == SVM else VmxCapabilities
    return isinstance(capabilities, kind)


def _judge(
    vendor: str,
    state: Mapping[Any, int],
    partial: Mapping[int, tuple[int, int]],
    capabilities: AnyCapabilities | None,
) -> Verdict[Any, Any]:
    widths = SVM_WIDTHS if vendor == SVM else VMX_WIDTHS
    assumed: Any = ANY_PROCESSOR if vendor == SVM else CURRENT_PROCESSOR
    return judge_partly(_rules(vendor), state, partial, widths, capabilities or assumed)


def _from_msrs(msrs: Mapping[int, int]) -> VmxCapabilities | None:
    try:
        return VmxCapabilities.from_msrs(msrs)
    except KeyError:
        return None


def _complete(dump: Dump) -> None:
    """Add what follows from the fields that are there, and say what is taken for granted."""
    if dump.vendor != VMX or not dump.state:
        return
    state = dump.state
    if EntryInput.IN_SMM not in state:
        state[EntryInput.IN_SMM] = 0
        dump.assumed.append("the hypervisor was not in system-management mode")
    wide = (F.HOST_RIP, F.HOST_RSP, F.HOST_GS_BASE, F.HOST_TR_BASE, F.HOST_GDTR_BASE)
    if EntryInput.LONG_MODE_ACTIVE not in state and any(state.get(f, 0) >> 32 for f in wide):
        state[EntryInput.LONG_MODE_ACTIVE] = 1
        dump.assumed.append(
            "the hypervisor ran in 64-bit mode: its addresses have more than 32 bits"
        )


def _failure(dump: Dump) -> Failure | None:
    """The failure that the state itself shows."""
    state = dump.state
    if dump.vendor == SVM:
        code = state.get(VmcbField.EXITCODE)
        if code is not None and signed_exit_code(code) == ExitCode.INVALID:
            return Failure(code=ExitCode.INVALID)
        return None
    reason = state.get(F.EXIT_REASON)
    if reason is not None and reason >> 31:
        return Failure(reason=reason, qualification=state.get(F.EXIT_QUALIFICATION))
    return None


def _stale(dump: Dump, failure: Failure | None, verdict: Verdict[Any, Any]) -> Observation | None:
    """An exit reason that is no entry failure, in a dump that a kernel prints after failures."""
    reason = dump.state.get(F.EXIT_REASON) if dump.vendor == VMX else None
    if reason is None or failure is not None or "VMCS dump" not in dump.format:
        return None
    early = any(v.rule.outcome in _OUTCOMES.values() for v in verdict.broken)
    return Observation(
        "vmx.exit-reason-old",
        f"the exit reason, {reason:#x} ({_reason_name(reason)}), is that of an earlier exit"
        if early
        else f"the exit reason, {reason:#x} ({_reason_name(reason)}), is not an entry failure",
        "VMLAUNCH or VMRESUME that fails in a check of controls or host state writes no exit "
        "reason; otherwise the dump was printed for an exit that the hypervisor did not expect",
        weight=3,
        bad=False,
    )


def _reason_name(reason: int) -> str:
    try:
        return ExitReason(reason & 0xFFFF).name
    except ValueError:
        return "no reason that is defined"


def _ranked(
    broken: list[AnyViolation], dump: Dump, failure: Failure | None, known: bool
) -> list[AnyViolation]:
    """Named by the log, then fitting the reported outcome, then certain, then in manual order.

    Without capabilities the address widths are guesses; what else is assumed holds everywhere.
    """
    named = set(dump.named)

    def key(violation: AnyViolation) -> tuple[bool, bool, bool, int]:
        rule = violation.rule
        return (
            rule.id not in named,
            not _matches(rule, failure),
            not known and "width" in rule.assumes,
            _MANUAL_ORDER[rule.id],
        )

    return sorted(broken, key=key)


def _matches(rule: AnyRule, failure: Failure | None) -> bool:
    """Whether breaking the rule gives the failure that was seen."""
    if failure is None:
        return True
    if failure.error is not None:
        return _OUTCOMES.get(failure.error) is rule.outcome  # type: ignore[call-overload]
    if failure.reason is not None:
        basic = failure.reason & 0xFFFF
        if basic == ExitReason.ENTRY_FAILURE_MSR_LOADING:
            return rule.outcome is Outcome.EXIT_MSR_LOADING
        if basic != ExitReason.ENTRY_FAILURE_INVALID_GUEST_STATE:
            return False
        same = failure.qualification is None or failure.qualification == rule.qualification
        return rule.outcome is Outcome.EXIT_GUEST_STATE and same
    return rule.outcome is Outcome.VMEXIT_INVALID


def failure_sentence(failure: Failure) -> str:
    """How the entry ended, in the manual's words."""
    if failure.code is not None:
        return "#VMEXIT with VMEXIT_INVALID (-1): VMRUN found an illegal state"
    if failure.error == 0:
        return "VMfailInvalid: there was no current VMCS (VMPTRLD it first)"
    if failure.error is not None:
        try:
            text = VmInstructionError(failure.error).sentence
        except ValueError:
            text = "not a number that is defined"
        return f"VM-instruction error {failure.error}: {text}"
    reason = failure.reason or 0
    parts = [f"exit reason {reason:#x}: {_reason_name(reason)}"]
    if failure.qualification:
        try:
            parts.append(EntryFailureQualification(failure.qualification).name)
        except ValueError:
            parts.append(f"qualification {failure.qualification:#x}")
    return ", ".join(parts)
