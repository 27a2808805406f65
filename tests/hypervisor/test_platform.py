import itertools
import struct

import pytest

from undervisor.arch.x86.events import GuestFault
from undervisor.devices.clock import Clock
from undervisor.devices.ends import EndOfRun, EndReason
from undervisor.hypervisor.platform import Features, Platform

MIB = 1 << 20
LAPIC, IOAPIC = 0xFEE00000, 0xFEC00000
SVR, EOI, ID, ICR, ICR_HIGH = 0xF0, 0xB0, 0x20, 0x300, 0x310


class Ram:
    def __init__(self):
        self.bytes = bytearray(MIB)

    def is_ram(self, gpa, size):
        return gpa + size <= MIB

    def read(self, gpa, size):
        return bytes(self.bytes[gpa : gpa + size])

    def write(self, gpa, data):
        self.bytes[gpa : gpa + len(data)] = data


class Processor:
    def __init__(self):
        self.events = []

    def nmi(self):
        self.events.append("nmi")

    def init(self):
        self.events.append("init")

    def sipi(self, vector):
        self.events.append(("sipi", vector))

    def smi(self):
        self.events.append("smi")

    def wake(self):
        self.events.append("wake")


class Board:
    def __init__(self, cpu_count=2, **options):
        self.ns = 0
        self.ends, self.serial, self.console = [], [], []
        self.processors = [Processor() for _ in range(cpu_count)]
        self.platform = Platform(
            Clock(lambda: self.ns),
            self.processors,
            Ram(),
            64 * MIB,
            serial_sink=self.serial.append,
            on_end=self.ends.append,
            **options,
        )
        self.ports = self.platform.ports

    def move(self, ns):
        self.ns += ns
        self.platform.clock.run_due()

    def out(self, *pairs):
        for port, value in pairs:
            self.ports.write(port, 1, value)

    def route(self, pin, low, processor=0):
        mmio = self.platform.mmio[0]
        for register, value in ((0x11 + 2 * pin, processor << 24), (0x10 + 2 * pin, low)):
            mmio.write(IOAPIC, 4, register)
            mmio.write(IOAPIC + 0x10, 4, value)


@pytest.fixture
def board():
    return Board()


@pytest.mark.parametrize(
    ("port", "size", "value", "end"),
    [
        (0xF4, 1, 0, EndOfRun(EndReason.DEBUG_EXIT, 0)),
        (0xF4, 2, 0x1234, EndOfRun(EndReason.DEBUG_EXIT, 0x1234)),
        (0xF4, 4, 0x10, EndOfRun(EndReason.DEBUG_EXIT, 0x10)),
        (0x604, 2, 0x2000, EndOfRun(EndReason.POWER_OFF)),
        (0x64, 1, 0xFE, EndOfRun(EndReason.RESET)),
        (0xCF9, 1, 0x06, EndOfRun(EndReason.RESET)),
        (0x92, 1, 0x01, EndOfRun(EndReason.RESET)),
    ],
)
def test_each_way_to_end_a_run_is_wired(board, port, size, value, end):
    board.ports.write(port, size, value)
    assert board.ends == [end]


def test_shutdown_written_to_port_8900_ends_the_run(board):
    for byte in b"Shutdown":
        board.out((0x8900, byte))
    assert board.ends == [EndOfRun(EndReason.SHUTDOWN)]


def test_every_port_can_be_read_and_reads_end_no_run(board):
    for port in range(0x10000):
        for size in (1, 2, 4):
            assert 0 <= board.ports.read(port, size) < 1 << (8 * size)
    assert board.ends == []


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("value", [0, 0x55, 0xFF])
def test_every_port_can_be_written(board, size, value):
    for port in range(0x10000):
        board.ports.write(port, size, value * 0x01010101 & (1 << (8 * size)) - 1)
    board.move(10_000_000)


def test_serial_output_and_input_pass(board):
    for byte in b"hi\n":
        board.out((0x3F8, byte))
    assert board.serial == [b"hi\n"]
    board.platform.feed_serial(b"x")
    assert board.ports.read(0x3FD, 1) & 1
    assert board.ports.read(0x3F8, 1) == ord("x")


def test_flush_shows_what_is_buffered(board):
    board.out((0x3F8, ord("?")))
    board.platform.flush()
    assert board.serial == [b"?"]


def test_the_debug_console_is_absent_unless_connected(board):
    assert board.ports.read(0xE9, 1) == 0xFF
    seen = []
    board = Board(console_sink=seen.append)
    assert board.ports.read(0xE9, 1) == 0xE9
    board.out((0xE9, ord("!")))
    board.platform.flush()
    assert seen == [b"!"]


def test_each_processor_sees_its_own_local_apic_and_the_shared_ioapic(board):
    mine, other = board.platform.mmio
    assert (mine.read(LAPIC + ID, 4), other.read(LAPIC + ID, 4)) == (0, 1 << 24)
    mine.write(IOAPIC, 4, 1)
    assert other.read(IOAPIC + 0x10, 4) == 0x00170020
    assert mine.covers(LAPIC + 0xFFF)
    assert not mine.covers(LAPIC + 0x1000)
    assert mine.covers(IOAPIC)


def test_a_moved_or_disabled_local_apic_leaves_its_page(board):
    lapic, mmio = board.platform.lapics[1], board.platform.mmio[1]
    lapic.write_apic_base(0x10000000 | 1 << 11)
    assert not mmio.covers(LAPIC)
    assert mmio.read(0x10000000 + ID, 4) == 1 << 24
    lapic.write_apic_base(0x10000000)
    assert not mmio.covers(0x10000000)
    assert board.platform.mmio[0].covers(LAPIC)


def test_the_firmwares_timer_interrupts_by_the_bios_vector(board):
    boot, other = board.platform.lapics
    assert boot.pending() is None
    board.move(55_000_000)
    assert boot.pending() == 0x08
    assert other.pending() is None
    assert boot.acknowledge() == 0x08
    assert boot.pending() is None
    board.out((0x20, 0x20))
    board.move(55_000_000)
    assert boot.pending() == 0x08


def test_the_timer_enters_the_ioapic_at_pin_2(board):
    board.platform.mmio[1].write(LAPIC + SVR, 4, 0x1FF)
    board.route(2, 0x30, processor=1)
    board.move(55_000_000)
    assert board.platform.lapics[1].pending() == 0x30


def test_the_serial_port_interrupts_by_irq_4(board):
    board.platform.mmio[1].write(LAPIC + SVR, 4, 0x1FF)
    board.route(4, 0x34, processor=1)
    board.out((0x21, 0xEF), (0x3F9, 0x01))
    board.platform.feed_serial(b"x")
    assert board.platform.lapics[1].pending() == 0x34
    assert board.platform.lapics[0].pending() == 0x0C


def test_the_clock_interrupts_by_irq_8(board):
    board.out((0xA1, 0xFE), (0x21, 0xFB), (0x70, 0x0B), (0x71, 0x12))
    board.move(1_000_000_000)
    assert board.platform.lapics[0].pending() == 0x70


def test_a_processor_starts_another(board):
    mmio = board.platform.mmio[0]
    for low in (0x4500, 0x4608, 0x4608):
        mmio.write(LAPIC + ICR_HIGH, 4, 1 << 24)
        mmio.write(LAPIC + ICR, 4, low)
    assert board.processors[1].events == ["init", ("sipi", 8), ("sipi", 8)]


def test_the_processor_count_and_command_line_are_in_fw_cfg():
    board = Board(cpu_count=3, command_line="x")
    board.ports.write(0x510, 2, 0x05)
    assert board.ports.read(0x511, 1) == 3
    board.ports.write(0x510, 2, 0x15)
    assert board.ports.read(0x511, 1) == ord("x")


def test_features_decide_what_the_local_apic_can_do():
    for has_deadline, written in ((True, 0x40040), (False, 0x40)):
        lapic = Board(features=Features(tsc_deadline=has_deadline)).platform.lapics[0]
        lapic.write(0x320, 4, 0x40040)
        assert lapic.read(0x320, 4) == written
    lapic = Board(features=Features(x2apic=False)).platform.lapics[0]
    with pytest.raises(GuestFault):
        lapic.write_apic_base(lapic.apic_base | 1 << 10)


def test_the_mp_table_names_the_processors_signature():
    tables = dict(Board(features=Features(signature=0xABCDE)).platform.tables())
    assert struct.unpack_from("<I", tables[0xF0010], 44 + 4)[0] == 0xABCDE


# waiting


class Source:
    def __init__(self, *pieces):
        self.pieces = list(pieces)
        self.waits = []

    @property
    def open(self):
        return bool(self.pieces)

    def poll(self):
        return b""

    def wait(self, seconds=None):
        self.waits.append(seconds)
        return self.pieces.pop(0)


def test_waiting_takes_input_until_there_is_no_more():
    source = Source(b"ab")
    board = Board(source=source)
    board.out((0x3F9, 0x01), (0x3F8, ord("$")))
    assert board.platform.expects_input
    assert board.platform.take_input()
    assert board.serial == [b"$"]
    assert board.ports.read(0x3F8, 1) == ord("a")
    assert not board.platform.expects_input
    assert not board.platform.take_input()
    assert source.waits == [None]


def test_there_is_no_waiting_for_input_that_would_interrupt_nobody():
    source = Source(b"ab")
    assert not Board(source=source).platform.take_input()
    assert not Board(source=source).platform.expects_input
    assert source.waits == []
    assert not Board().platform.take_input()


def test_a_tick_that_nobody_takes_leaves_no_deadline(board):
    board.move(55_000_000)
    assert board.platform.clock.next_deadline() is None
    board.move(10_000_000)
    assert board.platform.lapics[0].acknowledge() == 0x08
    assert board.platform.clock.next_deadline() is not None


def test_ticks_that_the_8259_holds_still_reach_the_ioapic(board):
    board.out((0x21, 0xFF))
    board.move(55_000_000)
    assert board.platform.clock.next_deadline() is None
    board.platform.mmio[1].write(LAPIC + SVR, 4, 0x1FF)
    board.route(2, 0x30, processor=1)
    for _ in range(3):
        board.move(55_000_000)
        assert board.platform.lapics[1].acknowledge() == 0x30
        board.platform.mmio[1].write(LAPIC + EOI, 4, 0)


def test_reading_a_count_does_not_need_the_ticks(board):
    def count():
        board.out((0x43, 0x00))
        return board.ports.read(0x40, 1) | board.ports.read(0x40, 1) << 8

    board.move(500_000_000)
    first = count()
    board.move(1_000_000)
    assert (first - count()) % 65536 in (1193, 1194)


# firmware's tables


def test_the_acpi_root_pointer_is_where_the_platform_says(board):
    assert dict(board.platform.tables())[board.platform.rsdp].startswith(b"RSD PTR ")


def test_no_two_firmware_tables_overlap(board):
    placed = sorted(board.platform.tables())
    for (first, data), (second, _) in itertools.pairwise(placed):
        assert first + len(data) <= second


def test_two_equal_histories_are_equal():
    def history():
        board = Board()
        board.out((0x43, 0x34), (0x40, 0x10), (0x40, 0x20))
        seen = []
        for _ in range(50):
            board.move(3_333_333)
            board.ports.write(0x43, 1, 0)
            seen.append((board.ports.read(0x40, 2), board.platform.lapics[0].pending()))
            seen.append(board.platform.clock.next_deadline())
        return seen

    assert history() == history()
