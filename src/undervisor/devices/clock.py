"""Virtual time and the timers that wait for it.

The machine owns time: it passes a function that tells the nanoseconds since power-on.  The loop
bounds each slice of execution by `next_deadline()` and calls `run_due()` after it.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush

# Cancelled entries stay in the heap until they surface; more than these and it is rebuilt.
STALE_ENTRIES_KEPT = 64


class Timer:
    """One callback that is called once per arming; `deadline` is None while it is not armed."""

    __slots__ = ("_clock", "_turn", "callback", "deadline")

    def __init__(self, clock: Clock, callback: Callable[[], None]) -> None:
        self._clock = clock
        self._turn = 0
        self.callback = callback
        self.deadline: int | None = None

    def arm(self, deadline: int) -> None:
        """Call back at `deadline` (ns); replaces an earlier deadline."""
        self._clock._arm(self, deadline)

    def cancel(self) -> None:
        """Do not call back; harmless when not armed."""
        if self.deadline is not None:
            self.deadline = None
            self._clock._forget()


class Clock:
    """The timers of one machine, in order of deadline, then of arming.

    `armings` counts them: while it stays the same, no deadline has come nearer.
    """

    __slots__ = ("_heap", "_stale", "armings", "now")

    def __init__(self, now: Callable[[], int]) -> None:
        self.now = now
        self._heap: list[tuple[int, int, Timer]] = []
        self.armings = 0
        self._stale = 0

    def timer(self, callback: Callable[[], None]) -> Timer:
        """A timer that is not armed yet."""
        return Timer(self, callback)

    def at(self, deadline: int, callback: Callable[[], None]) -> Timer:
        """A timer that calls back at `deadline` (ns); a past one is due at once."""
        timer = Timer(self, callback)
        timer.arm(deadline)
        return timer

    def next_deadline(self) -> int | None:
        """The earliest deadline (ns), or None when nothing waits."""
        heap = self._heap
        while heap:
            deadline, turn, timer = heap[0]
            if timer._turn == turn and timer.deadline is not None:
                return deadline
            heappop(heap)
            self._stale -= 1
        return None

    def run_due(self) -> None:
        """Call back every timer whose deadline has come, also those armed meanwhile."""
        now = self.now()
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            timer = heappop(self._heap)[2]
            timer.deadline = None
            timer.callback()

    def _arm(self, timer: Timer, deadline: int) -> None:
        if timer.deadline is not None:
            self._forget()
        self.armings += 1
        timer._turn = self.armings
        timer.deadline = deadline
        heappush(self._heap, (deadline, self.armings, timer))

    def _forget(self) -> None:
        """Account for an entry that became stale; rebuild the heap when they prevail."""
        self._stale += 1
        if self._stale > STALE_ENTRIES_KEPT and 2 * self._stale > len(self._heap):
            live = [e for e in self._heap if e[2]._turn == e[1] and e[2].deadline is not None]
            heapify(live)
            self._heap = live
            self._stale = 0
