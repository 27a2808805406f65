import struct

import pytest

from undervisor.devices.fwcfg import FwCfg, Item, standard_files, standard_items

MIB = 1 << 20
READ, SKIP, SELECT, WRITE, ERROR = 2, 4, 8, 16, 1


class Ram:
    """One mebibyte."""

    def __init__(self):
        self.bytes = bytearray(b"\xcc" * MIB)

    def is_ram(self, gpa, size):
        return gpa + size <= MIB

    def read(self, gpa, size):
        return bytes(self.bytes[gpa : gpa + size])

    def write(self, gpa, data):
        assert gpa + len(data) <= MIB
        self.bytes[gpa : gpa + len(data)] = data


@pytest.fixture
def ram():
    return Ram()


@pytest.fixture
def device(ram):
    device = FwCfg(standard_items(64 * MIB, 4), standard_files(64 * MIB), ram)
    device.set_command_line("a=1 b")
    return device


def select(device, item):
    device.write_selector(0, 2, item)


def take(device, count):
    return bytes(device.read_data(1, 1) for _ in range(count))


def dma(device, ram, control, length=0, address=0, at=0x1000):
    """Start a request and return the control word that it leaves."""
    ram.write(at, struct.pack(">IIQ", control, length, address))
    for offset, part in ((0, at >> 32), (4, at & 0xFFFFFFFF)):
        device.write_dma(offset, 4, int.from_bytes(part.to_bytes(4, "big"), "little"))
    return int.from_bytes(ram.read(at, 4), "big")


@pytest.mark.parametrize(
    ("item", "data"),
    [
        (Item.SIGNATURE, b"QEMU"),
        (Item.ID, b"\x03\0\0\0"),
        (Item.CPU_COUNT, b"\x04\0"),
        (Item.MAX_CPU_COUNT, b"\x04\0"),
        (Item.RAM_SIZE, (64 * MIB).to_bytes(8, "little")),
        (Item.COMMAND_LINE_SIZE, b"\x06\0\0\0"),
        (Item.COMMAND_LINE, b"a=1 b\0"),
    ],
)
def test_items_are_read_byte_by_byte_with_zeros_after(device, item, data):
    select(device, item)
    assert take(device, len(data) + 2) == data + b"\0\0"


def test_an_item_that_does_not_exist_reads_zero(device):
    select(device, 0x1234)
    assert take(device, 4) == bytes(4)


def test_selecting_starts_at_the_beginning_again(device):
    select(device, Item.SIGNATURE)
    take(device, 3)
    select(device, Item.SIGNATURE)
    assert take(device, 4) == b"QEMU"


def test_the_directory_leads_to_each_file(device):
    select(device, Item.DIRECTORY)
    (count,) = struct.unpack(">I", take(device, 4))
    files = {}
    for _ in range(count):
        size, selector, reserved, name = struct.unpack(">IHH56s", take(device, 64))
        assert reserved == 0
        files[name.rstrip(b"\0").decode()] = (size, selector)
    assert list(files) == ["etc/e820"]
    size, selector = files["etc/e820"]
    select(device, selector)
    entries = list(struct.iter_unpack("<QQI", take(device, size)))
    assert (MIB, 63 * MIB, 1) in entries


def test_the_dma_register_reads_as_its_signature(device):
    high, low = (device.read_dma(offset, 4).to_bytes(4, "little") for offset in (0, 4))
    assert high + low == b"QEMU CFG"


def test_dma_selects_and_reads_into_ram_with_zeros_after_the_end(device, ram):
    assert dma(device, ram, Item.SIGNATURE << 16 | SELECT | READ, 6, 0x2000) == 0
    assert ram.read(0x2000, 7) == b"QEMU\0\0\xcc"


def test_dma_skips_and_goes_on_where_bytes_left_off(device, ram):
    select(device, Item.COMMAND_LINE)
    take(device, 1)
    assert dma(device, ram, SKIP, 1) == 0
    assert dma(device, ram, READ, 3, 0x2000) == 0
    assert ram.read(0x2000, 3) == b"1 b"


def test_a_long_dma_read_is_zeros_past_the_item(device, ram):
    assert dma(device, ram, Item.SIGNATURE << 16 | SELECT | READ, 300_000, 0x2000) == 0
    assert ram.read(0x2000, 300_001) == b"QEMU".ljust(300_000, b"\0") + b"\xcc"


def test_dma_outside_ram_or_to_an_item_is_an_error(device, ram):
    assert dma(device, ram, Item.SIGNATURE << 16 | SELECT | READ, 16, MIB - 8) == ERROR
    assert dma(device, ram, READ, 0xFFFFFFFF, 0) == ERROR
    assert dma(device, ram, Item.SIGNATURE << 16 | SELECT | WRITE, 4, 0x2000) == ERROR


def test_a_request_outside_ram_does_nothing(device, ram):
    before = bytes(ram.bytes)
    device.write_dma(0, 4, 0x01000000)
    device.write_dma(4, 4, 0)
    assert bytes(ram.bytes) == before
