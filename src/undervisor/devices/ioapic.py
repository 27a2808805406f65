"""The I/O APIC (Intel 82093AA data sheet; the EOI register of version 0x20)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from undervisor.arch.bits import Bits, Register
from undervisor.devices.bus import all_ones
from undervisor.devices.interrupts import InterruptBus, Message
from undervisor.devices.lapic_layout import DeliveryMode

DEFAULT_BASE: Final = 0xFEC00000
PINS: Final = 24
VERSION: Final = (PINS - 1) << 16 | 0x20
SELECT, WINDOW, EOI = 0x00, 0x10, 0x40
IDENTIFICATION, VERSION_REGISTER, ARBITRATION, FIRST_ENTRY = 0x00, 0x01, 0x02, 0x10
DELIVERY_MODES: Final = tuple(DeliveryMode)


class Redirection(Register):
    """A redirection table entry."""

    vector = Bits(7, 0)
    delivery_mode = Bits(10, 8)
    logical = Bits(11)
    delivery_status = Bits(12)
    polarity = Bits(13)
    remote_irr = Bits(14)
    level = Bits(15)
    mask = Bits(16)
    destination = Bits(63, 56)


READ_ONLY: Final = Redirection.delivery_status | Redirection.remote_irr
WRITABLE: Final = Redirection.DECLARED & ~READ_ONLY


class IoApic:
    """24 pins, each with a redirection entry; `set_pin` is where devices come in.

    An edge on a masked pin is lost, as the data sheet says.  Delivery mode ExtINT is accepted
    and delivers nothing: the 8259 pair is wired to the local APICs, not to a pin here.
    """

    def __init__(self, bus: InterruptBus, apic_id: int) -> None:
        self._bus = bus
        self._id = apic_id
        self._select = 0
        self._entries = [int(Redirection.mask)] * PINS
        self._lines = 0
        self.on_change: Callable[[], None] = lambda: None  # after each write of an entry
        bus.on_eoi.append(self.end_of_interrupt)

    def set_pin(self, pin: int, level: bool) -> None:
        """Drive a pin high (asserted) or low; polarity bits change nothing here."""
        bit = 1 << pin
        rises = level and not self._lines & bit
        self._lines = self._lines | bit if level else self._lines & ~bit
        entry = self._entries[pin]
        if entry & Redirection.mask:
            return
        if entry & Redirection.level:
            self._service_level(pin)
        elif rises:
            self._send(pin)

    def is_masked(self, pin: int) -> bool:
        """Whether the pin's entry is masked."""
        return bool(self._entries[pin] & Redirection.mask)

    def end_of_interrupt(self, vector: int) -> None:
        """EOI broadcast: level entries with the vector may interrupt again, and do if high."""
        for pin, entry in enumerate(self._entries):
            if entry & Redirection.remote_irr and entry & Redirection.vector == vector:
                self._entries[pin] = entry & ~int(Redirection.remote_irr)
                self._service_level(pin)

    def read(self, offset: int, size: int) -> int:
        """IOREGSEL or what it selects."""
        if offset == SELECT:
            return self._select
        value = self._read_register(self._select) if offset == WINDOW else 0
        return value & all_ones(size)

    def write(self, offset: int, size: int, value: int) -> None:
        """IOREGSEL, what it selects, or the EOI register."""
        if offset == SELECT:
            self._select = value & 0xFF
        elif offset == WINDOW:
            self._write_register(self._select, value & 0xFFFFFFFF)
        elif offset == EOI:
            self.end_of_interrupt(value & 0xFF)

    def _read_register(self, register: int) -> int:
        if register in (IDENTIFICATION, ARBITRATION):
            return self._id << 24
        if register == VERSION_REGISTER:
            return VERSION
        pin, high = divmod(register - FIRST_ENTRY, 2)
        if 0 <= pin < PINS:
            return self._entries[pin] >> (32 * high) & 0xFFFFFFFF
        return 0

    def _write_register(self, register: int, value: int) -> None:
        if register == IDENTIFICATION:
            self._id = value >> 24 & 0xF
        pin, high = divmod(register - FIRST_ENTRY, 2)
        if not 0 <= pin < PINS:
            return
        half = 0xFFFFFFFF << (32 * high)
        writable = WRITABLE & half
        entry = self._entries[pin] & ~writable | value << (32 * high) & writable
        if not entry & Redirection.level:
            # Older software clears a stuck remote IRR by switching to edge and back.
            entry &= ~int(Redirection.remote_irr)
        self._entries[pin] = entry
        self._service_level(pin)
        self.on_change()

    def _service_level(self, pin: int) -> None:
        """Send for a level entry that is high, not masked, and not waiting for an EOI."""
        entry = self._entries[pin]
        blocked = entry & (Redirection.mask | Redirection.remote_irr)
        if entry & Redirection.level and not blocked and self._lines >> pin & 1 and self._send(pin):
            self._entries[pin] |= int(Redirection.remote_irr)

    def _send(self, pin: int) -> bool:
        entry = Redirection(self._entries[pin])
        mode = DELIVERY_MODES[entry.delivery_mode]
        level = bool(entry.level) and mode <= DeliveryMode.LOWEST_PRIORITY
        taken = self._bus.send(
            Message(mode, entry.vector, entry.destination, bool(entry.logical), level)
        )
        return taken and level
