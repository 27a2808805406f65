import pytest

from undervisor.arch.vmx.structures import (
    InvvpidDescriptor,
    RegionHeader,
    io_bitmap_bits,
    msr_bitmap_bit,
    pml_entry_offset,
    vmcs_shadow_bit,
)


@pytest.mark.parametrize(
    ("index", "write", "byte", "bit"),
    [
        (0, False, 0, 0),
        (0x1FFF, False, 1023, 7),
        (0xC000_0080, False, 1024 + 16, 0),
        (0x10, True, 2048 + 2, 0),
        (0xC000_1FFF, True, 4095, 7),
    ],
)
def test_an_msr_has_its_bit_in_one_of_four_bitmaps(index, write, byte, bit):
    assert msr_bitmap_bit(index, write=write) == byte * 8 + bit


@pytest.mark.parametrize("index", [0x2000, 0xBFFF_FFFF, 0xC000_2000, 0x4000_0000])
def test_an_msr_outside_both_ranges_has_no_bit(index):
    assert msr_bitmap_bit(index, write=False) is None


def test_ports_are_split_between_two_bitmaps():
    assert io_bitmap_bits(0x60, 1) == [(0, 0x60)]
    assert io_bitmap_bits(0x7FFF, 2) == [(0, 0x7FFF), (1, 0)]
    assert io_bitmap_bits(0xFFFC, 4)[-1] == (1, 0x7FFF)


def test_an_access_that_wraps_has_no_bits():
    assert io_bitmap_bits(0xFFFF, 2) is None


def test_only_short_encodings_can_be_shadowed():
    assert vmcs_shadow_bit(0x681E) == 0x681E
    assert vmcs_shadow_bit(0x8000) is None


def test_the_log_is_full_when_its_index_wraps():
    assert pml_entry_offset(511) == 4088
    assert pml_entry_offset(0) == 0
    assert pml_entry_offset(0xFFFF) is None


def test_reserved_bits_of_a_descriptor_are_known():
    assert InvvpidDescriptor.reserved() == 0xFFFF_FFFF_FFFF_0000
    assert InvvpidDescriptor(5 | 0x1234 << 64).linear_address == 0x1234


def test_a_shadow_vmcs_is_marked():
    header = RegionHeader(1 << 31 | 4)
    assert (header.shadow, header.revision) == (1, 4)
