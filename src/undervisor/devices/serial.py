"""The 16550A UART (National Semiconductor PC16550D data sheet).

Transmission takes no time: the transmitter is empty again when the OUT retires.  The interrupt
line is not gated by MCR.OUT2, as on QEMU's PC, where the images that we run were built to run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from undervisor.arch.bits import Bits, Register
from undervisor.devices.output import Output

FIFO_DEPTH = 16
TRIGGER_LEVELS = (1, 4, 8, 14)
LAST_LATCHED = 1  # DLAB replaces registers 0 and 1
# Interrupt identification codes, highest priority first ("Interrupt Control Functions").
LINE_ERROR, DATA_READY, TIMEOUT, TRANSMITTER_EMPTY, MODEM, NOTHING = 6, 4, 0xC, 2, 0, 1
FIFOS_ON = 0xC0
STARVED_POLLS = 8


class Input(Protocol):
    """Where the host's bytes for the guest come from."""

    @property
    def open(self) -> bool:
        """Whether anything may ever come again."""

    def poll(self) -> bytes:
        """What has come since the last call, for a guest that looks again and again."""

    def wait(self, seconds: float | None = None) -> bytes:
        """The same, but wait for something, at most so long; empty where nothing came."""


class InterruptEnable(Register):
    """IER."""

    WIDTH = 8
    data_ready = Bits(0)
    transmitter_empty = Bits(1)
    line_status = Bits(2)
    modem_status = Bits(3)


class LineStatus(Register):
    """LSR."""

    WIDTH = 8
    data_ready = Bits(0)
    overrun = Bits(1)
    holding_empty = Bits(5, about="THRE")
    transmitter_empty = Bits(6, about="TEMT")


class ModemControl(Register):
    """MCR."""

    WIDTH = 8
    dtr = Bits(0)
    rts = Bits(1)
    out1 = Bits(2)
    out2 = Bits(3)
    loopback = Bits(4)


class ModemStatus(Register):
    """MSR; the low four bits say what changed since the last read."""

    WIDTH = 8
    changed = Bits(3, 0)
    cts = Bits(4)
    dsr = Bits(5)
    ri = Bits(6)
    dcd = Bits(7)


# Masks that every byte tests, looked up once.
EMPTY_ENABLED = int(InterruptEnable.transmitter_empty)
LOOPBACK = int(ModemControl.loopback)
TRANSMITTER_IDLE = int(LineStatus.of(holding_empty=1, transmitter_empty=1))
CONNECTED = int(ModemStatus.of(cts=1, dsr=1, dcd=1))
DIVISOR_LATCH = 0x80


class Serial:
    """One UART of eight byte-wide registers.

    `irq(level)` drives its interrupt line; `sink(bytes)` takes output; `feed` gives input.
    `on_starved` is called at every `starved_polls`th look for input that is not there.
    """

    def __init__(
        self,
        irq: Callable[[bool], None],
        sink: Callable[[bytes], None],
        starved_polls: int = STARVED_POLLS,
    ) -> None:
        self._irq = irq
        self._starved_polls = starved_polls
        self._line = False
        self._output = Output(sink)
        self._waiting: deque[int] = deque()  # from the host, not yet in the UART
        self._fifo: deque[int] = deque()
        self._ier = self._lcr = self._mcr = self._scratch = self._fifo_control = 0
        self._msr = CONNECTED
        self._divisor = 12  # 9600 baud
        self._overrun = 0
        self._empty_pending = False  # the THRE interrupt: cleared by reading it
        self._idle_polls = 0
        self.on_starved: Callable[[], None] = lambda: None
        self._readers: tuple[Callable[[], int], ...] = (
            self._read_data, lambda: self._ier, self._identify, lambda: self._lcr,
            lambda: self._mcr, self._line_status, self._modem_status, lambda: self._scratch,
        )  # fmt: skip
        self._writers: tuple[Callable[[int], None], ...] = (
            self._write_data, self._write_enable, self._write_fifo_control,
            self._write_line_control, self._write_modem_control,
            lambda value: None, lambda value: None, self._write_scratch,
        )  # fmt: skip

    def feed(self, data: bytes) -> None:
        """Input from the host; it waits until the guest has taken what came before."""
        self._waiting.extend(data)
        self._receive()

    @property
    def can_interrupt_for_input(self) -> bool:
        """Whether input would raise the interrupt line."""
        return bool(self._ier & InterruptEnable.data_ready)

    def flush(self) -> None:
        """Hand buffered output to the sink: at the end of a run, and when the guest idles."""
        self._output.flush()

    def read(self, offset: int, size: int) -> int:
        """A byte-wide register; DLL and DLM where LCR.DLAB selects them."""
        if offset <= LAST_LATCHED and self._lcr & DIVISOR_LATCH:
            return self._divisor >> (8 * offset) & 0xFF
        return self._readers[offset]()

    def write(self, offset: int, size: int, value: int) -> None:
        """A byte-wide register; DLL and DLM where LCR.DLAB selects them."""
        if offset <= LAST_LATCHED and self._lcr & DIVISOR_LATCH:
            keep = self._divisor & (0xFF00 >> (8 * offset))
            self._divisor = keep | value << (8 * offset)
        else:
            self._writers[offset](value)

    def read_all(self, count: int) -> bytes:
        """The receiver read `count` times in a row, as REP INSB does."""
        if (self._lcr & DIVISOR_LATCH) or self._mcr & LOOPBACK:
            return bytes(self.read(0, 1) for _ in range(count))
        # The FIFO is filled up after each read, so that the two queues are one.
        data = bytearray()
        for queue in (self._fifo, self._waiting):
            while queue and len(data) < count:
                data.append(queue.popleft())
        self._idle_polls = 0
        self._receive()
        return bytes(data.ljust(count, b"\0"))

    def write_all(self, data: bytes) -> None:
        """The transmitter written with each byte of `data` in a row, as REP OUTSB does."""
        if (self._lcr & DIVISOR_LATCH) or self._mcr & LOOPBACK or self._ier & EMPTY_ENABLED:
            for value in data:
                self.write(0, 1, value)
        else:
            self._idle_polls = 0
            self._output.put_all(data)

    # receiver

    def _receive(self) -> None:
        """Move input into the FIFO as far as it has room; input is never lost to overrun."""
        if not self._mcr & LOOPBACK:
            room = (FIFO_DEPTH if self._fifo_control & 1 else 1) - len(self._fifo)
            for _ in range(min(room, len(self._waiting))):
                self._fifo.append(self._waiting.popleft())
        self._update()

    def _read_data(self) -> int:
        value = self._fifo.popleft() if self._fifo else 0
        self._idle_polls = 0
        self._receive()
        return value

    # transmitter

    def _write_data(self, value: int) -> None:
        self._idle_polls = 0
        if self._mcr & LOOPBACK:
            self._loop_back(value)
        else:
            self._output.put(value)
        if self._ier & EMPTY_ENABLED:
            self._empty_pending = False
            self._update()  # the line must fall for an edge-triggered controller to see the rise
            self._empty_pending = True
            self._update()

    def _loop_back(self, value: int) -> None:
        if len(self._fifo) < (FIFO_DEPTH if self._fifo_control & 1 else 1):
            self._fifo.append(value)
        else:
            self._overrun = int(LineStatus.overrun)
            if not self._fifo_control & 1:
                self._fifo[0] = value
        self._update()

    # control and status

    def _write_enable(self, value: int) -> None:
        rises = value & ~self._ier & EMPTY_ENABLED
        self._ier = value & 0x0F
        if rises:
            self._empty_pending = True
        self._update()

    def _write_fifo_control(self, value: int) -> None:
        if (value ^ self._fifo_control) & 1 or value & 2:
            self._fifo.clear()
        self._fifo_control = value & 0xC9 if value & 1 else 0
        self._receive()

    def _write_line_control(self, value: int) -> None:
        self._lcr = value

    def _write_scratch(self, value: int) -> None:
        self._scratch = value

    def _write_modem_control(self, value: int) -> None:
        self._mcr = value & 0x1F
        lines = CONNECTED
        if value & LOOPBACK:
            # DTR, RTS, OUT1, OUT2 come back as DSR, CTS, RI, DCD.
            lines = int(
                ModemStatus.of(
                    dsr=value & 1, cts=value >> 1 & 1, ri=value >> 2 & 1, dcd=value >> 3 & 1
                )
            )
        rise_or_fall = (self._msr ^ lines) >> 4 & 0b1011
        ring_ends = (self._msr & ~lines) >> 4 & 0b0100
        self._msr = lines | self._msr & ModemStatus.changed | rise_or_fall | ring_ends
        self._receive()

    def _line_status(self) -> int:
        if self._fifo:
            value = TRANSMITTER_IDLE | self._overrun | 1
        else:
            value = TRANSMITTER_IDLE | self._overrun
            # A guest that polls again without writing is waiting for input: show what it said.
            self._idle_polls += 1
            if self._idle_polls == 2:
                self._output.flush()
            if self._idle_polls % self._starved_polls == 0:
                self.on_starved()
        if self._overrun:
            self._overrun = 0
            self._update()
        return value

    def _modem_status(self) -> int:
        value = self._msr
        self._msr &= ~int(ModemStatus.changed)
        self._update()
        return value

    # interrupts

    def _source(self) -> int:
        """The pending interrupt of the highest priority, as IIR names it."""
        ier = self._ier
        if ier & InterruptEnable.line_status and self._overrun:
            return LINE_ERROR
        if ier & InterruptEnable.data_ready and self._fifo:
            trigger = TRIGGER_LEVELS[self._fifo_control >> 6] if self._fifo_control & 1 else 1
            # No more will come than what waits: below the trigger level is already a timeout.
            return DATA_READY if len(self._fifo) >= trigger else TIMEOUT
        if ier & EMPTY_ENABLED and self._empty_pending:
            return TRANSMITTER_EMPTY
        if ier & InterruptEnable.modem_status and self._msr & ModemStatus.changed:
            return MODEM
        return NOTHING

    def _identify(self) -> int:
        source = self._source()
        if source == TRANSMITTER_EMPTY:
            self._empty_pending = False
            self._update()
        return source | (FIFOS_ON if self._fifo_control & 1 else 0)

    def _update(self) -> None:
        level = self._source() != NOTHING
        if level != self._line:
            self._line = level
            self._irq(level)
