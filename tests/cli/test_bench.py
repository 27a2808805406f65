"""What `bench` measures is what it says: the loops do their work, and ratios decide."""

import json
import shutil

import pytest
from guests import undervisor

from undervisor.cli import bench, measure
from undervisor.cli.bench import Effort
from undervisor.guest.loops import COMPUTE, MEMORY, Loop

TINY = Effort(
    trips=50, compute=2000, memory=500, rounds=3, exits=50, starts=1, turns=1, check_seconds=0.01
)
needs_qemu = pytest.mark.skipif(not shutil.which(measure.QEMU), reason="no qemu-system-x86_64")


def exits_of(loop):
    """How many exits a whole run of a loop has."""
    machine = measure._machine(loop, lambda data: None)
    assert machine.run(60).status == 1
    return machine.exits


@pytest.mark.parametrize(("vendor", "each"), [("vmx", 5), ("svm", 2)])
def test_a_round_trip_is_what_it_is_said_to_be(vendor, each):
    """VMX: CPUID, two VMREADs, a VMWRITE, VMRESUME; SVM: VMMCALL, VMRUN."""
    few, many = (exits_of(measure.round_trip_loop(vendor, count, 2)) for count in (100, 300))
    assert many - few == pytest.approx(2 * 200 * each, abs=4)  # and the ends of slices


@pytest.mark.parametrize("vendor", ["", "vmx", "svm"])
@pytest.mark.parametrize("body", [COMPUTE, MEMORY])
def test_work_in_l2_does_not_exit(vendor, body):
    few, many = (exits_of(Loop(body, count, 2, vendor)) for count in (100, 5000))
    assert many - few < 20


def test_rounds_are_timed_by_both_clocks():
    rounds = measure.nested(measure.work_loop("compute", 20_000, 4, "svm"))
    assert 0 < rounds.cpu <= rounds.wall * 1.5
    raw = measure.raw_loop(measure.work_loop("compute", 20_000, 4))
    assert raw.cpu > 0


def test_raw_exits_are_made_one_by_one():
    assert 0 < measure.raw_exit(200) < 1e-3


def test_a_guest_that_fails_is_not_measured():
    with pytest.raises(measure.GuestDied, match="did not end well"):
        measure.nested(Loop("ud2", 1, 2, "svm"))


@needs_qemu
@pytest.mark.qemu
def test_the_same_program_runs_on_qemu():
    rounds = measure.on_qemu(measure.round_trip_loop("svm", 20_000, 4))
    assert rounds.wall > 0
    assert rounds.cpu > 0


def test_without_qemu_the_comparison_is_said_to_be_missing(monkeypatch):
    monkeypatch.setattr(measure.shutil, "which", lambda name: None)
    assert measure.on_qemu(measure.round_trip_loop("svm", 1, 1)) is None
    (row,) = bench._against_qemu([1.0], [])
    assert "not measured" in row.name
    assert row.good is None


@pytest.mark.parametrize(("ours", "good"), [([1.0, 9.0, 1.0], True), ([3.0, 0.1, 3.0], False)])
def test_a_ratio_is_the_median_of_its_turns_and_decides(ours, good):
    rows = bench._against_qemu(ours, [2.0, 2.0, 2.0])
    assert rows[-1].good is good


def test_every_check_is_counted():
    rates = measure.checks(0.02)
    assert 0 < rates.full < rates.plain
    assert rates.full < rates.incremental


def test_the_full_check_is_a_ratio_to_a_plain_pass_over_its_fields(monkeypatch):
    monkeypatch.setattr(measure, "checks", lambda s: measure.CheckRates(4_000.0, 1e6, 60_000.0))
    full, ratio, incremental = bench._checks(TINY)
    assert (full.good, incremental.good) == (False, True)
    assert ratio.value == 15.0


def test_each_step_gives_rows_with_their_limits():
    rows = [*bench._round_trips(TINY), *bench._work(TINY, "compute"), *bench._checks(TINY)]
    wanted = [row for row in rows if row.limit and "QEMU" not in row.name]
    assert [row.limit for row in wanted] == [
        "at most 12", "at least 0.9", "at least 0.9", "at least 5,000", "at least 50,000",
    ]  # fmt: skip
    assert all(row.good is not None for row in wanted)


@pytest.mark.deep
def test_the_whole_of_it_is_a_document_on_request():
    found = undervisor("bench", "--quick", "--json", timeout=300)
    assert found.status in (0, 1)
    rows = json.loads(found.out)["rows"]
    assert len(rows) > 12
    assert found.status == int(any(row["good"] is False for row in rows))


@pytest.mark.deep
@pytest.mark.parametrize("vendor", ["vmx", "svm"])
def test_many_round_trips_leave_nothing_behind(vendor):
    assert measure.growth(vendor, 200_000) < 1 << 20
