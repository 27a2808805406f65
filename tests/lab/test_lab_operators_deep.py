"""The operator's tools on a lab from outside: a real KVM, its guests, and theirs."""

import json
import threading

import pytest
from lab_machines import undervisor

pytestmark = [pytest.mark.qemu, pytest.mark.deep, pytest.mark.xdist_group("lab")]

BUSY = "for i in 1 2 3 4 5 6; do /lab/probe >/dev/null; done"
"""Executes CPUID 3000 times."""


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Runs `undervisor` beside a lab of three levels, with Python in L1."""
    runtime = tmp_path_factory.mktemp("lab")
    ran = undervisor("lab", "up", "--depth", "3", "--with-python", runtime=runtime, timeout=900)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    yield lambda *words: undervisor(*words, runtime=runtime, timeout=400)
    undervisor("lab", "down", runtime=runtime)


def test_a_guest_of_a_guest_is_run_on_the_kvm_of_l1(three):
    ran = three("check", "--live", "--json", "--host", "lab:l1")
    assert "live-nested-works" in {finding["id"] for finding in json.loads(ran.stdout)["findings"]}
    assert ran.returncode == 0


def test_a_level_without_python_is_told_and_still_answers(three):
    ran = three("check", "--live", "--json", "--host", "lab:l2")
    assert "it has no python3" in ran.stdout
    assert three("check", "--inside", "--host", "lab:l2").returncode == 0


def test_what_is_below_each_level_is_told(three):
    for level, below in (("l1", "tcg"), ("l2", "kvm")):
        ran = three("check", "--below", below, "--host", f"lab:{level}")
        assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize("level", ["l1", "l2"])
def test_a_recording_of_a_level_gives_the_findings_of_the_level(three, level, tmp_path):
    folder = str(tmp_path / level)
    assert three("record", folder, "--host", f"lab:{level}").returncode == 0
    said = [
        json.loads(three("check", "--security", "--json", *where).stdout)
        for where in (("--host", f"lab:{level}"), ("--recording", folder))
    ]
    live, recorded = ([finding["id"] for finding in one["findings"]] for one in said)
    assert live == recorded


def test_exits_of_l3_are_told_from_those_of_l2(three):
    """To the KVM of L1 these are L2's and L1's, and its L1 handles them."""
    guest = threading.Thread(target=three, args=("lab", "sh", "--timeout", "120", "l3", BUSY))
    guest.start()
    ran = three("exits", "--host", "lab:l1", "--seconds", "20", "--json")
    guest.join()
    said = json.loads(ran.stdout)
    reasons = {row["reason"]: row for row in said["reasons"]}
    assert reasons["CPUID"]["l2_to_l1"] > 20
    assert reasons["VMRUN"]["l1"] > 20
    assert said["totals"]["unknown"] == said["lost"] == 0
    left = three("lab", "sh", "l1", "ls /sys/kernel/tracing/instances")
    assert left.stdout.strip() == ""
