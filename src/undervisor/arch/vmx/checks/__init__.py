"""The checks of VM entry: every rule, all broken ones at once, and what the processor does.

SDM, chapter "VM Entries".  Three ways in:

- `check_vm_entry(state, capabilities)` holds a state against every rule.
- `first_failure(state, capabilities)` is what VMLAUNCH or VMRESUME does.
- `EntryChecker` is the same for a VMCS that changes little between entries.

A state maps fields to values and may hold `EntryInput`s beside them (see `inputs`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from undervisor.arch.rules import Outcome, Verdict, Violation, judge
from undervisor.arch.vmx.capabilities import CURRENT_PROCESSOR, VmxCapabilities
from undervisor.arch.vmx.checks import controls, guest, host, msr_lists, nonregister, segments
from undervisor.arch.vmx.checks.declare import State, VmxRule
from undervisor.arch.vmx.checks.inputs import EntryInput, refresh_inputs
from undervisor.arch.vmx.errors import VmInstructionError
from undervisor.arch.vmx.exits import ExitReason

__all__ = [
    "ENTRY_RULES",
    "RULES",
    "EntryChecker",
    "EntryFailure",
    "EntryInput",
    "check_vm_entry",
    "first_failure",
    "refresh_inputs",
]

ENTRY_RULES: tuple[VmxRule, ...] = (
    *controls.RULES,
    *host.RULES,
    *guest.REGISTERS.rules,
    *segments.RULES,
    *guest.DESCRIPTOR_TABLES.rules,
    *guest.RIP_RFLAGS.rules,
    *nonregister.RULES,
)
"""The rules of a VMCS, in the order of the manual: controls, host state, guest state."""

RULES: tuple[VmxRule, ...] = (*ENTRY_RULES, *msr_lists.RULES)
"""All rules; those of MSR lists are for one entry of a list at a time."""

VmxVerdict = Verdict[int, VmxCapabilities]
VmxViolation = Violation[int, VmxCapabilities]

INSTRUCTION_ERRORS = {
    Outcome.FAIL_CONTROL: VmInstructionError.ENTRY_WITH_INVALID_CONTROL_FIELDS,
    Outcome.FAIL_HOST: VmInstructionError.ENTRY_WITH_INVALID_HOST_STATE_FIELDS,
}


@dataclass(frozen=True, slots=True)
class EntryFailure:
    """What the processor does: VMfailValid with `error`, or a VM exit with `exit_reason`.

    Exactly one of the two is set.  `exit_reason` is the basic reason; the exit-reason field also
    has bit 31 set.
    """

    violation: VmxViolation
    error: VmInstructionError | None = None
    exit_reason: ExitReason | None = None
    qualification: int = 0


def check_vm_entry(state: State, capabilities: VmxCapabilities = CURRENT_PROCESSOR) -> VmxVerdict:
    """All rules that `state` breaks, and those that could not be checked for lack of a field."""
    return judge(ENTRY_RULES, state, capabilities)


def first_failure(
    state: State, capabilities: VmxCapabilities = CURRENT_PROCESSOR
) -> EntryFailure | None:
    """What VM entry does with `state`: the first failure in the manual's order, or None.

    The state must hold every field; a missing one is a KeyError.
    """
    return _first(ENTRY_RULES, state, capabilities)


def _first(
    rules: Iterable[VmxRule], state: State, capabilities: VmxCapabilities
) -> EntryFailure | None:
    for rule in rules:
        if not rule.holds(state, capabilities):
            return _failure(rule, state)
    return None


def _failure(rule: VmxRule, state: State) -> EntryFailure:
    violation = Violation(rule, tuple(state[field] for field in rule.reads))
    error = INSTRUCTION_ERRORS.get(rule.outcome)
    if error is not None:
        return EntryFailure(violation, error=error)
    return EntryFailure(
        violation,
        exit_reason=ExitReason.ENTRY_FAILURE_INVALID_GUEST_STATE,
        qualification=rule.qualification,
    )


def _index() -> dict[int, frozenset[int]]:
    """For each field, the positions of the rules that read it."""
    readers: dict[int, set[int]] = {}
    for position, rule in enumerate(ENTRY_RULES):
        for field in rule.reads:
            readers.setdefault(int(field), set()).add(position)
    return {field: frozenset(positions) for field, positions in readers.items()}


_READERS = _index()
_NONE: frozenset[int] = frozenset()
_PLANS: dict[frozenset[int], tuple[VmxRule, ...]] = {}
_PLANS_LIMIT = 4096


def _plan(written: frozenset[int]) -> tuple[VmxRule, ...]:
    """The rules that read any of `written`, in order; guests repeat themselves, so remembered."""
    plan = _PLANS.get(written)
    if plan is None:
        positions = _NONE.union(*(_READERS.get(field, _NONE) for field in written))
        plan = tuple(ENTRY_RULES[position] for position in sorted(positions))
        if len(_PLANS) >= _PLANS_LIMIT:
            _PLANS.clear()
        _PLANS[written] = plan
    return plan


class EntryChecker:
    """Checks one VMCS again and again, looking only at what changed since it was last valid."""

    __slots__ = ("_capabilities", "_unsettled", "_valid")

    def __init__(self, capabilities: VmxCapabilities) -> None:
        self._capabilities = capabilities
        self._valid = False
        self._unsettled: set[int] = set()

    def check(self, state: State, written: Collection[int]) -> EntryFailure | None:
        """What VM entry does with `state`, given the fields written since the last call.

        `written` must name every field, and every `EntryInput`, whose value may have changed.
        The state must hold all fields and inputs.
        """
        if not self._valid:
            failure = _first(ENTRY_RULES, state, self._capabilities)
            self._valid = failure is None
            return failure
        if not written and not self._unsettled:
            return None
        if self._unsettled:
            self._unsettled.update(written)
            changed = frozenset(self._unsettled)
        else:
            changed = frozenset(written)
        failure = _first(_plan(changed), state, self._capabilities)
        if failure is None:
            self._unsettled.clear()
        elif not self._unsettled:
            self._unsettled = set(changed)
        return failure

    def forget(self) -> None:
        """Look at everything the next time: the VMCS came from elsewhere."""
        self._valid = False
        self._unsettled.clear()
