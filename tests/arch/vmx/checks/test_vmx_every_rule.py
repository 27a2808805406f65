"""Every rule of VM entry, broken alone from a valid state; the recipes are in `boundary`."""

from collections import Counter
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from undervisor.arch.rules import Outcome
from undervisor.arch.vmx.boundary import BREAKS, MODES, valid_state
from undervisor.arch.vmx.capabilities import CURRENT_PROCESSOR
from undervisor.arch.vmx.checks import ENTRY_RULES, RULES, check_vm_entry, first_failure
from undervisor.arch.vmx.checks.inputs import EntryInput
from undervisor.arch.vmx.checks.msr_lists import ListedMsr
from undervisor.arch.vmx.errors import VmInstructionError
from undervisor.arch.vmx.exits import EntryFailureQualification, ExitReason
from undervisor.arch.vmx.fields import VmcsField

BY_ID = {rule.id: rule for rule in RULES}
INPUTS = [*VmcsField, *EntryInput, *ListedMsr]


class Recorder:
    """A state that remembers what was read of it."""

    def __init__(self, state: Mapping[int, int]):
        self.state = state
        self.seen: set[int] = set()

    def __getitem__(self, key: int) -> int:
        self.seen.add(int(key))
        return self.state[key]


def test_there_are_as_many_rules_as_promised():
    assert len(RULES) >= 220


def test_ids_are_unique():
    assert [name for name, n in Counter(rule.id for rule in RULES).items() if n > 1] == []


def test_every_rule_has_a_recipe_that_breaks_it():
    assert {rule.id for rule in ENTRY_RULES} == set(BREAKS)


@pytest.mark.parametrize("mode", MODES)
def test_a_valid_state_breaks_nothing_and_is_checked_whole(mode):
    verdict = check_vm_entry(valid_state(mode))
    assert [str(violation) for violation in verdict.broken] == []
    assert verdict.unchecked == []
    assert first_failure(valid_state(mode)) is None


@pytest.mark.parametrize("rule", BREAKS)
def test_the_broken_rule_is_named_and_no_other(rule):
    how = BREAKS[rule]
    verdict = check_vm_entry(how.state(), how.capabilities)
    assert {violation.rule.id for violation in verdict.broken} == {rule} | how.also


@pytest.mark.parametrize("rule", BREAKS)
def test_the_recipe_starts_from_a_state_that_the_processor_enters(rule):
    """Where only the capabilities differ, the same state is valid with all of them."""
    how = BREAKS[rule]
    if how.capabilities is not CURRENT_PROCESSOR:
        broken = check_vm_entry(how.state(), CURRENT_PROCESSOR).broken
        assert {v.rule.id for v in broken} <= {rule}
    assert BY_ID[rule].assumes or how.capabilities is CURRENT_PROCESSOR


STATES = [
    *((valid_state(mode), CURRENT_PROCESSOR) for mode in MODES),
    *((how.state(), how.capabilities) for how in BREAKS.values()),
]


@pytest.mark.parametrize("rule", BREAKS)
def test_a_rule_reads_only_what_it_declares(rule):
    declared = {int(field) for field in BY_ID[rule].reads}
    for state, capabilities in STATES:
        recorder = Recorder(state)
        BY_ID[rule].holds(recorder, capabilities)
        assert recorder.seen <= declared


@pytest.mark.parametrize("rule", BREAKS)
def test_without_the_field_to_blame_the_rule_is_not_checked(rule):
    state = BREAKS[rule].state()
    del state[BY_ID[rule].reads[0]]
    verdict = check_vm_entry(state, BREAKS[rule].capabilities)
    assert rule in {unchecked.id for unchecked in verdict.unchecked}
    assert rule not in {violation.rule.id for violation in verdict.broken}


@pytest.mark.parametrize("rule", BREAKS)
def test_the_processor_fails_the_entry_as_the_rule_says(rule):
    how = BREAKS[rule]
    failure = first_failure(how.state(), how.capabilities)
    assert failure.violation.rule.id in {rule} | how.also
    outcome = BY_ID[rule].outcome
    if rule.startswith("vmx.controls"):
        assert outcome is Outcome.FAIL_CONTROL
        assert failure.error is VmInstructionError.ENTRY_WITH_INVALID_CONTROL_FIELDS
    elif rule.startswith("vmx.host"):
        assert outcome is Outcome.FAIL_HOST
        assert failure.error is VmInstructionError.ENTRY_WITH_INVALID_HOST_STATE_FIELDS
    else:
        assert failure.error is None
        assert failure.exit_reason is ExitReason.ENTRY_FAILURE_INVALID_GUEST_STATE


QUALIFICATIONS = {
    "vmx.guest.pdpte": EntryFailureQualification.PDPTE_LOADING,
    "vmx.guest.link.": EntryFailureQualification.VMCS_LINK_POINTER,
    "vmx.guest.interruptibility.nmi-sti": EntryFailureQualification.NMI_INTO_BLOCKING_BY_STI,
}


@pytest.mark.parametrize("rule", BREAKS)
def test_only_some_guest_rules_have_a_qualification_of_their_own(rule):
    expected = next((q for prefix, q in QUALIFICATIONS.items() if rule.startswith(prefix)), 0)
    assert BY_ID[rule].qualification == expected


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_a_rule_says_what_it_is_and_what_to_do(rule):
    assert rule.id.startswith("vmx.")
    assert len(rule.text) > 20
    assert rule.section
    assert rule.remedy
    assert rule.reads
    assert set(rule.reads) <= set(INPUTS)


def test_all_broken_rules_are_named_at_once():
    state = valid_state()
    state[VmcsField.GUEST_RFLAGS] = 0
    state[VmcsField.HOST_TR_SELECTOR] = 0
    state[VmcsField.VMCS_LINK_POINTER] = 0xFFFF_FFFF
    broken = {violation.rule.id for violation in check_vm_entry(state).broken}
    assert broken == {
        "vmx.host.tr.null",
        "vmx.guest.rflags.bit-1",
        "vmx.guest.link.aligned",
    }


def test_a_violation_shows_the_values():
    state = valid_state() | {VmcsField.GUEST_RFLAGS: 0}
    (violation,) = check_vm_entry(state).broken
    assert "GUEST_RFLAGS = 0x0" in str(violation)
    assert "Checks on Guest RIP, RFLAGS, and SSP" in str(violation)


def test_a_rule_that_is_broken_without_a_missing_field_is_broken():
    """CR0.PE and CR0.PG are excused for an unrestricted guest, CR0.NE never is."""
    state = valid_state() | {VmcsField.HOST_CR0: 0, VmcsField.GUEST_RFLAGS: 0}
    del state[VmcsField.GUEST_CR0]
    verdict = check_vm_entry(state)
    assert {v.rule.id for v in verdict.broken} == {"vmx.host.cr0.must-be-one", BIT_1}
    assert "vmx.guest.cr0.must-be-one" in {rule.id for rule in verdict.unchecked}


BIT_1 = "vmx.guest.rflags.bit-1"


@settings(max_examples=200)
@given(st.randoms(use_true_random=False))
def test_any_values_at_all_get_a_verdict(random):
    state = {field: random.getrandbits(random.choice((1, 8, 32, 64))) for field in INPUTS}
    verdict = check_vm_entry(state)
    assert verdict.unchecked == []
    failure = first_failure(state)
    assert (failure is None) == (not verdict.broken)
    if failure is not None:
        assert failure.violation == verdict.broken[0]
