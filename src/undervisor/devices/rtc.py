"""The real-time clock and CMOS RAM (Motorola MC146818A data sheet, IBM PC AT's use of it).

The clock starts at a fixed date and runs in virtual time, so that each run sees the same.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final

from undervisor.arch.bits import Bits, Register
from undervisor.arch.x86.boot import DEVICE_HOLE, HIGH_RAM
from undervisor.devices.clock import Clock

NS: Final = 1_000_000_000
POWER_ON: Final = datetime(2026, 1, 1, tzinfo=UTC)
UPDATE_NS: Final = 244_000  # "update in progress" precedes each second by this
SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY = 0, 2, 4, 6, 7, 8, 9, 0x32
TIME_REGISTERS: Final = (SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY)
ALARMS: Final = {1: SECONDS, 3: MINUTES, 5: HOURS}
A, B, C, D = 0x0A, 0x0B, 0x0C, 0x0D
ANY: Final = 0xC0  # an alarm register with both bits set matches every value
PM: Final = 0x80
RATE: Final = 0x0F
KIB, SIXTEEN_MIB = 1 << 10, 16 << 20


class Control(Register):
    """Register B."""

    WIDTH = 8
    hours24 = Bits(1)
    binary = Bits(2)
    update_interrupt = Bits(4)
    alarm_interrupt = Bits(5)
    periodic_interrupt = Bits(6)
    halt = Bits(7, about="SET")


class Flags(Register):
    """Register C; reading it clears it."""

    WIDTH = 8
    update = Bits(4)
    alarm = Bits(5)
    periodic = Bits(6)
    request = Bits(7)


def memory_registers(ram_size: int, cpu_count: int) -> dict[int, int]:
    """What a PC's firmware stores about memory (KiB, 64 KiB units) and processors."""
    low = min(ram_size, DEVICE_HOLE)
    values = {
        0x15: (640, 2),
        0x17: (min((low - HIGH_RAM) // KIB, 0xFFFF), 2),
        0x30: (min((low - HIGH_RAM) // KIB, 0xFFFF), 2),
        0x34: (max(low - SIXTEEN_MIB, 0) // (64 * KIB), 2),
        0x5B: ((ram_size - low) // (64 * KIB), 3),
        0x5F: (cpu_count - 1, 1),
        0x14: (0x06, 1),  # equipment: coprocessor, PS/2 mouse port
    }
    return {
        first + at: value >> (8 * at) & 0xFF
        for first, (value, count) in values.items()
        for at in range(count)
    }


def periodic_ns(rate: int) -> int | None:
    """The period that register A's rate selection means; None is off."""
    if rate == 0:
        return None
    return NS * (1 << ((rate if rate > 2 else rate + 7) - 1)) // 32768


class Rtc:
    """Ports 0x70 (index; bit 7, the NMI mask, changes nothing) and 0x71 (data)."""

    def __init__(
        self, clock: Clock, irq: Callable[[bool], None], ram_size: int, cpu_count: int
    ) -> None:
        self._clock = clock
        self._irq = irq
        self._index = 0
        self._cmos = bytearray(128)
        for register, value in memory_registers(ram_size, cpu_count).items():
            self._cmos[register] = value
        self._cmos[A], self._cmos[B], self._cmos[D] = 0x26, int(Control.hours24), 0x80
        self._offset = timedelta()
        self._held: dict[int, int] | None = None  # time registers while SET holds the clock
        self._flags = 0
        self._last_update = self._last_period = 0
        self._second = clock.timer(self._each_second)
        self._periodic = clock.timer(self._each_period)

    def read(self, offset: int, size: int) -> int:
        """The indexed register; the index port cannot be read."""
        return 0xFF if offset == 0 else self._read(self._index)

    def write(self, offset: int, size: int, value: int) -> None:
        """The index, or the indexed register."""
        if offset == 0:
            self._index = value & 0x7F
        else:
            self._write(self._index, value)

    def now(self) -> datetime:
        """The date and time that the clock shows."""
        return POWER_ON + self._offset + timedelta(microseconds=self._clock.now() // 1000)

    # registers

    def _read(self, register: int) -> int:
        if register in TIME_REGISTERS:
            time = self._time() if self._held is None else self._held
            return self._encode(register, time[register])
        if register == A:
            return self._cmos[A] | self._is_updating() << 7
        if register == C:
            return self._take_flags()
        return self._cmos[register]

    def _write(self, register: int, value: int) -> None:
        if register in TIME_REGISTERS:
            self._write_time(register, value)
        elif register == A:
            self._cmos[A] = value & 0x7F
            self._arm()
        elif register == B:
            self._write_control(value)
        elif register not in (C, D):
            self._cmos[register] = value

    def _write_control(self, value: int) -> None:
        self._cmos[B] = value
        if value & Control.halt:
            self._held = self._held or self._time()
        elif self._held is not None:
            self._set_time(self._held)
            self._held = None
        self._arm()

    def _is_updating(self) -> bool:
        return self._held is None and self._clock.now() % NS >= NS - UPDATE_NS

    # time of day

    def _time(self) -> dict[int, int]:
        now = self.now()
        return {
            SECONDS: now.second, MINUTES: now.minute, HOURS: now.hour,
            WEEKDAY: now.isoweekday() % 7 + 1, DAY: now.day, MONTH: now.month,
            YEAR: now.year % 100, CENTURY: now.year // 100,
        }  # fmt: skip

    def _write_time(self, register: int, value: int) -> None:
        time = self._time() if self._held is None else self._held
        time[register] = self._decode(register, value)
        if self._held is None:
            self._set_time(time)

    def _set_time(self, time: dict[int, int]) -> None:
        """Set the clock; a date that does not exist leaves it as it was."""
        try:
            wanted = datetime(
                time[CENTURY] * 100 + time[YEAR], time[MONTH], time[DAY],
                time[HOURS], time[MINUTES], time[SECONDS], tzinfo=UTC,
            )  # fmt: skip
            self._offset += wanted - self.now().replace(microsecond=0)
        except (ValueError, OverflowError):
            return

    def _encode(self, register: int, value: int) -> int:
        control, afternoon = self._cmos[B], 0
        if register == HOURS and not control & Control.hours24:
            afternoon = PM if value >= 12 else 0
            value = value % 12 or 12
        if not control & Control.binary:
            value = value // 10 << 4 | value % 10
        return value | afternoon

    def _decode(self, register: int, value: int) -> int:
        control, afternoon = self._cmos[B], False
        if register == HOURS and not control & Control.hours24:
            afternoon = bool(value & PM)
            value &= ~PM
        if not control & Control.binary:
            value = (value >> 4) * 10 + (value & 0xF)
        if register == HOURS and not control & Control.hours24:
            value = value % 12 + 12 * afternoon
        return value

    # interrupts

    def _arm(self) -> None:
        """Arm what register B asks to interrupt for, as far as an interrupt is not out already.

        What passes until register C is read, reading it finds out; only alarms must be watched.
        """
        control, now = self._cmos[B], self._clock.now()
        watched = int(Control.alarm_interrupt)
        if not self._flags & Flags.request:
            watched |= Control.update_interrupt | Control.periodic_interrupt
        watched &= control
        period = periodic_ns(self._cmos[A] & RATE)
        self._second.cancel()
        self._periodic.cancel()
        if watched & (Control.update_interrupt | Control.alarm_interrupt):
            self._second.arm((now // NS + 1) * NS)
        if watched & Control.periodic_interrupt and period:
            self._periodic.arm((now // period + 1) * period)

    def _each_second(self) -> None:
        if self._held is None:
            matches = self._alarm_matches()
            self._raise(int(Flags.update) | (int(Flags.alarm) if matches else 0))
        self._arm()

    def _each_period(self) -> None:
        self._raise(int(Flags.periodic))
        self._arm()

    def _alarm_matches(self) -> bool:
        return all(
            self._cmos[alarm] & ANY == ANY or self._cmos[alarm] == self._read(register)
            for alarm, register in ALARMS.items()
        )

    def _raise(self, flags: int) -> None:
        self._flags |= flags
        # The flags and the interrupt enables have the same bit positions.
        if self._flags & self._cmos[B] & 0x70:
            self._flags |= int(Flags.request)
            self._irq(True)

    def _take_flags(self) -> int:
        """Register C; what nothing interrupted for has happened if its time has passed since."""
        now, flags = self._clock.now(), self._flags
        if now // NS != self._last_update // NS and self._held is None:
            flags |= int(Flags.update)
        period = periodic_ns(self._cmos[A] & RATE)
        if period and now // period != self._last_period // period:
            flags |= int(Flags.periodic)
        self._last_update = self._last_period = now
        self._flags = 0
        self._irq(False)
        self._arm()
        return flags
