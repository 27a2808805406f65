import pytest

from undervisor.arch.vmx.capabilities import CURRENT_PROCESSOR
from undervisor.arch.vmx.checks.inputs import EntryInput
from undervisor.arch.vmx.checks.msr_lists import RULES, check_msr_load, check_msr_store, read_list

EFER, STAR, SMM_MONITOR_CTL = 0xC000_0080, 0xC000_0081, 0x9B

BROKEN = {
    "vmx.msr-load.fs-base": (0xC000_0100, 0, 0),
    "vmx.msr-load.gs-base": (0xC000_0101, 0, 0),
    "vmx.msr-load.x2apic": (0x80B, 0, 0),
    "vmx.msr-load.smm-only": (SMM_MONITOR_CTL, 0, 0),
    "vmx.msr-load.never-loaded": (0x79, 0, 0),
    "vmx.msr-load.reserved": (STAR, 1, 0),
    "vmx.msr-load.writable": (EFER, 0, 2),
}


NOT_SAVED = {
    "vmx.msr-store.x2apic": (0x80B, 0),
    "vmx.msr-store.smm-only": (0x9E, 0),
    "vmx.msr-store.reserved": (STAR, 1),
    "vmx.msr-store.readable": (0x1234, 0),
}


def writable(index, value):
    return not (index == EFER and value & 2)


def check(entries, **options):
    return check_msr_load(entries, CURRENT_PROCESSOR, writable=writable, **options)


def test_every_rule_is_tested():
    assert {rule.id for rule in RULES} == set(BROKEN) | set(NOT_SAVED)


@pytest.mark.parametrize("rule", BROKEN)
def test_the_entry_that_breaks_a_rule_is_numbered_from_one(rule):
    failure = check([(STAR, 0, 0), BROKEN[rule], (STAR, 1, 0)])
    assert failure.number == 2
    assert [violation.rule.id for violation in failure.violations] == [rule]


def test_a_good_list_is_loaded_whole():
    loaded = []
    entries = [(STAR, 0, 5), (EFER, 0, 0xD01)]
    assert check(entries, load=lambda *pair: loaded.append(pair)) is None
    assert loaded == [(STAR, 5), (EFER, 0xD01)]


def test_the_entries_before_a_bad_one_are_loaded():
    loaded = []
    entries = [(STAR, 0, 5), (EFER, 0, 2), (STAR, 0, 6)]
    assert check(entries, load=lambda *pair: loaded.append(pair)).number == 2
    assert loaded == [(STAR, 5)]


def test_in_smm_its_msrs_may_be_loaded():
    entries = [(SMM_MONITOR_CTL, 0, 0)]
    assert check(entries, inputs={EntryInput.IN_SMM: 1}) is None


def test_kernel_gs_base_may_be_loaded():
    assert check([(0xC000_0102, 0, 0)]) is None


def test_a_list_is_read_from_memory_entry_by_entry():
    memory = {0x1000: 7 << 32 | STAR, 0x1008: 5, 0x1010: EFER, 0x1018: 0xD01}
    entries = list(read_list(memory.__getitem__, 0x1000, 2))
    assert entries == [(STAR, 7, 5), (EFER, 0, 0xD01)]


@pytest.mark.parametrize("rule", NOT_SAVED)
def test_an_entry_that_cannot_be_saved_is_numbered_from_one(rule):
    saved = []
    failure = check_msr_store(
        [(STAR, 0), (EFER, 0), NOT_SAVED[rule]],
        CURRENT_PROCESSOR,
        readable=lambda index: index != 0x1234,
        save=lambda *entry: saved.append(entry),
    )
    assert failure.number == 3
    assert [violation.rule.id for violation in failure.violations] == [rule]
    assert saved == [(1, STAR), (2, EFER)]


def test_a_good_list_is_saved_whole():
    assert check_msr_store([(STAR, 0), (EFER, 0)], CURRENT_PROCESSOR) is None


def test_in_smm_its_base_may_be_saved():
    inputs = {EntryInput.IN_SMM: 1}
    assert check_msr_store([(0x9E, 0)], CURRENT_PROCESSOR, inputs=inputs) is None
