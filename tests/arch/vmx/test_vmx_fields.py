import pytest

from undervisor.arch.vmx.fields import (
    ENCODING_RESERVED,
    SEGMENTS,
    FieldArea,
    FieldWidth,
    VmcsField,
    guest_segment,
)

# Encodings that every hypervisor has in its source, one for each width and area.
KNOWN = {
    "VPID": 0x0000,
    "GUEST_TR_SELECTOR": 0x080E,
    "HOST_TR_SELECTOR": 0x0C0C,
    "EPT_POINTER": 0x201A,
    "TSC_MULTIPLIER": 0x2032,
    "SECONDARY_EXIT_CONTROLS": 0x2044,
    "GUEST_PHYSICAL_ADDRESS": 0x2400,
    "GUEST_PDPTE3": 0x2810,
    "GUEST_PKRS": 0x2818,
    "HOST_PKRS": 0x2C06,
    "SECONDARY_CONTROLS": 0x401E,
    "EXIT_INSTRUCTION_INFORMATION": 0x440E,
    "GUEST_TR_ACCESS_RIGHTS": 0x4822,
    "PREEMPTION_TIMER_VALUE": 0x482E,
    "HOST_SYSENTER_CS": 0x4C00,
    "CR3_TARGET_VALUE_3": 0x600E,
    "GUEST_LINEAR_ADDRESS": 0x640A,
    "GUEST_RFLAGS": 0x6820,
    "GUEST_INTERRUPT_SSP_TABLE_ADDR": 0x682C,
    "HOST_RIP": 0x6C16,
    "HOST_INTERRUPT_SSP_TABLE_ADDR": 0x6C1C,
}


@pytest.mark.parametrize(("name", "encoding"), KNOWN.items())
def test_an_encoding_is_the_manuals(name, encoding):
    assert VmcsField[name] == encoding


def test_no_two_names_share_an_encoding():
    assert len(VmcsField.__members__) == len(set(VmcsField))


@pytest.mark.parametrize("field", VmcsField)
def test_an_encoding_selects_full_access_and_has_no_reserved_bit(field):
    assert not field & 1
    assert not field & ENCODING_RESERVED
    assert field == field.width << 13 | field.area << 10 | field.index << 1


@pytest.mark.parametrize("field", VmcsField)
def test_the_area_agrees_with_the_name(field):
    prefix = field.name.split("_")[0]
    if prefix == "HOST":
        assert field.area is FieldArea.HOST
    elif prefix == "GUEST":
        # These two guest addresses inform about an exit; the shadow is a control.
        odd = {
            VmcsField.GUEST_PHYSICAL_ADDRESS: FieldArea.READ_ONLY,
            VmcsField.GUEST_LINEAR_ADDRESS: FieldArea.READ_ONLY,
            VmcsField.GUEST_DEADLINE_SHADOW: FieldArea.CONTROL,
        }
        assert field.area is odd.get(field, FieldArea.GUEST)


def test_only_64_bit_fields_have_a_high_half():
    assert VmcsField.EPT_POINTER.high == 0x201B
    with pytest.raises(ValueError, match="GUEST_CR0 is not a 64-bit field"):
        _ = VmcsField.GUEST_CR0.high


def test_a_field_knows_its_width_in_bits():
    assert VmcsField.GUEST_CS_SELECTOR.mask == 0xFFFF
    assert VmcsField.GUEST_CS_LIMIT.mask == 0xFFFF_FFFF
    assert VmcsField.GUEST_CR0.width is FieldWidth.NATURAL
    assert VmcsField.GUEST_CR0.bits == 64


@pytest.mark.parametrize("register", SEGMENTS)
def test_every_segment_register_has_its_four_parts(register):
    for part in ("SELECTOR", "BASE", "LIMIT", "ACCESS_RIGHTS"):
        assert guest_segment(register, part).area is FieldArea.GUEST


def test_a_field_finds_a_value_kept_by_its_encoding():
    assert {0x6800: 7}[VmcsField.GUEST_CR0] == 7
