"""Ratios, the budget, and when nothing is judged."""

import pytest
from level_things import EFFORT, findings

from undervisor.lab.levels.comparison import BUDGET, Verdict, compare, judge
from undervisor.lab.levels.estimate import Estimate
from undervisor.lab.levels.measures import MEASURES, Measure

TCG = {"L1": "TCGTCGTCGTCG"}


def compared(costs, **options):
    return compare(findings(costs, **options), EFFORT)


def row(made, key):
    return next(row for row in made.rows if row.measure.key == key)


def verdicts(made, key):
    return {ratio.name: ratio.verdict for ratio in row(made, key).ratios}


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.9, 1.1, Verdict.WITHIN),
        (1.2, 1.3, Verdict.WITHIN),
        (1.2, 1.31, Verdict.UNDECIDED),
        (1.3, 1.5, Verdict.UNDECIDED),
        (1.31, 1.5, Verdict.OVER),
    ],
)
def test_the_whole_interval_decides(low, high, verdict):
    assert BUDGET == (1.1, 1.3)
    assert judge(Estimate((low + high) / 2, low, high, 0.96, 6)) is verdict


def test_a_nested_guest_is_held_to_the_budget_and_a_guest_is_not():
    made = compared({"L0": {"cpu": 1.0}, "L1": {"cpu": 5.0}, "L2": {"cpu": 10.0}})
    assert verdicts(made, "cpu") == {
        "L1/L0": Verdict.NONE, "L2/L1": Verdict.OVER, "L2/L0": Verdict.NONE,
    }  # fmt: skip
    assert made.over
    assert made.judged


def test_a_nested_guest_within_the_budget():
    made = compared({"L1": {"cpu": 5.0}, "L2": {"cpu": 6.0}})
    assert verdicts(made, "cpu") == {"L2/L1": Verdict.WITHIN}
    assert not made.over
    (ratio,) = row(made, "cpu").ratios
    assert ratio.estimate.middle == pytest.approx(1.2)
    assert ratio.estimate.low < 1.2 < ratio.estimate.high


def test_the_price_of_an_exit_is_no_work_to_be_judged():
    made = compared({"L1": {"exit": 1000.0}, "L2": {"exit": 20000.0}})
    assert verdicts(made, "exit") == {"L2/L1": Verdict.NONE}
    assert not made.judged


def test_levels_that_are_not_neighbours_are_not_judged():
    made = compared({"L1": {"cpu": 1.0}, "L3": {"cpu": 9.0}})
    assert verdicts(made, "cpu") == {"L3/L1": Verdict.NONE}


def test_under_emulation_nothing_is_judged_and_that_is_said_first():
    made = compared({"L0": {"cpu": 1.0}, "L1": {"cpu": 5.0}, "L2": {"cpu": 50.0}}, below=TCG)
    assert set(verdicts(made, "cpu").values()) == {Verdict.NONE}
    assert not made.over
    assert made.notes[0].startswith("L1 runs on an emulator (QEMU TCG): the ratios are of an emul")
    assert "none is judged" in made.notes[0]


def test_on_hardware_the_budget_is_said():
    made = compared({"L1": {"cpu": 5.0}, "L2": {"cpu": 6.0}})
    assert "10-30 %" in made.notes[0]
    assert "96.9% confidence" in made.notes[1]
    assert len(made.notes) == 2


@pytest.mark.parametrize("clock", [0.4, 1.1])
def test_a_clock_that_runs_otherwise_is_told(clock):
    made = compared({"L1": {"cpu": 5.0}, "L2": {"cpu": 6.0}}, clock=clock)
    assert "not to be trusted" in made.notes[-1]


def test_what_a_level_lacks_has_no_ratio_and_a_reason():
    made = compared({"L0": {"cpu": 1.0}, "L1": {"cpu": 2.0, "read": 3.0}})
    assert row(made, "read").ratios == ()
    assert row(made, "read").missing == {"L0": "it was not to be had"}


def test_as_json_everything_is_there():
    made = compared({"L0": {"cpu": 1.0}, "L1": {"cpu": 5.0}, "L2": {"cpu": 50.0}}, below=TCG)
    said = made.as_json()
    assert [level["name"] for level in said["levels"]] == ["L0", "L1", "L2"]
    assert said["levels"][1]["below"] == "TCGTCGTCGTCG"
    assert len(said["rows"]) == len(MEASURES)
    first = said["rows"][0]
    assert [ratio["name"] for ratio in first["ratios"]] == ["L1/L0", "L2/L1", "L2/L0"]
    assert first["ratios"][1]["middle"] == pytest.approx(10)
    assert first["nanoseconds"]["L2"]["middle"] == pytest.approx(50)
    assert said["emulated"]
    assert said["effort"]["rounds"] == 6


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [(1.234, "1.23 ns"), (45.67, "45.7 ns"), (999, "999 ns"), (5780, "5.78 µs"), (2e7, "20.0 ms"),
     (3e9, "3.00 s")],
)  # fmt: skip
def test_times_have_the_unit_that_fits(nanoseconds, text):
    assert Measure("k", "t").shown(nanoseconds) == text


def test_rates_are_what_is_done_in_a_second():
    assert Measure("k", "t", 0, "GB/s", 65536 / 1e9).shown(6553.6) == "10.0 GB/s"
    assert Measure("k", "t", -1, "events/s").shown(1e9 / 1234) == "1,234 events/s"
