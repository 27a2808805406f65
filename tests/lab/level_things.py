"""A machine of canned costs, for what compares levels and what draws the comparison."""

from undervisor.lab.levels.measures import MEASURES
from undervisor.lab.levels.session import Effort, Findings

EFFORT = Effort(6, 1, 1000)
SPREAD = (0.99, 1.0, 1.0, 1.0, 1.0, 1.01)
"""Of six rounds, around a cost."""


def findings(costs, below=None, clock=0.9):
    """`{"L1": {"cpu": 2.0}}`: what six rounds found; the measures not named were not possible."""
    found = Findings({name: f"machine {name}" for name in costs})
    found.below = {name: (below or {}).get(name, "KVMKVMKVM") for name in costs}
    found.clocks = {name: [clock] * len(SPREAD) for name in costs}
    found.measures = list(MEASURES)
    for one in MEASURES:
        found.costs[one.key], found.missing[one.key] = {}, {}
        for name, given in costs.items():
            if one.key in given:
                # The odd levels are disturbed the other way round, so ratios have an interval.
                spread = SPREAD if int(name[1:]) % 2 else SPREAD[::-1]
                found.costs[one.key][name] = [given[one.key] * s for s in spread]
            else:
                found.missing[one.key][name] = "it was not to be had"
    return found
