"""A middle value and the interval that it is in, without assuming how the values are spread.

The interval of a median lies between two of the sorted values: that the true median is below the
k-th of n independent values has the probability that fewer than k of n coins show heads, whatever
the distribution.  So nothing is assumed, nothing is random, and the confidence is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import comb
from statistics import median
from typing import Any, Final

CONFIDENCE: Final = 0.95
FEWEST: Final = 6
"""Values that an interval of that confidence needs."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median, and the interval that holds the true one with `confidence`."""

    middle: float
    low: float
    high: float
    confidence: float
    values: int

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def estimate(values: Sequence[float]) -> Estimate:
    """The narrowest interval between two values, equally far from both ends, of at least the
    confidence wanted; with fewer than FEWEST values, from the least to the greatest, with less."""
    ordered, count = sorted(values), len(values)
    cut = max((k for k in range(count // 2) if coverage(count, k) >= CONFIDENCE), default=0)
    return Estimate(median(ordered), ordered[cut], ordered[-1 - cut], coverage(count, cut), count)


def coverage(count: int, cut: int) -> float:
    """The probability that a median is between the values that are left of `count` sorted ones,
    when `cut` are left out at each end."""
    outside: float = sum(comb(count, heads) for heads in range(cut + 1)) / (1 << count)
    return max(1.0 - 2.0 * outside, 0.0)


def ratios(ones: Sequence[float], others: Sequence[float]) -> Estimate:
    """Of what was measured in the same rounds: what disturbs a round disturbs both sides of it."""
    return estimate([one / other for one, other in zip(ones, others, strict=True)])
