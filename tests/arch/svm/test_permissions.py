import pytest
from hypothesis import given
from hypothesis import strategies as st

from undervisor.arch.svm.permissions import (
    IOPM_SIZE,
    MSRPM_SIZE,
    is_msr_intercepted,
    is_port_intercepted,
    msr_bit,
)


@pytest.mark.parametrize(
    ("msr", "byte", "bit"),
    [
        (0x0000_0000, 0x0000, 0),
        (0x0000_0174, 0x005D, 0),
        (0x0000_1FFF, 0x07FF, 6),
        (0xC000_0000, 0x0800, 0),
        (0xC000_0080, 0x0820, 0),
        (0xC000_1FFF, 0x0FFF, 6),
        (0xC001_0114, 0x1045, 0),
        (0xC001_1FFF, 0x17FF, 6),
    ],
)
def test_an_msr_has_its_bits_where_the_manual_says(msr, byte, bit):
    assert msr_bit(msr) == byte * 8 + bit
    for write in (False, True):
        msrpm = bytearray(MSRPM_SIZE)
        msrpm[byte] = 1 << bit + write
        assert is_msr_intercepted(msrpm, msr, write)
        assert not is_msr_intercepted(msrpm, msr, not write)


@pytest.mark.parametrize("msr", [0x2000, 0xBFFF_FFFF, 0xC000_2000, 0xC001_2000, 0xFFFF_FFFF])
def test_an_msr_outside_the_map_always_exits(msr):
    assert msr_bit(msr) is None
    assert is_msr_intercepted(bytes(MSRPM_SIZE), msr, write=False)


@given(port=st.integers(0, 0xFFFF), size=st.sampled_from([1, 2, 4]), bit=st.integers(0, 0x10002))
def test_a_port_access_exits_if_any_of_its_bytes_is_intercepted(port, size, bit):
    iopm = bytearray(IOPM_SIZE)
    iopm[bit >> 3] = 1 << (bit & 7)
    assert is_port_intercepted(iopm, port, size) == (port <= bit < port + size)
