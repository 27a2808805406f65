import pytest

from undervisor.devices.serial import CONNECTED, Serial

DATA, IER, IIR, FCR, LCR, MCR, LSR, MSR, SCRATCH = 0, 1, 2, 2, 3, 4, 5, 6, 7


class Wire:
    """A UART with its line's history and its output."""

    def __init__(self):
        self.levels = []
        self.sent = []
        self.uart = Serial(self.levels.append, self.sent.append)

    def put(self, register, value):
        self.uart.write(register, 1, value)

    def get(self, register):
        return self.uart.read(register, 1)


@pytest.fixture
def wire():
    return Wire()


def test_output_reaches_the_sink_in_lines(wire):
    for byte in b"hello\nrest":
        wire.put(DATA, byte)
    assert wire.sent == [b"hello\n"]
    wire.uart.flush()
    wire.uart.flush()
    assert wire.sent == [b"hello\n", b"rest"]


def test_output_is_shown_when_the_guest_starts_to_wait_for_input(wire):
    for byte in b"? ":
        assert wire.get(LSR) == 0x60
        wire.put(DATA, byte)
    assert wire.sent == []
    wire.get(LSR)
    wire.get(LSR)
    assert wire.sent == [b"? "]


def test_long_output_without_a_newline_is_not_kept_for_ever(wire):
    for _ in range(5000):
        wire.put(DATA, 0x2E)
    assert sum(map(len, wire.sent)) == 4096


def test_the_transmitter_is_always_empty(wire):
    assert wire.get(LSR) & 0x60 == 0x60
    wire.put(DATA, 0x41)
    assert wire.get(LSR) & 0x60 == 0x60


def test_the_divisor_latch_hides_data_and_interrupt_enable(wire):
    wire.put(IER, 0x05)
    wire.put(LCR, 0x83)
    wire.put(DATA, 0x34)
    wire.put(IER, 0x12)
    assert (wire.get(DATA), wire.get(IER)) == (0x34, 0x12)
    wire.put(LCR, 0x03)
    assert wire.get(IER) == 0x05
    assert wire.get(LCR) == 0x03
    wire.uart.flush()
    assert wire.sent == []


def test_scratch_keeps_its_value_and_upper_interrupt_enables_do_not(wire):
    wire.put(SCRATCH, 0xA5)
    wire.put(IER, 0xFF)
    assert (wire.get(SCRATCH), wire.get(IER)) == (0xA5, 0x0F)


def test_fifo_control_shows_in_the_identification(wire):
    assert wire.get(IIR) == 0x01
    wire.put(FCR, 0xC1)
    assert wire.get(IIR) == 0xC1
    wire.put(FCR, 0x00)
    assert wire.get(IIR) == 0x01


def test_input_waits_until_the_guest_takes_it(wire):
    wire.put(FCR, 0x01)
    data = bytes(range(100))
    wire.uart.feed(data)
    got = bytearray()
    while wire.get(LSR) & 1:
        got.append(wire.get(DATA))
    assert bytes(got) == data
    assert wire.get(DATA) == 0


def test_data_ready_interrupts_until_the_data_is_read(wire):
    wire.put(IER, 0x01)
    wire.uart.feed(b"x")
    assert wire.levels == [True]
    assert wire.get(IIR) == 0x04
    assert wire.get(DATA) == ord("x")
    assert wire.levels == [True, False]
    assert wire.get(IIR) == 0x01


def test_below_the_trigger_level_the_source_is_a_timeout(wire):
    wire.put(FCR, 0xC1)  # 14 bytes
    wire.put(IER, 0x01)
    wire.uart.feed(bytes(13))
    assert wire.get(IIR) & 0xF == 0x0C
    wire.uart.feed(b"!")
    assert wire.get(IIR) & 0xF == 0x04


def test_transmitter_empty_interrupts_once_when_enabled_and_after_each_byte(wire):
    wire.put(IER, 0x02)
    assert wire.levels == [True]
    assert wire.get(IIR) == 0x02
    assert wire.get(IIR) == 0x01  # reading it cleared it
    assert wire.levels == [True, False]
    wire.put(DATA, 0x41)
    assert wire.levels == [True, False, True]
    wire.put(DATA, 0x42)  # a fall and a rise, for an edge-triggered controller
    assert wire.levels == [True, False, True, False, True]


def test_data_ready_comes_before_transmitter_empty(wire):
    wire.put(IER, 0x03)
    wire.uart.feed(b"x")
    assert wire.get(IIR) == 0x04
    wire.get(DATA)
    assert wire.get(IIR) == 0x02


def test_loopback_returns_data_and_sends_none(wire):
    wire.put(MCR, 0x10)
    wire.put(DATA, 0xAE)
    assert wire.get(LSR) & 1
    assert wire.get(DATA) == 0xAE
    wire.uart.flush()
    assert wire.sent == []


def test_loopback_keeps_host_input_out(wire):
    wire.put(MCR, 0x10)
    wire.uart.feed(b"x")
    assert not wire.get(LSR) & 1
    wire.put(MCR, 0x00)
    assert wire.get(DATA) == ord("x")


@pytest.mark.parametrize(
    ("outputs", "inputs"), [(0x1, 0x20), (0x2, 0x10), (0x4, 0x40), (0x8, 0x80), (0xF, 0xF0)]
)
def test_loopback_wires_modem_outputs_to_inputs(wire, outputs, inputs):
    wire.put(MCR, 0x10 | outputs)
    assert wire.get(MSR) & 0xF0 == inputs


def test_modem_changes_show_once_and_interrupt(wire):
    assert wire.get(MSR) == CONNECTED
    wire.put(IER, 0x08)
    wire.put(MCR, 0x10)  # CTS, DSR and DCD fall
    assert wire.levels == [True]
    assert wire.get(IIR) == 0x00
    assert wire.get(MSR) == 0x0B
    assert wire.get(MSR) == 0x00
    assert wire.levels == [True, False]


def test_looped_back_bytes_beyond_the_fifo_are_an_overrun(wire):
    wire.put(FCR, 0x01)
    wire.put(IER, 0x04)
    wire.put(MCR, 0x10)
    for byte in range(17):
        wire.put(DATA, byte)
    assert wire.get(IIR) & 0xF == 0x06
    assert wire.get(LSR) & 0x02
    assert not wire.get(LSR) & 0x02
    assert [wire.get(DATA) for _ in range(17)] == [*range(16), 0]


def test_clearing_the_receiver_fifo_drops_what_it_holds(wire):
    wire.put(FCR, 0x01)
    wire.uart.feed(b"ab")
    wire.put(FCR, 0x03)
    assert not wire.get(LSR) & 1


def test_a_guest_that_polls_for_input_makes_the_host_look_for_some(wire):
    wire.uart.on_starved = lambda: wire.uart.feed(b"late")
    polls = 0
    while not wire.get(LSR) & 1:
        polls += 1
        assert polls < 1000
    assert wire.get(DATA) == ord("l")


def test_how_often_a_host_is_made_to_look_is_its_choice():
    looks = []
    uart = Serial(lambda level: None, lambda data: None, starved_polls=2)
    uart.on_starved = lambda: looks.append(1)
    for _ in range(6):
        uart.read(LSR, 1)
    assert len(looks) == 3


MODES = {
    "plain": [],
    "FIFOs": [(FCR, 0xC7)],
    "loopback": [(FCR, 0x07), (MCR, 0x13)],
    "divisor latch": [(LCR, 0x83)],
    "transmitter interrupts": [(IER, 0x02)],
    "receiver interrupts": [(FCR, 0x47), (IER, 0x01)],
}


def everything(wire):
    """All that a guest can still see, and what went out."""
    wire.uart.flush()
    seen = [wire.get(register) for register in (IIR, LSR, MSR, SCRATCH)]
    return seen, [wire.get(DATA) for _ in range(40)], b"".join(wire.sent)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 14, 16, 17, 40])
def test_a_burst_is_the_single_accesses_in_a_row(mode, count):
    singles, burst = Wire(), Wire()
    for wire in (singles, burst):
        wire.uart.feed(bytes(range(1, 31)))
        for register, value in MODES[mode]:
            wire.put(register, value)
    said = b"out\nput" * 3
    for byte in said:
        singles.put(DATA, byte)
    burst.uart.write_all(said)
    assert burst.uart.read_all(count) == bytes(singles.get(DATA) for _ in range(count))
    assert burst.levels == singles.levels
    assert everything(burst) == everything(singles)
