"""Whose was each exit?

Every hardware exit shows as kvm_exit.  If the vCPU was in L2, kvm_nested_vmexit follows before the
next entry; if KVM then gives the exit to L1, kvm_nested_vmexit_inject follows too.  An injection
with another reason than the exit's is one that L0 made up for L1, for example to deliver an
interrupt; the hardware exit was then L0's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from undervisor.host.exits.trace import Event, Record

REASON_LIMIT = 500
"""Distinct reasons that are counted; the manuals know about 150."""

THREAD_LIMIT = 65536
"""vCPUs that are told apart."""


class Whose(Enum):
    """To whom an exit belongs."""

    L1 = "L1"
    L2_TO_L0 = "L2, handled by L0"
    L2_TO_L1 = "L2, reflected to L1"
    MADE_UP = "made up by L0 for L1"
    UNKNOWN = "unknown"


@dataclass(slots=True)
class Tally:
    """Counts by owner and reason."""

    counts: dict[Whose, Counter[str]] = field(
        default_factory=lambda: {whose: Counter() for whose in Whose}
    )
    nested_entries: int = 0
    nested_events: bool = False
    lost: int = 0
    first: float = 0.0
    last: float = 0.0
    vcpus: int = 0

    @property
    def seconds(self) -> float:
        """From the first event to the last."""
        return max(0.0, self.last - self.first)

    def total(self, whose: Whose) -> int:
        """All exits of one owner."""
        return sum(self.counts[whose].values())

    def rows(self) -> list[tuple[str, dict[Whose, int]]]:
        """Reasons with their counts, the most frequent first."""
        reasons: Counter[str] = Counter()
        for counter in self.counts.values():
            reasons.update(counter)
        return [
            (reason, {whose: self.counts[whose][reason] for whose in Whose})
            for reason, _ in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
        ]

    def as_json(self) -> dict[str, Any]:
        """The tally as JSON has it; rates are per second, absent where no time passed."""
        seconds = self.seconds
        return {
            "seconds": round(seconds, 6),
            "vcpus": self.vcpus,
            "nested_events": self.nested_events,
            "nested_entries": self.nested_entries,
            "lost": self.lost,
            "totals": {whose.name.lower(): self.total(whose) for whose in Whose},
            "reasons": [
                {
                    "reason": reason,
                    **{whose.name.lower(): count for whose, count in counts.items()},
                    "per_second": round(sum(counts.values()) / seconds, 3) if seconds else None,
                }
                for reason, counts in self.rows()
            ],
        }


@dataclass(slots=True)
class _Vcpu:
    """What one vCPU's last exit still waits for."""

    reason: str = ""
    pending: bool = False
    nested: bool = False


class Attribution:
    """Feed it records in the order of time; `finish` settles what is still open.

    `nested_recorded`: whether the nested events are known to be switched on, so that an exit
    without one is L1's even where no L2 ran.
    """

    def __init__(self, nested_recorded: bool = False) -> None:
        self.tally = Tally()
        self._nested_recorded = nested_recorded
        self._vcpus: dict[int, _Vcpu] = {}

    def feed(self, records: Iterable[Record]) -> None:
        """Count `records`."""
        for record in records:
            if record.event is Event.LOST:
                self._lost()
                continue
            self._time(record.time)
            vcpu = self._vcpu(record.thread)
            if record.event is Event.EXIT:
                self._settle(vcpu)
                vcpu.reason, vcpu.pending, vcpu.nested = record.reason, True, False
            elif record.event is Event.ENTRY:
                self._settle(vcpu)
            else:
                self._nested(vcpu, record)

    def finish(self) -> Tally:
        """The tally, with exits settled whose next event never came.

        Where no nested event came or was to come nothing tells L1 from L2: those exits become
        unknown.
        """
        for vcpu in self._vcpus.values():
            self._settle(vcpu)
        counts = self.tally.counts
        if not (self.tally.nested_events or self._nested_recorded):
            counts[Whose.UNKNOWN].update(counts[Whose.L1])
            counts[Whose.L1].clear()
        return self.tally

    def _nested(self, vcpu: _Vcpu, record: Record) -> None:
        self.tally.nested_events = True
        if record.event is Event.NESTED_ENTRY:
            # The exit that carried L1's VMRESUME or VMRUN: it was L1's.
            self._settle(vcpu)
            self.tally.nested_entries += 1
        elif record.event is Event.NESTED_EXIT:
            if vcpu.pending:
                vcpu.nested = True
        elif vcpu.pending and record.reason in ("", vcpu.reason):
            self._count(Whose.L2_TO_L1, vcpu.reason)
            vcpu.pending = False
        else:
            self._settle(vcpu)
            self._count(Whose.MADE_UP, record.reason)

    def _settle(self, vcpu: _Vcpu) -> None:
        if vcpu.pending:
            self._count(Whose.L2_TO_L0 if vcpu.nested else Whose.L1, vcpu.reason)
            vcpu.pending = False

    def _lost(self) -> None:
        """Events are missing: what was pending can't be told any more."""
        self.tally.lost += 1
        for vcpu in self._vcpus.values():
            if vcpu.pending:
                self._count(Whose.UNKNOWN, vcpu.reason)
                vcpu.pending = False

    def _count(self, whose: Whose, reason: str) -> None:
        counter = self.tally.counts[whose]
        name = reason or "?"
        if name not in counter and len(counter) >= REASON_LIMIT:
            name = "others"
        counter[name] += 1

    def _vcpu(self, thread: int) -> _Vcpu:
        if thread not in self._vcpus and len(self._vcpus) >= THREAD_LIMIT:
            thread = -1
        if thread not in self._vcpus:
            self._vcpus[thread] = _Vcpu()
            self.tally.vcpus = len(self._vcpus)
        return self._vcpus[thread]

    def _time(self, time: float) -> None:
        tally = self.tally
        if not tally.first:
            tally.first = time
        tally.last = max(tally.last, time)
