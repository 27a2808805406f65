"""The 8254 programmable interval timer (Intel 8254 data sheet, "Mode Definitions").

A channel's count and output are pure functions of the clock pulses since it was started.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from undervisor.devices.clock import Clock

FREQUENCY: Final = 1_193_182
NS: Final = 1_000_000_000
REFRESH_NS: Final = 15_085  # DRAM refresh: what bit 4 of port 0x61 toggles with
CONTROL: Final = 3
LATCH, LOW, HIGH, BOTH = 0, 1, 2, 3
ONE_SHOT_MODES: Final = (0, 1, 4, 5)
SQUARE_WAVE: Final = 3
TRIGGERED_MODES: Final = (1, 5)


def output(mode: int, count: int, pulses: int) -> bool:
    """OUT `pulses` clock pulses after a channel with `count` was started."""
    if mode in (0, 1):
        return pulses >= count
    if mode == 2:
        return pulses % count != count - 1
    if mode == SQUARE_WAVE:
        return pulses % count < (count + 1) // 2
    return pulses != count  # 4, 5: low for one pulse at the end


def counter(mode: int, count: int, pulses: int) -> int:
    """What reading the counter shows, 16 bits."""
    if mode in ONE_SHOT_MODES:
        return (count - pulses) & 0xFFFF
    if mode == 2:
        return (count - pulses % count) & 0xFFFF
    # Square wave: it counts by twos, twice per period.
    at = pulses % count
    half = (count + 1) // 2
    return ((count & ~1) - 2 * (at if at < half else at - half)) & 0xFFFF


def next_rise(mode: int, count: int, pulses: int) -> int | None:
    """The first pulse after `pulses` at which OUT rises; None if it never does again."""
    if mode in (2, SQUARE_WAVE):
        return (pulses // count + 1) * count
    at = count if mode in (0, 1) else count + 1
    return at if at > pulses else None


def from_bcd(value: int) -> int:
    """A 16-bit count in binary-coded decimal as a number."""
    return sum((value >> (4 * digit) & 0xF) * 10**digit for digit in range(4))


def to_bcd(value: int) -> int:
    """The inverse of `from_bcd` for counts of up to four digits."""
    return sum(value // 10**digit % 10 << (4 * digit) for digit in range(4))


class Channel:
    """One counter; `rise()` is called, if given, when OUT rises.

    It says whether another rise could matter before `resume` is called; else the channel rests:
    it counts on, but asks for no more deadlines.
    """

    def __init__(self, clock: Clock, rise: Callable[[], bool] | None = None) -> None:
        self._clock = clock
        self._rise = rise
        self._timer = clock.timer(self._rose)
        self.resting = False
        self.mode = 3
        self._bcd = False
        self._access = BOTH
        self._reload = 0x10000
        self._start: int | None = None  # ns; None until a count (or a gate's rise) starts it
        self._low_byte: int | None = None  # written, its high byte still to come
        self._reads_high = False
        self._latched: list[int] = []
        self._null_count = True
        self._loaded = False
        self.gate = True
        self._stopped_at: int | None = None  # pulses, while the gate holds it

    # time

    def pulses(self) -> int:
        """Clock pulses since the channel started."""
        if self._stopped_at is not None:
            return self._stopped_at
        if self._start is None:
            return 0
        return (self._clock.now() - self._start) * FREQUENCY // NS

    def output(self) -> bool:
        """The OUT pin now."""
        if self._start is None:
            return self.mode != 0
        return output(self.mode, self._reload, self.pulses())

    def _count(self) -> int:
        if self._start is None:
            value = self._reload & 0xFFFF
        else:
            value = counter(self.mode, self._reload, self.pulses())
        return to_bcd(value) if self._bcd else value

    def _begin(self, pulses: int = 0) -> None:
        """Count from `pulses` on."""
        self._stopped_at = None
        self._start = self._clock.now() - pulses * NS // FREQUENCY
        self._null_count = False
        self._arm()

    def _arm(self) -> None:
        self.resting = False
        if self._rise is None or self._start is None or self._stopped_at is not None:
            return
        rise = next_rise(self.mode, self._reload, self.pulses())
        if rise is None:
            self._timer.cancel()
        else:
            self._timer.arm(self._start + -(-rise * NS // FREQUENCY))

    def _rose(self) -> None:
        if self._rise is not None and self._rise():
            self._arm()
        else:
            self.resting = True

    def resume(self) -> None:
        """Further rises matter again."""
        if self.resting:
            self._arm()

    def _stop_timer(self) -> None:
        self.resting = False
        self._timer.cancel()

    def set_gate(self, level: bool) -> None:
        """The GATE pin: low stops modes 0, 2, 3, 4; a rise restarts 1, 2, 3 and 5."""
        rises, falls = level and not self.gate, self.gate and not level
        self.gate = level
        if self.mode in TRIGGERED_MODES:
            if rises and self._loaded:
                self._begin()
        elif falls and self._start is not None:
            self._stopped_at = self.pulses()
            self._stop_timer()
        elif rises and (self._stopped_at is not None or self._start is not None):
            self._begin(0 if self.mode in (2, SQUARE_WAVE) else self._stopped_at or 0)

    # programming

    def program(self, control: int) -> None:
        """A control word for this channel."""
        access = control >> 4 & 3
        if access == LATCH:
            self.latch_count()
            return
        mode = control >> 1 & 7
        self.mode = mode & 3 if mode > 5 else mode
        self._bcd = bool(control & 1)
        self._access = access
        self._start = self._stopped_at = self._low_byte = None
        self._reads_high, self._null_count, self._loaded = False, True, False
        self._latched = []
        self._stop_timer()

    def latch_count(self) -> None:
        """The counter latch command: the next reads see the count of now."""
        if not self._latched:
            self._latched = self._bytes_of(self._count())

    def latch_status(self) -> None:
        """Read-back of the status byte, which is read before a latched count."""
        status = self.output() << 7 | self._null_count << 6
        status |= self._access << 4 | self.mode << 1 | self._bcd
        self._latched = [status, *self._latched]

    def _bytes_of(self, count: int) -> list[int]:
        both = [count & 0xFF, count >> 8]
        return {LOW: both[:1], HIGH: both[1:]}.get(self._access, both)

    def read(self) -> int:
        """The next byte of the latched values, or of the running count."""
        if self._latched:
            return self._latched.pop(0)
        values = self._bytes_of(self._count())
        if len(values) == 1:
            return values[0]
        self._reads_high = not self._reads_high
        return values[0] if self._reads_high else values[1]

    def write(self, value: int) -> None:
        """The next byte of a count; the last one loads it."""
        if self._access == BOTH and self._low_byte is None:
            self._low_byte = value
            if self.mode == 0:  # the first byte stops the count
                self._start = None
                self._stop_timer()
            return
        count = {LOW: value, HIGH: value << 8}.get(self._access, value << 8)
        count |= self._low_byte or 0
        self._low_byte = None
        self._load(count)

    def _load(self, count: int) -> None:
        if self._bcd:
            self._reload = from_bcd(count) or 10_000
        else:
            self._reload = count or 0x10000
        if self.mode in (2, SQUARE_WAVE) and self._reload == 1:
            self._reload = 2  # the data sheet forbids 1
        self._loaded = True
        if self.mode in TRIGGERED_MODES:
            return
        if self.gate:
            self._begin()
        else:
            self._start, self._stopped_at = self._clock.now(), 0


class Pit:
    """Three channels and their control port; channel 2 is the speaker's, gated by port 0x61."""

    def __init__(self, clock: Clock, irq: Callable[[], bool]) -> None:
        self._clock = clock
        self.channels = (Channel(clock, irq), Channel(clock), Channel(clock))
        self.channels[2].gate = False
        self._speaker = 0

    def set_up_by_firmware(self) -> None:
        """What a PC's firmware leaves: channel 0 at 18.2 Hz, for the BIOS's clock."""
        for offset, value in ((CONTROL, 0x34), (0, 0), (0, 0)):
            self.write(offset, 1, value)

    def read(self, offset: int, size: int) -> int:
        """A counter; the control port cannot be read."""
        return 0xFF if offset == CONTROL else self.channels[offset].read()

    def write(self, offset: int, size: int, value: int) -> None:
        """A counter's byte, a control word or the read-back command."""
        if offset != CONTROL:
            self.channels[offset].write(value)
        elif value >> 6 == 3:
            self._read_back(value)
        else:
            self.channels[value >> 6].program(value)

    def _read_back(self, value: int) -> None:
        for number, channel in enumerate(self.channels):
            if value >> (number + 1) & 1:
                if not value & 0x20:
                    channel.latch_count()
                if not value & 0x10:
                    channel.latch_status()

    def read_speaker(self, offset: int, size: int) -> int:
        """Port 0x61: gate and speaker bits, the refresh toggle, and OUT of channel 2."""
        refresh = self._clock.now() // REFRESH_NS & 1
        return self._speaker | refresh << 4 | self.channels[2].output() << 5

    def write_speaker(self, offset: int, size: int, value: int) -> None:
        """Port 0x61: bit 0 is channel 2's gate."""
        self._speaker = value & 0x0F
        self.channels[2].set_gate(bool(value & 1))
