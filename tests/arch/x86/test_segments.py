import pytest
from hypothesis import given
from hypothesis import strategies as st

from undervisor.arch.x86.segments import (
    TSS16,
    TSS16_LIMIT,
    TSS32,
    TSS64,
    TSS64_LIMIT,
    UNUSABLE,
    AccessRights,
    Attributes,
    Gate,
    Segment,
    SystemType,
    access_rights_of,
    attributes_of,
    null_segment,
    parse_descriptor,
    parse_gate,
    real_mode_segment,
)

LONG_CODE = bytes.fromhex("ffff0000009baf00")
FLAT_DATA = bytes.fromhex("ffff00000093cf00")


def test_a_code_descriptor_is_parsed():
    code = parse_descriptor(LONG_CODE, 0x08)
    assert code == Segment(0x08, 0, 0xFFFF_FFFF, 0xA9B)
    assert code.is_code
    assert code.is_present
    assert Attributes(code.attributes).names() == ["type", "s", "p", "l", "g"]


def test_a_byte_granular_limit_is_taken_as_it_is():
    assert parse_descriptor(bytes.fromhex("6700785634890012"), 0x18) == Segment(
        0x18, 0x12345678, 0x67, 0x089
    )


def test_a_long_mode_system_descriptor_has_a_64_bit_base():
    tss = parse_descriptor(bytes.fromhex("67007856348b0012f0debc9a00000000"), 0x18)
    assert tss.base == 0x9ABC_DEF0_1234_5678
    assert tss.attributes & 0xF == SystemType.TSS_BUSY
    assert parse_descriptor(tss.system_descriptor(), 0x18) == tss


@pytest.mark.parametrize("size", [0, 7, 9, 15, 17])
def test_a_descriptor_of_another_size_is_refused(size):
    with pytest.raises(ValueError, match="8 or 16 bytes"):
        parse_descriptor(bytes(size), 0)
    with pytest.raises(ValueError, match="8 or 16 bytes"):
        parse_gate(bytes(size))


@given(st.binary(min_size=8, max_size=8))
def test_any_descriptor_is_written_as_it_was_read(data):
    assert parse_descriptor(data, 0x10).descriptor() == data


@given(st.integers(0, 0xFFF))
def test_attributes_survive_the_way_through_access_rights(attributes):
    rights = access_rights_of(attributes)
    assert attributes_of(rights) == attributes
    assert bool(rights & UNUSABLE) == (not attributes & Attributes.p)
    for name in Attributes.FIELDS:
        assert getattr(AccessRights(rights), name) == getattr(Attributes(attributes), name)


def test_an_unusable_segment_becomes_not_present():
    assert attributes_of(UNUSABLE | 0xC093) == 0xC13
    assert access_rights_of(0) == UNUSABLE
    assert access_rights_of(0xC93) == 0xC093


def test_the_segments_of_reset_and_null_loads():
    assert real_mode_segment(0xF000, code=True) == Segment(0xF000, 0xF0000, 0xFFFF, 0x9B)
    assert not null_segment(3).is_present


gates = st.builds(
    Gate,
    selector=st.integers(0, 0xFFFF),
    offset=st.integers(0, (1 << 64) - 1),
    type=st.integers(0, 15),
    dpl=st.integers(0, 3),
    present=st.booleans(),
    ist=st.integers(0, 7),
)


@given(gates)
def test_a_gate_is_read_as_it_was_written(gate):
    assert parse_gate(gate.descriptor()) == gate


def test_a_gate_s_bytes_are_the_manual_s():
    gate = Gate(0x10, 0xFFFF_8000_1234_5678, SystemType.INTERRUPT_GATE, 3, True, ist=2)
    assert gate.descriptor().hex() == "7856100002ee34120080ffff00000000"
    assert Gate(8, 0x1000, 14, 0, True).descriptor(long_mode=False).hex() == "00100800008e0000"


@pytest.mark.parametrize("table", [TSS16, TSS32, TSS64])
def test_the_fields_of_a_tss_do_not_overlap(table):
    end = 0
    for field in sorted(table.values(), key=lambda f: f.offset):
        assert field.offset >= end
        end = field.offset + field.width


def test_the_fields_of_a_tss_are_where_the_manual_says():
    assert TSS64["ist1"].offset == 36
    assert TSS64["io_map_base"].offset + 2 == TSS64_LIMIT + 1
    assert TSS32["cr3"].offset == 28
    assert TSS32["eip"].offset == 32
    assert TSS32["edi"].offset == 68
    assert TSS32["ldt"].offset == 96
    assert TSS16["ip"].offset == 14
    assert TSS16["ldt"].offset + 2 == TSS16_LIMIT + 1


def test_system_types_are_the_manual_s():
    assert [(t.name, int(t)) for t in SystemType] == [
        ("TSS16_AVAILABLE", 1),
        ("LDT", 2),
        ("TSS16_BUSY", 3),
        ("CALL_GATE16", 4),
        ("TASK_GATE", 5),
        ("INTERRUPT_GATE16", 6),
        ("TRAP_GATE16", 7),
        ("TSS_AVAILABLE", 9),
        ("TSS_BUSY", 11),
        ("CALL_GATE", 12),
        ("INTERRUPT_GATE", 14),
        ("TRAP_GATE", 15),
    ]
