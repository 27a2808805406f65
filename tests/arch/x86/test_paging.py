"""Walks over page tables that the tests build in a dictionary of quadwords."""

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undervisor.arch.x86.events import Vector
from undervisor.arch.x86.paging import (
    FETCH,
    READ,
    USER,
    WRITE,
    Entry,
    PageFault,
    PageFaultCode,
    PagingMode,
    Translation,
    accessed_dirty_updates,
    check_pdptes,
    fits_physical,
    is_canonical,
    linear_width,
    paging_rules,
    sign_extend,
    walk,
)
from undervisor.arch.x86.registers import Cr0, Cr4, Efer

P, RW, US, PS = Entry.p, Entry.rw, Entry.us, Entry.ps
ALL = P | RW | US
PAGED = Cr0.of(pe=1, pg=1, wp=1, et=1)
LONG = Efer.of(lme=1, lma=1, nxe=1)
VIOLATION, RESERVED = PageFaultCode.p, PageFaultCode.p | PageFaultCode.rsvd

GVA = 0xFFFF_9234_5678_9ABC
USER_GVA = 0x0000_1234_5678_9ABC


class Memory(dict[int, int]):
    """Guest-physical memory by quadwords; what nobody wrote reads as 0."""

    def read(self, address: int) -> int:
        assert address % 8 == 0
        return self.get(address, 0)

    def write32(self, address: int, value: int) -> None:
        shift = address % 8 * 8
        old = self.get(address & ~7, 0) & ~(0xFFFF_FFFF << shift)
        self[address & ~7] = old | value << shift


def table_index(gva: int, shift: int) -> int:
    return gva >> shift & 511


def map_long(memory, gva, leaf, *, leaf_shift=12, top=39, rights=ALL):
    """Map `gva` from the root at 1000h; the table at shift s is at 1000h * (1 + steps)."""
    table = 0x1000
    for shift in range(top, leaf_shift, -9):
        memory[table + 8 * table_index(gva, shift)] = table + 0x1000 | rights
        table += 0x1000
    memory[table + 8 * table_index(gva, leaf_shift)] = leaf
    return memory


def long_rules(cr4=0, efer=LONG, cr0=PAGED, **kwargs):
    return paging_rules(cr0, Cr4.pae | cr4, efer, **kwargs)


def do_walk(memory, gva=GVA, access=READ, rules=None, cr3=0x1000, **kwargs):
    return walk(rules or long_rules(), cr3, gva, access, memory.read, **kwargs)


@pytest.mark.parametrize(
    ("cr0", "cr4", "efer", "mode"),
    [
        (Cr0.pe, 0, 0, PagingMode.NONE),
        (PAGED, 0, 0, PagingMode.LEGACY),
        (PAGED, Cr4.pae, 0, PagingMode.PAE),
        (PAGED, Cr4.pae, LONG, PagingMode.LEVEL4),
        (PAGED, Cr4.pae | Cr4.la57, LONG, PagingMode.LEVEL5),
    ],
)
def test_the_control_registers_choose_the_mode(cr0, cr4, efer, mode):
    assert paging_rules(cr0, cr4, efer).mode is mode


def test_without_paging_an_address_is_its_own_translation():
    result = walk(paging_rules(Cr0.pe, 0, 0), 0, 0x1234, WRITE, Memory().read)
    assert isinstance(result, Translation)
    assert result.gpa == 0x1234


@pytest.mark.parametrize("top", [39, 48])
@pytest.mark.parametrize("shift", [12, 21, 30])
def test_a_page_of_every_size_is_found(top, shift):
    size = 1 << shift
    page = 0x1_8000_0000
    leaf = page | ALL | (PS if shift > 12 else 0)
    memory = map_long(Memory(), GVA, leaf, leaf_shift=shift, top=top)
    rules = long_rules(Cr4.la57 if top == 48 else 0)
    result = do_walk(memory, rules=rules)
    assert isinstance(result, Translation)
    assert result.gpa == page | GVA & (size - 1)
    assert (result.page_shift, result.writable, result.user, result.executable) == (
        shift, True, True, True,
    )  # fmt: skip
    assert len(result.steps) == (top - shift) // 9 + 1


def test_the_leaf_of_legacy_paging_is_found():
    memory = Memory()
    gva = 0x1234_5678
    memory.write32(0x1000 + 4 * (gva >> 22), 0x2000 | ALL)
    memory.write32(0x2000 + 4 * (gva >> 12 & 1023), 0xABCD_E000 | ALL)
    result = do_walk(memory, gva, rules=paging_rules(PAGED, 0, 0))
    assert isinstance(result, Translation)
    assert result.gpa == 0xABCD_E678


def test_a_large_legacy_page_takes_its_high_bits_from_bits_20_to_13():
    memory = Memory()
    gva = 0x1234_5678
    memory.write32(0x1000 + 4 * (gva >> 22), 0xC000_0000 | 0xA5 << 13 | ALL | PS)
    result = do_walk(memory, gva, rules=paging_rules(PAGED, Cr4.pse, 0, 40))
    assert isinstance(result, Translation)
    assert (result.gpa, result.page_shift) == (0xA5_C034_5678 & ~0x3F_FFFF | gva & 0x3F_FFFF, 22)
    refused = do_walk(memory, gva, rules=paging_rules(PAGED, Cr4.pse, 0, 36))
    assert refused == PageFault(RESERVED, gva)
    memory.write32(0x1000 + 4 * (gva >> 22), 0xC000_0000 | 1 << 21 | ALL | PS)
    refused = do_walk(memory, gva, rules=paging_rules(PAGED, Cr4.pse, 0, 52))
    assert refused == PageFault(RESERVED, gva), "bit 21 is never an address bit"
    memory.write32(0x1000 + 4 * (gva >> 22), 0xC000_0000 | 1 << 13 | ALL | PS)
    refused = do_walk(memory, gva, rules=paging_rules(PAGED, Cr4.pse, 0, 32))
    assert refused == PageFault(RESERVED, gva)


def test_without_pse_the_size_bit_of_a_legacy_entry_is_ignored():
    memory = Memory()
    memory.write32(0x1000, 0x2000 | ALL | PS)
    memory.write32(0x2000, 0x5000 | ALL)
    result = do_walk(memory, 0x10, rules=paging_rules(PAGED, 0, 0))
    assert isinstance(result, Translation)
    assert result.gpa == 0x5010


@pytest.mark.parametrize("in_registers", [False, True])
def test_pae_paging_takes_its_first_level_from_memory_or_registers(in_registers):
    memory = Memory()
    gva = 0xC060_1234
    pdptes = [0, 0, 0, 0x2000 | P]
    memory.update({} if in_registers else {0x1020 + 8 * i: e for i, e in enumerate(pdptes)})
    memory[0x2000 + 8 * table_index(gva, 21)] = 0x3000 | ALL
    memory[0x3000 + 8 * table_index(gva, 12)] = 0xF_1234_5000 | ALL
    translate = partial(
        do_walk,
        memory,
        access=USER | WRITE,
        rules=paging_rules(PAGED, Cr4.pae, 0),
        cr3=0x1020,
        pdptes=pdptes if in_registers else None,
    )
    result = translate(gva=gva)
    assert isinstance(result, Translation)
    assert result.gpa == 0xF_1234_5234
    assert translate(gva=0x1000) == PageFault(USER | WRITE, 0x1000)


@pytest.mark.parametrize("missing", [39, 30, 21, 12])
def test_an_absent_entry_at_any_level_faults_without_the_present_bit(missing):
    memory = map_long(Memory(), GVA, 0x5000 | ALL)
    table = 0x1000 * (1 + (39 - missing) // 9)
    memory[table + 8 * table_index(GVA, missing)] &= ~P
    assert do_walk(memory, access=WRITE | USER) == PageFault(WRITE | USER, GVA)


@pytest.mark.parametrize(
    ("shift", "bit"),
    [(39, 51), (39, 7), (30, 48), (21, 51), (12, 48)],
)
def test_a_reserved_bit_at_any_level_faults(shift, bit):
    memory = map_long(Memory(), GVA, 0x5000 | ALL)
    table = 0x1000 * (1 + (39 - shift) // 9)
    memory[table + 8 * table_index(GVA, shift)] |= 1 << bit
    assert do_walk(memory) == PageFault(RESERVED, GVA)


@pytest.mark.parametrize(("shift", "bit"), [(21, 13), (21, 20), (30, 13), (30, 29)])
def test_a_misaligned_large_page_faults(shift, bit):
    memory = map_long(Memory(), GVA, ALL | PS | 1 << bit, leaf_shift=shift)
    assert do_walk(memory) == PageFault(RESERVED, GVA)


def test_a_1_gib_page_on_a_processor_without_them_faults():
    memory = map_long(Memory(), GVA, ALL | PS, leaf_shift=30)
    assert do_walk(memory, rules=long_rules(page1gb=False)) == PageFault(RESERVED, GVA)


@pytest.mark.parametrize(("shift", "refused"), [(39, True), (30, True), (21, False)])
def test_amd_reserves_bit_8_of_the_upper_tables_entries(shift, refused):
    memory = map_long(Memory(), GVA, 0x5000 | ALL)
    table = 0x1000 * (1 + (39 - shift) // 9)
    memory[table + 8 * table_index(GVA, shift)] |= Entry.g
    assert isinstance(do_walk(memory), Translation)
    assert (do_walk(memory, rules=long_rules(amd=True)) == PageFault(RESERVED, GVA)) == refused


def test_a_reserved_bit_in_a_pdpte_faults_when_the_walk_reads_it():
    memory = Memory({0x1000: 0x2000 | P | RW})
    rules = paging_rules(PAGED, Cr4.pae, 0)
    assert do_walk(memory, 0x10, rules=rules) == PageFault(RESERVED, 0x10)
    assert do_walk(memory, 0x10, rules=rules, pdptes=[0x2000 | P | RW] * 4) == PageFault(0, 0x10)


def test_execute_disable_is_reserved_without_nxe():
    memory = map_long(Memory(), GVA, 0x5000 | ALL | Entry.xd)
    assert do_walk(memory, rules=long_rules(efer=LONG & ~Efer.nxe)) == PageFault(RESERVED, GVA)
    assert do_walk(memory, access=FETCH) == PageFault(VIOLATION | FETCH, GVA)
    result = do_walk(memory)
    assert isinstance(result, Translation)
    assert not result.executable


# access, rights of the leaf, CR0.WP, CR4 bits, AC: allowed?
@pytest.mark.parametrize(
    ("access", "rights", "wp", "cr4", "ac", "allowed"),
    [
        (READ, P, 1, 0, True, True),
        (WRITE, P, 1, 0, True, False),
        (WRITE, P, 0, 0, True, True),
        (USER, P | RW, 1, 0, True, False),
        (USER, P | US, 1, 0, True, True),
        (USER | WRITE, P | US, 0, 0, True, False),
        (USER | WRITE, ALL, 1, 0, True, True),
        (FETCH, ALL, 1, 0, True, True),
        (FETCH, ALL, 1, Cr4.smep, True, False),
        (FETCH | USER, ALL, 1, Cr4.smep, True, True),
        (READ, ALL, 1, 0, False, True),
        (READ, ALL, 1, Cr4.smap, True, True),
        (READ, ALL, 1, Cr4.smap, False, False),
        (READ, P, 1, Cr4.smap, False, True),
        (FETCH, ALL, 1, Cr4.smap, False, True),
        (USER, ALL, 1, Cr4.smap, False, True),
    ],
)
def test_rights_are_the_manual_s(access, rights, wp, cr4, ac, allowed):
    rules = long_rules(cr4, cr0=PAGED if wp else PAGED & ~Cr0.wp)
    memory = map_long(Memory(), GVA, 0x5000 | rights)
    result = do_walk(memory, access=access, rules=rules, ac=ac)
    if allowed:
        assert isinstance(result, Translation)
    else:
        assert result == PageFault(VIOLATION | access, GVA)


@pytest.mark.parametrize("lacking", [RW, US])
def test_a_right_needs_every_level(lacking):
    memory = map_long(Memory(), GVA, 0x5000 | ALL, rights=ALL & ~lacking)
    assert do_walk(memory, access=USER | WRITE) == PageFault(VIOLATION | USER | WRITE, GVA)


def test_a_translation_tells_the_rights_of_all_levels_together():
    result = do_walk(map_long(Memory(), GVA, 0x5000 | P | RW, rights=P | US))
    assert (result.writable, result.user, result.executable) == (False, False, True)
    result = do_walk(map_long(Memory(), GVA, 0x5000 | ALL, rights=ALL | Entry.xd))
    assert (result.writable, result.user, result.executable) == (True, True, False)


def test_no_execute_needs_pae():
    rules = paging_rules(PAGED, 0, Efer.nxe)
    assert do_walk(Memory(), 0x1000, FETCH, rules) == PageFault(0, 0x1000)


def test_the_fetch_bit_is_not_reported_without_nxe_and_smep():
    rules = long_rules(efer=LONG & ~Efer.nxe)
    assert do_walk(Memory(), access=FETCH, rules=rules) == PageFault(0, GVA)
    rules = long_rules(Cr4.smep, efer=LONG & ~Efer.nxe)
    assert do_walk(Memory(), access=FETCH, rules=rules) == PageFault(FETCH, GVA)


def test_a_protection_key_refuses_access_or_writes():
    key = 5
    memory = map_long(Memory(), USER_GVA, 0x5000 | ALL | key << 59)
    translate = partial(do_walk, memory, USER_GVA, rules=long_rules(Cr4.pke))
    refused = VIOLATION | PageFaultCode.pk
    assert translate(access=USER, pkru=1 << 10) == PageFault(refused | USER, USER_GVA)
    assert translate(access=WRITE, pkru=2 << 10) == PageFault(refused | WRITE, USER_GVA)
    assert isinstance(translate(access=USER, pkru=2 << 10), Translation)
    assert isinstance(translate(access=FETCH | USER, pkru=3 << 10), Translation)
    assert isinstance(translate(access=USER | WRITE, pkru=~(3 << 10) & 0xFFFF_FFFF), Translation)
    assert isinstance(do_walk(memory, USER_GVA, pkru=1 << 10), Translation)


def test_supervisor_keys_are_apart_from_user_keys():
    memory = map_long(Memory(), GVA, 0x5000 | P | RW | 3 << 59)
    translate = partial(do_walk, memory, rules=long_rules(Cr4.pks))
    refused = VIOLATION | PageFaultCode.pk
    assert translate(pkrs=1 << 6) == PageFault(refused, GVA)
    assert translate(access=WRITE, pkrs=2 << 6) == PageFault(refused | WRITE, GVA)
    assert isinstance(translate(pkru=1 << 6), Translation)
    assert isinstance(translate(pkrs=2 << 6), Translation)
    assert isinstance(do_walk(memory, pkrs=1 << 6), Translation)
    readable = long_rules(Cr4.pks, cr0=PAGED & ~Cr0.wp)
    assert isinstance(do_walk(memory, GVA, WRITE, readable, pkrs=2 << 6), Translation)


def test_a_page_fault_becomes_an_exception_with_the_address():
    fault = PageFault(6, GVA).fault()
    assert (fault.vector, fault.error_code, fault.address) == (Vector.PF, 6, GVA)


def test_accessed_is_set_everywhere_and_dirty_in_the_leaf_of_a_write():
    memory = map_long(Memory(), GVA, 0x5000 | ALL)
    read = do_walk(memory)
    assert [new & (Entry.a | Entry.d) for _, new in accessed_dirty_updates(read, READ)] == [32] * 4
    memory.update(accessed_dirty_updates(read, READ))
    again = do_walk(memory)
    assert accessed_dirty_updates(again, READ) == []
    leaf = 0x4000 + 8 * table_index(GVA, 12)
    assert accessed_dirty_updates(again, WRITE) == [(leaf, memory[leaf] | Entry.d)]


@pytest.mark.parametrize("gva", [0x0000_1000, 0x0040_1000, 0x0040_2000, 0xFFFF_F000])
def test_flags_of_a_legacy_entry_leave_its_neighbour_alone(gva):
    memory = Memory()
    directory, leaf = 0x1000 + 4 * (gva >> 22), 0x2000 + 4 * (gva >> 12 & 1023)
    for address in {directory ^ 4, leaf ^ 4}:
        memory.write32(address, 0xFFFF_FF9C)
    memory.write32(directory, 0x2000 | ALL)
    memory.write32(leaf, 0x5000 | ALL)
    expected = Memory(memory)
    expected.write32(directory, 0x2000 | ALL | Entry.a)
    expected.write32(leaf, 0x5000 | ALL | Entry.a | Entry.d)
    rules = paging_rules(PAGED, 0, 0)
    memory.update(accessed_dirty_updates(do_walk(memory, gva, WRITE, rules), WRITE))
    assert memory == expected
    assert accessed_dirty_updates(do_walk(memory, gva, WRITE, rules), WRITE) == []


def test_flags_add_up_where_a_table_maps_itself():
    memory = Memory()
    memory.write32(0x1000, 0x1000 | ALL)
    memory.write32(0x1004, 0x5000 | ALL)
    rules = paging_rules(PAGED, 0, 0)
    updates = accessed_dirty_updates(do_walk(memory, 0x1000, WRITE, rules), WRITE)
    a_and_d = Entry.a | Entry.d
    assert updates == [(0x1000, 0x1000 | ALL | Entry.a | (0x5000 | ALL | a_and_d) << 32)]


@pytest.mark.parametrize("bit", [1, 2, 5, 6, 7, 8, 40, 63])
def test_a_reserved_bit_in_a_present_pdpte_is_refused(bit):
    assert check_pdptes([0x1001, 0, 0, 0x2019], 40)
    assert check_pdptes([1 << bit, 0, 0, 0], 40), "an absent entry is not looked at"
    assert not check_pdptes([0, 0, 0, 1 | 1 << bit], 40)


def test_canonical_addresses_extend_the_sign():
    assert is_canonical(0x7FFF_FFFF_FFFF)
    assert is_canonical(0xFFFF_8000_0000_0000)
    assert not is_canonical(0x8000_0000_0000)
    assert is_canonical(0x8000_0000_0000, 57)
    assert (linear_width(0), linear_width(Cr4.la57)) == (48, 57)


@given(st.integers(0, (1 << 64) - 1), st.sampled_from([48, 57]))
def test_sign_extension_makes_the_canonical_address_with_the_same_low_bits(address, width):
    extended = sign_extend(address, width)
    assert is_canonical(extended, width)
    assert not (extended ^ address) & ((1 << width) - 1)
    assert is_canonical(address, width) == (extended == address)


def test_a_physical_address_must_fit():
    assert fits_physical((1 << 40) - 1, 40)
    assert not fits_physical(1 << 40, 40)


accesses = st.sampled_from([READ, WRITE, USER, USER | WRITE, FETCH, FETCH | USER])
entries = st.tuples(st.integers(0, (1 << 40) - 1), st.sampled_from([ALL, P, P | US, ALL | PS, 0]))


@given(
    gva=st.integers(0, (1 << 47) - 1),
    access=accesses,
    tables=st.dictionaries(st.integers(0, 63), entries, max_size=64),
    nx=st.booleans(),
)
def test_any_table_gives_an_answer_and_a_translation_grants_what_was_asked(gva, access, tables, nx):
    gva &= 0x0000_0060_181F_FFFF  # few indices, so that walks meet entries
    memory = Memory()
    for slot, (address, flags) in tables.items():
        base = 0x1000 * (slot % 8)
        memory[base + 8 * (slot // 8)] = address & 0x7000 | flags | (nx and slot % 5 == 0) << 63
    result = do_walk(memory, gva, access)
    if isinstance(result, PageFault):
        assert result.error_code & (USER | WRITE | FETCH) == access
    else:
        assert result.gpa & ((1 << result.page_shift) - 1) == gva & ((1 << result.page_shift) - 1)
        assert result.writable or not access & WRITE or not access & USER
        assert result.user or not access & USER
        assert result.executable or not access & FETCH
        assert all(memory.read(address) == entry for address, entry in result.steps)
