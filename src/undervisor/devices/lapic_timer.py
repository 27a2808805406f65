"""The local APIC's timer (Intel SDM, "APIC Timer").

The timer's input clock runs at 1 GHz, as the TSC does: one tick of either is one nanosecond.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from undervisor.devices.clock import Clock
from undervisor.devices.lapic_layout import TimerMode

# A shorter period would leave the guest no time between two interrupts.
SHORTEST_PERIOD_NS: Final = 10_000
TSC_MASK: Final = (1 << 64) - 1


def divisor(divide_configuration: int) -> int:
    """The divisor that bits 3, 1 and 0 of the divide configuration register select."""
    code = divide_configuration >> 1 & 4 | divide_configuration & 3
    return 1 << ((code + 1) & 7)


class LapicTimer:
    """One-shot, periodic and TSC-deadline counting.

    `expired()` is called at each expiry and says whether another one could matter before
    `resume` is called.  A periodic timer whose interrupt already waits, or is masked, then rests:
    nobody can see the difference, and a machine in which nothing can happen has no deadlines.
    """

    def __init__(self, clock: Clock, expired: Callable[[], bool]) -> None:
        self._clock = clock
        self._expired = expired
        self._timer = clock.timer(self._expire)
        self._tsc_offset = 0
        self.reset()

    def reset(self) -> None:
        """The state after power-on and INIT."""
        self.mode = TimerMode.ONE_SHOT
        self.initial_count = 0
        self.divide_configuration = 0
        self._divisor = 2
        self._end = 0  # when the count reaches zero
        self._counting = False
        self.resting = False
        self._deadline = 0  # IA32_TSC_DEADLINE; 0 is disarmed
        self._timer.cancel()

    @property
    def tsc_offset(self) -> int:
        """The processor's TSC minus the machine's clock."""
        return self._tsc_offset

    @tsc_offset.setter
    def tsc_offset(self, offset: int) -> None:
        self._tsc_offset = offset
        if self._deadline:
            self._arm_deadline()

    def set_mode(self, mode: TimerMode) -> None:
        """Change the mode; to or from TSC-deadline mode disarms the timer."""
        if mode is self.mode:
            return
        self.resume()
        if TimerMode.TSC_DEADLINE in (mode, self.mode):
            self._stop()
            self._deadline = 0
        self.mode = mode

    def write_initial_count(self, count: int) -> None:
        """Start counting down from `count`; zero stops."""
        if self.mode is TimerMode.TSC_DEADLINE:
            return
        self.initial_count = count
        self._start(count)

    def current_count(self) -> int:
        """What is left; zero when the timer does not count."""
        if not self._counting:
            return 0
        left = self._end - self._clock.now()
        period = self.initial_count * self._divisor
        if self.mode is TimerMode.PERIODIC and period and not 0 < left <= period:
            left = left % period or period
        return -(-max(left, 0) // self._divisor)

    def write_divide(self, value: int) -> None:
        """A new divide configuration; what is left of a count goes on at the new rate."""
        count = self.current_count()
        self.divide_configuration = value & 0b1011
        self._divisor = divisor(value)
        if count:
            self._start(count)

    def write_tsc_deadline(self, tsc: int) -> None:
        """WRMSR of IA32_TSC_DEADLINE: ignored outside TSC-deadline mode, zero disarms."""
        if self.mode is not TimerMode.TSC_DEADLINE:
            return
        self._deadline = tsc
        if tsc:
            self._arm_deadline()
        else:
            self._timer.cancel()

    @property
    def tsc_deadline(self) -> int:
        """RDMSR of IA32_TSC_DEADLINE: zero unless armed."""
        return self._deadline

    def resume(self) -> None:
        """The interrupt was taken or unmasked: further expiries matter again."""
        if self.resting:
            self.resting = False
            self._next_period()

    def _start(self, count: int) -> None:
        if count:
            self._counting, self.resting = True, False
            self._end = self._clock.now() + count * self._divisor
            self._timer.arm(self._end)
        else:
            self._stop()

    def _stop(self) -> None:
        self._counting = self.resting = False
        self._timer.cancel()

    def _arm_deadline(self) -> None:
        now = self._clock.now()
        wait = self._deadline - ((now + self._tsc_offset) & TSC_MASK)
        if wait > 0:
            self._timer.arm(now + wait)
        else:
            self._timer.cancel()
            self._expire()

    def _expire(self) -> None:
        self._deadline = 0
        if self.mode is not TimerMode.PERIODIC or not self.initial_count:
            self._counting = False
            self._expired()
        elif self._expired():
            self._next_period()
        else:
            self.resting = True

    def _next_period(self) -> None:
        """Arm the first end of a period after now; periods slept through are one."""
        period = max(self.initial_count * self._divisor, SHORTEST_PERIOD_NS)
        self._end += ((self._clock.now() - self._end) // period + 1) * period
        self._timer.arm(self._end)
