"""The suite finds nearly all that goes wrong in the nested code, and knows what cannot be found."""

import json
import subprocess
import sys

import pytest

from undervisor.hypervisor.quirks import mutants
from undervisor.hypervisor.quirks.equivalents import EQUIVALENT

MINUTES = 30
"""On two processors that others use too."""


def test_every_change_that_is_none_to_l1_is_still_in_the_code():
    assert EQUIVALENT.keys() <= mutants.all_keys()


def test_a_change_that_is_none_to_l1_is_no_mutant():
    words = {mutant.where.partition(": ")[2] for mutant in mutants.all_mutants()}
    assert "svm.controls = current left out" not in words
    assert "svm.nested_paging = bool(q[_NESTED] & _NP_ENABLE) left out" in words


def test_a_rule_that_nothing_breaks_is_no_mutant():
    rules = {m.where.split()[1] for m in mutants.all_mutants() if m.where.startswith("rule ")}
    assert "vmx.guest.cr0.must-be-one" in rules or "vmx.host.cr0.must-be-one" in rules
    assert "vmx.controls.ipi-virtualization.tpr-shadow" not in rules


def test_a_seed_always_gives_the_same_mutants():
    first, again = (mutants.sample(20, 5) for _ in range(2))
    assert first == again
    assert first != mutants.sample(20, 6)


@pytest.mark.deep
def test_the_suite_kills_nine_of_ten_random_mutants():
    words = ("test", "--mutants", "100", "--seed", "0", "--json")
    done = subprocess.run(
        [sys.executable, "-m", "undervisor", *words],
        capture_output=True, text=True, timeout=60 * MINUTES, check=False,
    )  # fmt: skip
    data = json.loads(done.stdout)
    alive = [row["change"] for row in data["mutants"] if row["killed_by"] is None]
    assert len(data["mutants"]) == 100
    assert data["score"] >= 0.9, "\n".join(alive)
    assert done.returncode == 0
