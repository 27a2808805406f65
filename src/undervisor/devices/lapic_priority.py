"""Which vector a local APIC delivers (Intel SDM, "Interrupt Acceptance for Fixed Interrupts")."""

from __future__ import annotations

from collections.abc import Callable

CLASS = 0xF0


class Priorities:
    """IRR, ISR and TMR as 256-bit sets of vectors, and the two priority registers.

    `deliverable` is the vector that may interrupt the processor now, or None; `wake()` is called
    when it becomes another vector.
    """

    __slots__ = ("_wake", "deliverable", "irr", "isr", "ppr", "tmr", "tpr")

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self.reset()

    def reset(self) -> None:
        """Nothing requested, nothing in service, task priority 0."""
        self.irr = self.isr = self.tmr = 0
        self.tpr = self.ppr = 0
        self.deliverable: int | None = None

    def set_tpr(self, value: int) -> None:
        """The task-priority register, 8 bits."""
        self.tpr = value
        self._update()

    def request(self, vector: int, level: bool) -> None:
        """A fixed interrupt arrived; at most one more of a vector waits."""
        bit = 1 << vector
        self.tmr = self.tmr | bit if level else self.tmr & ~bit
        if not self.irr & bit:
            self.irr |= bit
            self._update()

    def take(self, vector: int) -> None:
        """The processor takes `vector`, which is `deliverable`: from requested to in service."""
        bit = 1 << vector
        self.irr &= ~bit
        self.isr |= bit
        self._update()

    def end(self) -> int | None:
        """EOI: the highest vector in service ends; None where there is none."""
        vector = self.isr.bit_length() - 1
        if vector < 0:
            return None
        self.isr &= ~(1 << vector)
        self._update()
        return vector

    def is_level(self, vector: int) -> bool:
        """Whether the vector was last requested by a level-triggered interrupt."""
        return bool(self.tmr >> vector & 1)

    def _update(self) -> None:
        in_service = max(self.isr.bit_length() - 1, 0) & CLASS
        tpr = self.tpr
        self.ppr = ppr = tpr if tpr & CLASS >= in_service else in_service
        highest = self.irr.bit_length() - 1
        before = self.deliverable
        if highest > 0 and highest & CLASS > ppr & CLASS:
            self.deliverable = highest
            if highest != before:
                self._wake()
        else:
            self.deliverable = None
