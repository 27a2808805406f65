from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undervisor.arch.vmx.capabilities import CURRENT_PROCESSOR, EptVpidCapability
from undervisor.arch.vmx.ept import (
    ACCESSED,
    DIRTY,
    EXECUTE,
    LARGE,
    READ,
    USER_EXECUTE,
    WRITE,
    Access,
    EntryUpdate,
    EptMemoryType,
    EptMisconfiguration,
    Eptp,
    EptRules,
    EptViolation,
    Misconfiguration,
    Translation,
    misconfiguration,
    walk,
)

RULES = EptRules.of(CURRENT_PROCESSOR)
MODE_BASED = EptRules.of(CURRENT_PROCESSOR, mode_based_execute=True)
PLAIN = EptRules.of(replace(CURRENT_PROCESSOR, ept_vpid=EptVpidCapability(0)))
RWX = READ | WRITE | EXECUTE
WB = EptMemoryType.WB << 3
EPTP = Eptp.of(memory_type=6, walk_length=3, address=1)
GPA = 0x12_3456_7ABC


def tables(gpa: int, leaf: int, leaf_level: int = 1, upper: int = RWX, levels: int = 4):
    """Entries of one path: table n of the path is at 0x1000 * n, and `leaf` ends it."""
    memory = {}
    table = 0x1000
    for level in range(levels, leaf_level - 1, -1):
        address = table | (gpa >> 12 + 9 * (level - 1) & 0x1FF) << 3
        table += 0x1000
        memory[address] = leaf if level == leaf_level else table | upper
    return memory


def translate(memory, access, eptp=EPTP, rules=RULES, gpa=GPA, **options):
    return walk(lambda address: memory.get(address, 0), eptp, gpa, access, rules, **options)


@pytest.mark.parametrize(("level", "shift", "large"), [(1, 12, 0), (2, 21, LARGE), (3, 30, LARGE)])
def test_a_page_of_each_size_translates(level, shift, large):
    page = 0x2_4000_0000
    memory = tables(GPA, page | RWX | WB | large, level)
    result = translate(memory, Access.READ)
    assert isinstance(result, Translation)
    assert result.hpa == page | GPA & (1 << shift) - 1
    assert (result.page_shift, result.permissions & RWX) == (shift, RWX)
    assert result.memory_type == EptMemoryType.WB


def test_five_levels_are_walked():
    memory = tables(GPA, 0x7000 | RWX | WB, levels=5)
    result = translate(memory, Access.READ, eptp=EPTP.replace(walk_length=4))
    assert isinstance(result, Translation)
    assert result.hpa == 0x7ABC


@pytest.mark.parametrize("access", Access)
def test_an_absent_entry_is_a_violation_without_permissions(access):
    result = translate({}, access)
    assert result == EptViolation(GPA, int(access), 4)


@pytest.mark.parametrize(
    ("leaf", "access"),
    [(READ, Access.WRITE), (READ, Access.EXECUTE), (EXECUTE, Access.READ)],
)
def test_a_forbidden_access_is_a_violation_with_the_permissions(leaf, access):
    result = translate(tables(GPA, 0x7000 | leaf | WB), access)
    assert result == EptViolation(GPA, access | leaf << 3, 1)


def test_permissions_are_those_of_every_entry_used():
    memory = tables(GPA, 0x7000 | RWX | WB, upper=READ | EXECUTE)
    assert translate(memory, Access.WRITE) == EptViolation(GPA, 2 | 5 << 3, 1)
    result = translate(memory, Access.READ)
    assert isinstance(result, Translation)
    assert result.permissions & RWX == READ | EXECUTE


def test_a_read_modify_write_needs_both():
    memory = tables(GPA, 0x7000 | READ | WB)
    assert translate(memory, Access.READ | Access.WRITE) == EptViolation(GPA, 3 | 1 << 3, 1)


MISCONFIGURED = [
    (WRITE | WB, 1, Misconfiguration.WRITE_WITHOUT_READ),
    (WRITE | EXECUTE | WB, 1, Misconfiguration.WRITE_WITHOUT_READ),
    (READ | 1 << 50, 1, Misconfiguration.RESERVED_BIT),
    (READ | 2 << 3, 1, Misconfiguration.MEMORY_TYPE),
    (READ | 3 << 3, 1, Misconfiguration.MEMORY_TYPE),
    (READ | 7 << 3, 1, Misconfiguration.MEMORY_TYPE),
    (READ | LARGE | 0x1000, 2, Misconfiguration.RESERVED_BIT),
    (READ | LARGE | 0x20_0000, 3, Misconfiguration.RESERVED_BIT),
    (READ | LARGE | 2 << 3, 2, Misconfiguration.MEMORY_TYPE),
    (READ | 1 << 3, 2, Misconfiguration.RESERVED_BIT),
    (READ | 1 << 6, 3, Misconfiguration.RESERVED_BIT),
    (READ | LARGE, 4, Misconfiguration.RESERVED_BIT),
    (READ | 1 << 3, 4, Misconfiguration.RESERVED_BIT),
    (READ | LARGE, 5, Misconfiguration.RESERVED_BIT),
]


@pytest.mark.parametrize(("entry", "level", "reason"), MISCONFIGURED)
def test_a_reserved_setting_is_a_misconfiguration(entry, level, reason):
    assert misconfiguration(entry, level, RULES) is reason
    memory = tables(GPA, entry, level, levels=5)
    result = translate(memory, Access.READ, eptp=EPTP.replace(walk_length=4))
    assert result == EptMisconfiguration(GPA, entry, level, reason)


def test_execute_only_needs_the_capability():
    memory = tables(GPA, 0x7000 | EXECUTE | WB)
    assert isinstance(translate(memory, Access.EXECUTE), Translation)
    result = translate(memory, Access.EXECUTE, rules=PLAIN)
    assert isinstance(result, EptMisconfiguration)
    assert result.reason is Misconfiguration.EXECUTE_ONLY_NOT_SUPPORTED


@pytest.mark.parametrize("level", [2, 3])
def test_a_large_page_needs_the_capability(level):
    memory = tables(GPA, RWX | WB | LARGE, level)
    result = translate(memory, Access.READ, rules=PLAIN)
    assert isinstance(result, EptMisconfiguration)
    assert result.reason is Misconfiguration.RESERVED_BIT


def test_bits_that_are_ignored_do_not_matter():
    ignored = 1 << 11 | 0x3F << 52 | 1 << 63
    assert misconfiguration(READ | WB | ignored, 1, RULES) is None
    assert misconfiguration(READ | ignored, 3, RULES) is None


def test_a_fetch_for_a_user_address_uses_its_own_permission():
    memory = tables(GPA, 0x7000 | READ | EXECUTE | WB, upper=RWX | USER_EXECUTE)
    assert isinstance(translate(memory, Access.EXECUTE, rules=MODE_BASED), Translation)
    result = translate(memory, Access.EXECUTE, rules=MODE_BASED, user=True)
    assert result == EptViolation(GPA, 4 | 5 << 3, 1)
    assert isinstance(translate(memory, Access.EXECUTE, rules=RULES, user=True), Translation)


def test_a_user_executable_page_is_shown_in_the_qualification():
    memory = tables(GPA, 0x7000 | READ | USER_EXECUTE | WB, upper=RWX | USER_EXECUTE)
    result = translate(memory, Access.EXECUTE, rules=MODE_BASED)
    assert result == EptViolation(GPA, 4 | 1 << 3 | 1 << 6, 1)


def test_no_flag_is_set_unless_the_eptp_asks():
    result = translate(tables(GPA, 0x7000 | RWX | WB), Access.WRITE)
    assert isinstance(result, Translation)
    assert result.updates == ()


def test_a_write_sets_accessed_on_the_way_and_dirty_on_the_page():
    memory = tables(GPA, 0x7000 | RWX | WB)
    result = translate(memory, Access.WRITE, eptp=EPTP.replace(accessed_dirty=1))
    assert isinstance(result, Translation)
    *upper, leaf = result.updates
    assert upper == [EntryUpdate(a, e | ACCESSED) for a, e in list(memory.items())[:3]]
    assert leaf.value == memory[leaf.address] | ACCESSED | DIRTY


def test_flags_that_are_set_are_not_set_again():
    memory = tables(GPA, 0x7000 | RWX | WB | ACCESSED | DIRTY, upper=RWX | ACCESSED)
    result = translate(memory, Access.WRITE, eptp=EPTP.replace(accessed_dirty=1))
    assert isinstance(result, Translation)
    assert result.updates == ()


def test_a_read_does_not_set_dirty():
    memory = tables(GPA, 0x7000 | RWX | WB, upper=RWX | ACCESSED)
    result = translate(memory, Access.READ, eptp=EPTP.replace(accessed_dirty=1))
    assert isinstance(result, Translation)
    assert [update.value & (ACCESSED | DIRTY) for update in result.updates] == [ACCESSED]


@given(
    st.integers(0, (1 << 48) - 1),
    st.lists(st.integers(0, (1 << 64) - 1), min_size=4, max_size=4),
    st.sampled_from([1, 2, 3, 4]),
)
def test_any_entries_give_one_of_the_three_answers(gpa, entries, access):
    found = iter(entries)
    result = walk(lambda _: next(found), EPTP, gpa, access, RULES)
    if isinstance(result, Translation):
        assert result.permissions & access == access
        assert result.hpa < 1 << CURRENT_PROCESSOR.physical_address_width
    else:
        assert isinstance(result, EptViolation | EptMisconfiguration)
