"""The local APIC's timer (Intel SDM, "APIC Timer").

The timer's input clock runs at 1 GHz, as the TSC does: one tick of either is one nanosecond.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from undervisor.hypervisor.devices.clock import Clock
from undervisor.hypervisor.devices.lapic_layout import TimerMode

# A shorter period would leave the guest no time between two interrupts.
SHORTEST_PERIOD_NS: Final = 10_000
TSC_MASK: Final = (1 << 64) - 1


def divisor(divide_configuration: int) -> int:
    """The divisor that bits 3, 1 and 0 of the divide configuration register select."""
    code = divide_configuration >> 1 & 4 | divide_configuration & 3
    return 1 << ((code + 1) & 7)


class LapicTimer:
    """One-shot, periodic and TSC-deadline counting; `expired` is called at each expiry.

    `tsc_offset` is what the processor's TSC is ahead of the machine's clock.
    """

    def __init__(self, clock: Clock, expired: Callable[[], None]) -> None:
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
        self._end = 0  # when the count reaches zero; meaningful while armed
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
        if TimerMode.TSC_DEADLINE in (mode, self.mode):
            self._timer.cancel()
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
        if self._timer.deadline is None or self.mode is TimerMode.TSC_DEADLINE:
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

    def write_deadline(self, tsc: int) -> None:
        """WRMSR of IA32_TSC_DEADLINE: ignored outside TSC-deadline mode, zero disarms."""
        if self.mode is not TimerMode.TSC_DEADLINE:
            return
        self._deadline = tsc
        if tsc:
            self._arm_deadline()
        else:
            self._timer.cancel()

    def read_deadline(self) -> int:
        """RDMSR of IA32_TSC_DEADLINE: zero unless armed."""
        return self._deadline

    def _start(self, count: int) -> None:
        if count:
            self._end = self._clock.now() + count * self._divisor
            self._timer.arm(self._end)
        else:
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
        if self.mode is TimerMode.PERIODIC and self.initial_count:
            period = max(self.initial_count * self._divisor, SHORTEST_PERIOD_NS)
            missed = (self._clock.now() - self._end) // period  # periods slept through are one
            self._end += (missed + 1) * period
            self._timer.arm(self._end)
        self._deadline = 0
        self._expired()
