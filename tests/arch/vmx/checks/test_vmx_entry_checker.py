import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from undervisor.arch.vmx.boundary import BREAKS, FREE_FIELDS, boundary_states, valid_state
from undervisor.arch.vmx.capabilities import CURRENT_PROCESSOR
from undervisor.arch.vmx.checks import EntryChecker, check_vm_entry, first_failure
from undervisor.arch.vmx.checks.inputs import ALL_ONES, EntryInput, refresh_inputs
from undervisor.arch.vmx.controls import PrimaryControls, SecondaryControls
from undervisor.arch.vmx.fields import VmcsField as F

INTERESTING = [0, 1, 2, 3, 0xF3, 0xFFFF, 1 << 31, 1 << 62, ALL_ONES]
FIELDS = [*F, *EntryInput]


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(FIELDS),
            st.one_of(st.sampled_from(INTERESTING), st.integers(0, ALL_ONES)),
            max_size=4,
        ),
        max_size=6,
    ),
    st.sampled_from(["long", "full", "vm86", "protected"]),
)
def test_looking_only_at_what_changed_gives_the_same_answer(steps, mode):
    checker = EntryChecker(CURRENT_PROCESSOR)
    original = valid_state(mode)
    state = dict(original)
    assert checker.check(state, ()) is None
    for step in steps:
        # Every second step also puts things right again, so that valid states recur.
        changes = step | {name: original[name] for name in step if state[name] != original[name]}
        state.update(changes)
        assert checker.check(state, changes.keys()) == first_failure(state, CURRENT_PROCESSOR)


@pytest.mark.parametrize("rule", BREAKS)
def test_a_break_is_found_from_the_written_fields_alone(rule):
    how = BREAKS[rule]
    checker = EntryChecker(how.capabilities)
    before, after = valid_state(how.mode), how.state()
    if checker.check(before, ()) is not None:
        # The capabilities alone break the rule.
        assert checker.check(after, before.keys()) is not None
        return
    written = [name for name in after if after[name] != before[name]]
    assert checker.check(after, written) == first_failure(after, how.capabilities)
    assert checker.check(after, ()) is not None
    assert checker.check(before, written) is None


def test_a_checker_that_forgot_looks_at_everything():
    checker = EntryChecker(CURRENT_PROCESSOR)
    assert checker.check(valid_state(), ()) is None
    checker.forget()
    assert checker.check(valid_state() | {F.GUEST_RFLAGS: 0}, ()) is not None


def test_boundary_states_break_what_they_say():
    states = boundary_states(seed=7)
    for _ in range(300):
        boundary = next(states)
        broken = check_vm_entry(boundary.state, boundary.capabilities).broken
        assert [v.rule.id for v in broken] == ([boundary.broken] if boundary.broken else [])


def test_the_same_seed_gives_the_same_states():
    one, other = boundary_states(seed=3), boundary_states(seed=3)
    assert [next(one) for _ in range(20)] == [next(other) for _ in range(20)]


@settings(max_examples=50)
@given(st.sampled_from(FREE_FIELDS), st.integers(0, ALL_ONES))
def test_no_rule_reads_a_free_field(field, value):
    assert first_failure(valid_state("full") | {field: value & field.mask}) is None


def test_inputs_are_read_only_where_a_rule_looks():
    def nothing(address):
        raise AssertionError(f"read of {address:#x}")

    state = valid_state()
    assert refresh_inputs(state, nothing, {EntryInput.IN_SMM: 0}) == set()


def test_inputs_come_from_memory():
    memory = {0x9000: 0x1234_0000_0001, 0x7080: 0x25, 0x1000: 1, 0x1008: 3, 0x1010: 0, 0x1018: 9}
    state = valid_state("protected") | {
        F.VMCS_LINK_POINTER: 0x9000,
        F.VIRTUAL_APIC_ADDRESS: 0x7000,
        EntryInput.LINKED_VMCS: 7,
    }
    state[F.PRIMARY_CONTROLS] |= PrimaryControls.use_tpr_shadow
    changed = refresh_inputs(state, memory.__getitem__, {EntryInput.LONG_MODE_ACTIVE: 1})
    assert state[EntryInput.LINKED_VMCS] == 1
    assert state[EntryInput.VIRTUAL_TPR] == 0x25
    assert [state[EntryInput.MEMORY_PDPTE0 + n] for n in range(4)] == [1, 3, 0, 9]
    assert changed == {
        EntryInput.LINKED_VMCS,
        EntryInput.VIRTUAL_TPR,
        EntryInput.MEMORY_PDPTE0,
        EntryInput.MEMORY_PDPTE1,
        EntryInput.MEMORY_PDPTE3,
    }


def test_with_ept_the_pdptes_are_not_read_from_memory():
    state = valid_state("protected-ept")
    assert state[F.SECONDARY_CONTROLS] & SecondaryControls.enable_ept
    assert refresh_inputs(state, {}.__getitem__, {}) == set()


class Counter(dict):
    """A state that counts how often it is read: what a check costs, on any machine."""

    reads = 0

    def __getitem__(self, key):
        self.reads += 1
        return super().__getitem__(key)


def reads_of_a_check(written):
    state = Counter(valid_state("full"))
    checker = EntryChecker(CURRENT_PROCESSOR)
    assert checker.check(state, ()) is None
    state.reads = 0
    assert checker.check(state, written) is None
    return state.reads


def test_checking_an_unchanged_vmcs_reads_nothing():
    assert reads_of_a_check(()) == 0


def test_checking_after_few_writes_reads_little():
    state = Counter(valid_state("full"))
    first_failure(state)
    assert state.reads < 2_000
    assert reads_of_a_check((F.GUEST_RIP,)) <= 5
    assert reads_of_a_check((F.GUEST_RIP, F.GUEST_RSP, F.ENTRY_INTERRUPTION_INFORMATION)) < 60
    everyday = (F.GUEST_RIP, F.ENTRY_INTERRUPTION_INFORMATION, F.GUEST_RFLAGS)
    assert reads_of_a_check(everyday) < state.reads / 3
