import pytest
from hypothesis import given
from hypothesis import strategies as st

from undervisor.domains.quantities import (
    CPU_LIMIT,
    parse_cpus,
    parse_size,
    show_cpus,
    show_size,
    to_kib,
)
from undervisor.errors import BadInput


@pytest.mark.parametrize(
    ("text", "kib"),
    [("8G", 8 << 20), ("512M", 512 << 10), ("1 GiB", 1 << 20), ("64", 64 << 10), ("2048k", 2048),
     ("1TiB", 1 << 30)],
)  # fmt: skip
def test_sizes_are_read_as_people_write_them(text, kib):
    assert parse_size(text) == kib


@pytest.mark.parametrize("text", ["", "G", "8 elephants", "-1G", "1.5G", "9" * 40, "8GG"])
def test_what_is_no_size_is_told(text):
    with pytest.raises(BadInput):
        parse_size(text)


@pytest.mark.parametrize(
    ("number", "unit", "kib"),
    [(8, "GiB", 8 << 20), (1, "b", 1), (1025, "bytes", 2), (1, "MB", 977), (3, "", 3)],
)  # fmt: skip
def test_libvirts_units_round_up(number, unit, kib):
    assert to_kib(number, unit) == kib


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("0-3", {0, 1, 2, 3}), ("0,2,4,6", {0, 2, 4, 6}), ("0-7,^3", {0, 1, 2, 4, 5, 6, 7}),
     ("^3,0-3", {0, 1, 2, 3}), (" 1 , 2 ", {1, 2})],
)  # fmt: skip
def test_sets_of_processors_are_read(text, cpus):
    assert parse_cpus(text) == cpus


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "-1", f"{CPU_LIMIT}", "0-99999999999"])
def test_what_is_no_set_is_told(text):
    with pytest.raises(ValueError, match=r"processors"):
        parse_cpus(text)


@given(st.frozensets(st.integers(0, CPU_LIMIT - 1), min_size=1, max_size=40))
def test_a_set_survives_its_text(cpus):
    assert parse_cpus(show_cpus(cpus)) == cpus


@given(st.integers(1, 1 << 40))
def test_a_size_survives_its_text(kib):
    assert parse_size(show_size(kib)) == kib
