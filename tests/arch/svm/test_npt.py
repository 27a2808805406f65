"""Nested walks over tables in a dictionary of quadwords."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undervisor.arch.svm.capabilities import ANY_PROCESSOR, SvmFeatures
from undervisor.arch.svm.exits import NestedPageFaultInfo
from undervisor.arch.svm.npt import (
    NestedPageFault,
    Purpose,
    nested_rules,
    nested_updates,
    nested_walk,
)
from undervisor.arch.x86.paging import FETCH, READ, USER, WRITE, Entry, Translation
from undervisor.arch.x86.registers import Cr4, Efer

P, RW, US, PS = Entry.p, Entry.rw, Entry.us, Entry.ps
ALL = P | RW | US
LONG = Efer.of(lma=1, nxe=1)
FINAL, TABLES = 1 << 32, 1 << 33
GPA = 0x12_3456_7ABC


def build(gpa, leaf, leaf_shift=12, top=39, rights=ALL):
    memory, table = {}, 0x1000
    for shift in range(top, leaf_shift, -9):
        memory[table + 8 * (gpa >> shift & 511)] = table + 0x1000 | rights
        table += 0x1000
    memory[table + 8 * (gpa >> leaf_shift & 511)] = leaf
    return memory


def translate(memory, gpa=GPA, access=READ, purpose=Purpose.FINAL_ADDRESS, rules=None):
    rules = rules or nested_rules(Cr4.pae, LONG, 48)
    return nested_walk(rules, 0x1000, gpa, access, lambda a: memory.get(a, 0), purpose)


@pytest.mark.parametrize("shift", [12, 21, 30])
def test_a_nested_page_of_every_size_is_found(shift):
    leaf = 0x1_4000_0000 | ALL | (PS if shift > 12 else 0)
    result = translate(build(GPA, leaf, shift), access=WRITE)
    assert isinstance(result, Translation)
    assert result.gpa == 0x1_4000_0000 | GPA & ((1 << shift) - 1)
    assert result.page_shift == shift


def test_five_levels_translate_more_than_four():
    gpa = 1 << 50
    memory = build(gpa, 0x5000 | ALL, top=48)
    five = nested_rules(Cr4.pae | Cr4.la57, LONG, 52)
    assert isinstance(translate(memory, gpa, rules=five), Translation)
    assert translate(memory, gpa) == NestedPageFault(USER | FINAL, gpa)


def test_pae_and_32_bit_hosts_nest_as_well():
    gpa = 0x4060_1234
    memory = {
        0x1008: 0x2000 | P,
        0x2000 + 8 * (gpa >> 21 & 511): 0x3000 | ALL,
        0x3000 + 8 * (gpa >> 12 & 511): 0x9_8765_4000 | ALL,
    }
    pae = nested_rules(Cr4.pae, 0, 48)
    result = translate(memory, gpa, rules=pae)
    assert isinstance(result, Translation)
    assert result.gpa == 0x9_8765_4234
    assert translate(memory, 1 << 32, rules=pae) == NestedPageFault(USER | FINAL, 1 << 32)
    legacy = nested_rules(Cr4.pse, 0, 48)
    memory = {0x1000 + 8 * (gpa >> 23): (0x0080_0000 | ALL | PS) << (gpa >> 22 & 1) * 32}
    result = translate(memory, gpa, rules=legacy)
    assert isinstance(result, Translation)
    assert result.gpa == 0x0080_0000 | gpa & 0x3F_FFFF


# What the entry lacks or has, the access, and EXITINFO1 without bits 33:32.
@pytest.mark.parametrize(
    ("leaf", "access", "code"),
    [
        (0, READ, 4),
        (0, WRITE, 6),
        (0, FETCH, 0x14),
        (ALL & ~US, READ, 5),
        (ALL & ~RW, WRITE, 7),
        (ALL | Entry.xd, FETCH, 0x15),
        (ALL | 1 << 50, READ, 0xD),
        (ALL | 1 << 50, WRITE, 0xF),
    ],
)
def test_a_nested_fault_reports_the_access_and_its_cause(leaf, access, code):
    memory = build(GPA, leaf)
    assert translate(memory, access=access) == NestedPageFault(FINAL | code, GPA)


@pytest.mark.parametrize("access", [READ, WRITE, FETCH])
def test_guest_tables_are_walked_with_user_writes(access):
    fault = translate(build(GPA, 0x5000 | P | US), access=access, purpose=Purpose.GUEST_TABLES)
    assert fault == NestedPageFault(TABLES | 7, GPA)
    assert NestedPageFaultInfo(fault.exit_info1).names() == ["p", "rw", "us", "guest_tables"]


@pytest.mark.parametrize("missing", [39, 30, 21])
def test_the_user_bit_is_needed_at_every_level(missing):
    memory = build(GPA, 0x5000 | ALL)
    table = 0x1000 * (1 + (39 - missing) // 9)
    memory[table + 8 * (GPA >> missing & 511)] &= ~US
    assert translate(memory) == NestedPageFault(FINAL | 5, GPA)


def test_without_nxe_every_nested_page_is_executable_and_bit_63_reserved():
    rules = nested_rules(Cr4.pae, Efer.lma, 48)
    assert isinstance(translate(build(GPA, 0x5000 | ALL), access=FETCH, rules=rules), Translation)
    fault = translate(build(GPA, 0x5000 | ALL | Entry.xd), access=FETCH, rules=rules)
    assert fault == NestedPageFault(FINAL | 0xD, GPA)


def test_what_the_host_s_supervisor_may_do_plays_no_part():
    rules = nested_rules(Cr4.pae | Cr4.smep | Cr4.smap | Cr4.pke, LONG, 48)
    assert rules is nested_rules(Cr4.pae | Cr4.smep, LONG, 48)
    memory = build(GPA, 0x5000 | ALL | 1 << 59)
    assert isinstance(translate(memory, access=FETCH, rules=rules), Translation)


def test_smep_without_nxe_makes_a_fault_tell_that_it_was_a_fetch():
    memory = build(GPA, 0)
    for cr4, fetch in ((Cr4.pae, 0), (Cr4.pae | Cr4.smep, FETCH)):
        fault = translate(memory, access=FETCH, rules=nested_rules(cr4, LONG & ~Efer.nxe, 48))
        assert isinstance(fault, NestedPageFault)
        assert fault.exit_info1 & FETCH == fetch


def test_accessed_and_dirty_are_set_as_for_the_access():
    memory = build(GPA, 0x5000 | ALL)
    result = translate(memory)
    assert len(nested_updates(result, READ)) == 4
    assert not any(new & Entry.d for _, new in nested_updates(result, READ))
    assert nested_updates(result, WRITE)[-1][1] == 0x5000 | ALL | Entry.a | Entry.d
    tables = nested_updates(result, READ, Purpose.GUEST_TABLES)
    assert tables == nested_updates(result, WRITE)


@given(gpa=st.integers(0, (1 << 64) - 1), leaf=st.integers(0, (1 << 64) - 1))
def test_any_entry_and_address_give_an_answer(gpa, leaf):
    result = translate(build(gpa, leaf), gpa, WRITE)
    if isinstance(result, NestedPageFault):
        assert result.exit_info1 & (FINAL | 6) == FINAL | 6
        assert result.gpa == gpa
    else:
        assert leaf & ALL == ALL
        assert result.gpa == leaf & Entry.address | gpa & 0xFFF


def test_capabilities_answer_for_groups_of_features():
    processor = replace(ANY_PROCESSOR, features=SvmFeatures.np | SvmFeatures.nrips)
    assert processor.has(SvmFeatures.np | SvmFeatures.nrips)
    assert not processor.has(SvmFeatures.np | SvmFeatures.vgif)
    assert SvmFeatures(1 << 3 | 1 << 28).names() == ["nrips", "nested_virt_vmcb_addr_chk"]
