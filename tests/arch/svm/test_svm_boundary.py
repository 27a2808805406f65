"""Boundary states of VMRUN: valid, or invalid in exactly one rule."""

from itertools import islice

import pytest

from undervisor.arch.svm.boundary import (
    BREAKS,
    FREE_FIELDS,
    MODES,
    PROCESSOR,
    boundary_states,
    to_vmcb,
    valid_state,
)
from undervisor.arch.svm.checks import RULES, check_vmrun


def broken(state, capabilities):
    verdict = check_vmrun(state, capabilities)
    assert verdict.unchecked == []
    return [violation.rule.id for violation in verdict.broken]


def test_every_rule_has_a_recipe_that_breaks_it():
    assert {rule.id for rule in RULES} == set(BREAKS)


@pytest.mark.parametrize("mode", MODES)
def test_a_valid_state_breaks_nothing(mode):
    assert broken(valid_state(mode), PROCESSOR) == []
    assert broken(to_vmcb(valid_state(mode)), PROCESSOR) == []


@pytest.mark.parametrize("rule", BREAKS)
def test_a_recipe_breaks_its_rule_and_no_other(rule):
    how = BREAKS[rule]
    assert broken(how.state(), how.capabilities) == [rule]
    assert broken(to_vmcb(how.state()), how.capabilities) == [rule]


def test_the_same_seed_gives_the_same_states():
    one, two = (list(islice(boundary_states(7), 50)) for _ in range(2))
    assert one == two
    assert one != list(islice(boundary_states(8), 50))


def test_a_generated_state_breaks_what_it_says_and_nothing_else():
    kinds = set()
    for generated in islice(boundary_states(1), 400):
        expected = [] if generated.broken is None else [generated.broken]
        assert broken(generated.state, generated.capabilities) == expected
        kinds.add(generated.broken)
    assert len(kinds) > 40


def test_no_rule_reads_a_free_field():
    assert not {field for rule in RULES for field in rule.reads} & set(FREE_FIELDS)
