"""Host-physical memory: RAM on both sides of the hole, private frames, and what is absent."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undervisor.errors import BadInput
from undervisor.silicon.memory import HIGH_START, LOW_END, PAGE, PRIVATE_BASE, Memory

SIZE = 2 << 20


@pytest.fixture
def memory():
    return Memory(SIZE)


@pytest.mark.parametrize("size", [0, -4096, 4096, (1 << 20) + 1, 1 << 40])
def test_an_impossible_size_is_refused_with_an_example(size):
    with pytest.raises(BadInput, match="between 1 MiB and 64 GiB") as caught:
        Memory(size)
    assert "--memory" in caught.value.hint


def test_a_host_without_the_memory_is_told(monkeypatch):
    def no(*arguments, **keywords):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("undervisor.silicon.memory.mmap.mmap", no)
    with pytest.raises(BadInput, match="no 2 MiB of memory"):
        Memory(SIZE)


def test_what_does_not_fit_below_3_gib_is_above_4(memory):
    assert memory.ram_ranges() == [(0, SIZE)]
    large = Memory(LOW_END + SIZE)  # untouched pages cost nothing
    assert large.ram_ranges() == [(0, LOW_END), (HIGH_START, HIGH_START + SIZE)]
    large.write(HIGH_START, b"above")
    assert large.read(HIGH_START, 5) == b"above"
    assert large.read(LOW_END, 2) == b"\xff\xff"
    assert large.is_ram(HIGH_START + SIZE - 8, 8)
    assert not large.is_ram(LOW_END - 4, 8)


@given(st.integers(0, SIZE + 64), st.binary(min_size=0, max_size=64))
def test_a_read_gives_what_was_written_and_ones_where_nothing_is(at, data):
    memory = Memory(SIZE)
    memory.write(at, data)
    inside = max(0, min(len(data), SIZE - at))
    assert memory.read(at, len(data)) == data[:inside] + b"\xff" * (len(data) - inside)


def test_quadwords_are_little_endian_and_all_ones_where_absent(memory):
    memory.set_u64(0x1000, 0x1122334455667788)
    assert memory.read(0x1000, 2) == b"\x88\x77"
    assert memory.u64(0x1000) == 0x1122334455667788
    assert memory.u32(0x1004) == 0x11223344
    assert memory.u64(SIZE) == (1 << 64) - 1
    assert memory.u32(SIZE) == 0xFFFFFFFF
    memory.set_u64(SIZE, 1)
    memory.set_u32(SIZE, 1)
    assert memory.u64(SIZE) == (1 << 64) - 1


def test_a_private_frame_is_a_zeroed_page_that_no_guest_can_name(memory):
    first, second = memory.frames.allocate(), memory.frames.allocate()
    assert first != second
    assert first >= PRIVATE_BASE
    assert not memory.is_ram(first)
    assert bytes(memory.frames.view(first)) == bytes(PAGE)
    memory.set_u64(first, 1)
    memory.write(first, b"x")
    assert memory.read(first, 8) == b"\xff" * 8
    assert bytes(memory.frames.view(first)) == bytes(PAGE)


def test_a_released_frame_comes_back_zeroed(memory):
    frame = memory.frames.allocate()
    memory.frames.view(frame)[:] = b"x" * PAGE
    memory.frames.release(frame)
    assert memory.frames.allocate() == frame
    assert bytes(memory.frames.view(frame)) == bytes(PAGE)


def test_private_memory_ends_with_a_clear_error(memory):
    with pytest.raises(MemoryError, match="full"):  # noqa: PT012
        while True:
            memory.frames.allocate()


def test_a_view_of_what_is_not_there_is_refused(memory):
    with pytest.raises(ValueError, match="no page"):
        memory.view(SIZE)
    with pytest.raises(ValueError, match="no memory"):
        memory.host_pointer(SIZE)


def test_a_write_tells_which_code_may_have_changed(memory):
    changed = []
    memory.code_changed = lambda start, end: changed.append((start, end))
    memory.write(0x1234, b"abc")
    memory.set_u64(0x2000, 1)  # tables are no code
    assert changed == [(0x1234, 0x1237)]


def test_clear_zeroes(memory):
    memory.write(0x1000, b"x" * 0x3000)
    memory.clear(0x1800, 0x1000)
    assert memory.read(0x1000, 0x3000) == b"x" * 0x800 + bytes(0x1000) + b"x" * 0x1800
