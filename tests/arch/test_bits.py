import pytest

from undervisor.arch.bits import Bits, Register


class Example(Register):
    low = Bits(0)
    field = Bits(11, 4)


def test_a_register_is_its_value():
    assert Example.of(low=1, field=0xAB) == 0xAB1


def test_fields_read_as_attributes():
    value = Example(0xAB1)
    assert (value.low, value.field) == (1, 0xAB)
    assert value.names() == ["low", "field"]


def test_the_class_gives_masks():
    assert Example.field == 0xFF0
    assert Example.reserved() == 0xFFFF_FFFF_FFFF_F00E


def test_a_value_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="does not fit in 11:4"):
        Example.of(field=0x100)


def test_overlapping_fields_fail_at_declaration():
    with pytest.raises(TypeError, match="overlap"):
        type("Bad", (Register,), {"a": Bits(3, 0), "b": Bits(3)})


def test_a_field_beyond_the_width_fails_at_declaration():
    with pytest.raises(TypeError, match="exceed"):
        type("Bad", (Register,), {"a": Bits(64)})
