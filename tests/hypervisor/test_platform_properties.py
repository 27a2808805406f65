"""Whatever a guest does to the board's ports and registers, the board stays a board."""

from hypothesis import given, settings
from hypothesis import strategies as st

from undervisor.arch.x86.events import GuestFault
from undervisor.devices.clock import Clock
from undervisor.hypervisor.platform import Platform

MIB = 1 << 20
CPUS = 2
LAPIC, IOAPIC = 0xFEE00000, 0xFEC00000
PORTS = [
    *(0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1),
    *(0x40, 0x41, 0x42, 0x43, 0x61),
    *(0x60, 0x64, 0x70, 0x71, 0x92, 0xCF8, 0xCF9, 0xCFC, 0xCFE),
    *range(0x3F8, 0x400),
    *(0x510, 0x511, 0x514, 0x518, 0x600, 0x602, 0x604, 0x608),
]
ADDRESSES = [*range(LAPIC, LAPIC + 0x400, 16), IOAPIC, IOAPIC + 0x10, IOAPIC + 0x40, 0xB8000]
MSRS = [0x1B, 0x6E0, *range(0x800, 0x840)]


class Ram:
    def __init__(self):
        self.bytes = bytearray(MIB)

    def is_ram(self, gpa, size):
        return gpa + size <= MIB

    def read(self, gpa, size):
        assert gpa + size <= MIB
        return bytes(self.bytes[gpa : gpa + size])

    def write(self, gpa, data):
        assert gpa + len(data) <= MIB
        self.bytes[gpa : gpa + len(data)] = data


class Processor:
    def nmi(self):
        pass

    init = smi = wake = nmi

    def sipi(self, vector):
        assert 0 <= vector <= 0xFF


class Board:
    def __init__(self):
        self.ns = 0
        self.platform = Platform(
            Clock(lambda: self.ns),
            [Processor() for _ in range(CPUS)],
            Ram(),
            64 * MIB,
            serial_sink=lambda data: None,
            on_end=lambda end: None,
        )

    def port(self, port, size, value):
        if value is None:
            assert 0 <= self.platform.ports.read(port, size) < 1 << (8 * size)
        else:
            self.platform.ports.write(port, size, value & (1 << (8 * size)) - 1)

    def mmio(self, cpu, address, size, value):
        mmio = self.platform.mmio[cpu]
        if value is None:
            assert 0 <= mmio.read(address, size) < 1 << (8 * size)
        else:
            mmio.write(address, size, value & (1 << (8 * size)) - 1)

    def msr(self, cpu, msr, value):
        lapic = self.platform.lapics[cpu]
        try:
            if msr == 0x1B:
                lapic.write_apic_base(value or 0xFEE00800)
            elif msr == 0x6E0:
                lapic.timer.write_tsc_deadline(value or 0)
            elif value is None:
                assert 0 <= lapic.read_msr(msr) < 1 << 64
            else:
                lapic.write_msr(msr, value)
        except GuestFault:
            pass

    def take(self, cpu):
        lapic = self.platform.lapics[cpu]
        expected = lapic.pending()
        if expected is not None:
            assert lapic.acknowledge() == expected

    def wait(self, ns):
        self.ns += ns
        self.platform.clock.run_due()

    def check(self):
        deadline = self.platform.clock.next_deadline()
        assert deadline is None or deadline > self.ns
        for lapic in self.platform.lapics:
            vector = lapic.pending()
            external = lapic.external.peek()
            assert vector is None or vector == external or vector & 0xF0 > lapic.ppr & 0xF0


values = st.one_of(
    st.none(),
    st.integers(0, 0xFF),
    st.integers(0, (1 << 64) - 1),
    st.sampled_from([0x1FF, 0x20041, 0x40041, 0xFEE00800, 0xFEE00C00, 1 << 15 | 0x41]),
)
cpus = st.integers(0, CPUS - 1)
steps = st.one_of(
    st.tuples(st.just("port"), st.sampled_from(PORTS), st.sampled_from([1, 2, 4]), values),
    st.tuples(
        st.just("mmio"), cpus, st.sampled_from(ADDRESSES), st.sampled_from([1, 4, 8]), values
    ),
    st.tuples(st.just("msr"), cpus, st.sampled_from(MSRS), values),
    st.tuples(st.just("take"), cpus),
    st.tuples(st.just("wait"), st.integers(0, 2_000_000_000)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(steps, min_size=10, max_size=80))
def test_any_sequence_of_accesses_keeps_the_board_consistent(sequence):
    board = Board()
    for name, *arguments in sequence:
        getattr(board, name)(*arguments)
        board.wait(0)
        board.check()
