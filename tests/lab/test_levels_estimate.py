"""Medians and their intervals: exact, whatever the distribution."""

import random
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undervisor.lab.levels.estimate import CONFIDENCE, FEWEST, coverage, estimate, ratios

VALUES = st.lists(st.floats(1e-3, 1e9), min_size=1, max_size=40)


@pytest.mark.parametrize(
    ("count", "cut", "wanted"),
    # By hand: 1 - 2 * (heads of at most `cut` of `count` coins).
    [(1, 0, 0.0), (2, 0, 0.5), (6, 0, 1 - 2 / 64), (6, 1, 1 - 14 / 64), (12, 2, 1 - 158 / 4096)],
)
def test_the_confidence_is_that_of_coins(count, cut, wanted):
    assert coverage(count, cut) == pytest.approx(wanted)


def test_twelve_values_lose_two_at_each_end():
    found = estimate([12, 1, 11, 2, 10, 3, 9, 4, 8, 5, 7, 6])
    assert (found.middle, found.low, found.high, found.values) == (6.5, 3, 10, 12)
    assert found.confidence == pytest.approx(0.9614, abs=1e-4)


@given(VALUES)
def test_the_median_is_inside_its_interval(values):
    found = estimate(values)
    assert min(values) <= found.low <= found.middle <= found.high <= max(values)
    assert found.middle == median(values)


@given(VALUES)
def test_an_interval_is_as_narrow_as_the_confidence_allows(values):
    found = estimate(values)
    assert (found.confidence >= CONFIDENCE) == (len(values) >= FEWEST)
    inside = sorted(values)
    cut = inside.index(found.low)
    if len(values) >= FEWEST and len(set(values)) == len(values):
        assert coverage(len(values), cut + 1) < CONFIDENCE


def test_few_values_say_that_they_are_few():
    assert estimate([5.0]).confidence == 0
    assert estimate([5.0, 6.0, 7.0]).confidence == pytest.approx(0.75)


@pytest.mark.parametrize("skewed", [False, True])
def test_the_true_median_is_in_as_many_intervals_as_promised(skewed):
    """Of a distribution with a long tail too: that is what disturbed measurements have."""
    draw = random.Random(7)
    true = median(draw.paretovariate(1) for _ in range(100_001)) if skewed else 0.0
    hits = 0
    for _ in range(2000):
        values = [draw.paretovariate(1) if skewed else draw.gauss(0, 1) for _ in range(12)]
        found = estimate(values)
        hits += found.low <= true <= found.high
    assert hits / 2000 == pytest.approx(coverage(12, 2), abs=0.015)


def test_ratios_are_those_within_a_round():
    """A round that is ten times as slow on both sides changes no ratio."""
    quiet = ratios([2.0] * 6, [1.0] * 6)
    disturbed = ratios([2.0, 20.0, 2.0, 20.0, 2.0, 2.0], [1.0, 10.0, 1.0, 10.0, 1.0, 1.0])
    assert quiet == disturbed
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0], [1.0])
