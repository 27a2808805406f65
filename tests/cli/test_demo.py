"""The first command of the README."""

import re

from guests import undervisor


def test_both_examples_pass_with_four_processors_each_and_the_levels_are_shown():
    found = undervisor("demo")
    assert found.status == 0, found.out + found.err
    assert found.err == ""
    assert found.out.count("4 of 4 processors ran as L2 and came back") == 2
    for word in ("AMD SVM: passed", "Intel VMX: passed"):
        assert word in found.out
    for vcpu in range(4):
        assert len(re.findall(rf"vCPU {vcpu}: [\d,]+ exits of L1", found.out)) == 2
    assert len(re.findall(r"L2  entered \d+ times", found.out)) == 8


def test_it_takes_another_number_of_processors():
    found = undervisor("demo", "--cpus", "1")
    assert found.status == 0
    assert found.out.count("1 of 1 processors ran as L2") == 2


def test_a_number_of_processors_that_there_is_not_is_refused():
    found = undervisor("demo", "--cpus", "9")
    assert found.status == 2
    assert "9" in found.err
