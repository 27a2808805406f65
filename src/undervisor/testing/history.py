"""What has happened in a machine: the last transitions, counts of all, the entries that failed."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from undervisor.hypervisor.trace import Transition

if TYPE_CHECKING:
    from undervisor.testing.entries import FailedEntry

KEPT: Final = 20_000
"""Transitions that a machine keeps."""
FAILURES_KEPT: Final = 100


def matching(
    transition: Transition, level: int | None, to: int | None, vcpu: int | None, reason: str | None
) -> bool:
    """Whether all that is given holds; `reason` is a part of the reason, in lower case."""
    return (
        level in (None, transition.level)
        and to in (None, transition.to)
        and vcpu in (None, transition.vcpu)
        and (reason is None or reason in transition.reason.lower())
    )


class History:
    """`transitions` are the last ones, `counts` are of all: by (vCPU, level, to, reason)."""

    def __init__(self, kept: int = KEPT) -> None:
        self.transitions: deque[Transition] = deque(maxlen=kept)
        self.counts: Counter[tuple[int, int, int, str]] = Counter()
        self.failed: deque[FailedEntry] = deque(maxlen=FAILURES_KEPT)

    def add(self, transition: Transition, failed: FailedEntry | None) -> None:
        """One more."""
        t = transition
        self.transitions.append(t)
        self.counts[t.vcpu, t.level, t.to, t.reason] += 1
        if failed is not None:
            self.failed.append(failed)

    def exits(
        self, level: int | None, to: int | None, vcpu: int | None, reason: str | None
    ) -> list[Transition]:
        """The kept ones of which all that is given holds."""
        return select(self.transitions, level, to, vcpu, reason)


def select(
    transitions: Iterable[Transition],
    level: int | None,
    to: int | None,
    vcpu: int | None,
    reason: str | None,
) -> list[Transition]:
    """Those of which all that is given holds."""
    part = None if reason is None else reason.lower()
    return [t for t in transitions if matching(t, level, to, vcpu, part)]
