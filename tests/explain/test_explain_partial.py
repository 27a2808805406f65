"""Three-valued evaluation of rules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undervisor.arch.rules import Outcome, Rule
from undervisor.arch.vmx.boundary import BREAKS, MODES, valid_state
from undervisor.arch.vmx.capabilities import CURRENT_PROCESSOR
from undervisor.arch.vmx.checks import ENTRY_RULES, check_vm_entry
from undervisor.explain.dump import VMX_WIDTHS
from undervisor.explain.partial import Choices, Partial, judge_partly, weigh

WORD = st.integers(0, 0xFFFF)


def rule(holds):
    return Rule("t", "", "", (1,), holds, Outcome.FAIL_CONTROL, "")


def ask(holds, state=None, partial=None):
    return weigh(rule(holds), state or {}, partial or {}, {1: 16, 2: 16}, None)


@pytest.mark.parametrize(
    ("holds", "answer"),
    [
        (lambda s, c: s[1] == 3, None),
        (lambda s, c: not s[1] & 0x1_0000, True),
        (lambda s, c: s[1] <= 0xFFFF, True),
        (lambda s, c: s[1] > 0xFFFF, False),
        (lambda s, c: s[1] >= 0, True),
        (lambda s, c: not s[1] & 4 or s[1] & 4, None),  # asked twice, it may turn out twice
        (lambda s, c: not s[1] & 4 or not s[2], None),
        (lambda s, c: s[1] & 4 == 8, False),
        (lambda s, c: (s[1] | 4) & 4, True),
        (lambda s, c: {1: 2}[s[1]], None),
        (lambda s, c: s[1] in (1, 2), None),
        (lambda s, c: s[1] >> 16 == 0, True),
        (lambda s, c: "x" * s[1] == "", None),
    ],
)
def test_a_rule_is_decided_only_where_the_missing_value_does_not_matter(holds, answer):
    assert ask(holds) is answer


@given(WORD, WORD, WORD, WORD)
def test_known_bits_come_out_of_operations_as_they_would_from_numbers(value, known, other, shift):
    shift %= 16
    partial = Partial(value, known | ~0xFFFF, Choices(()))
    for result, plain in (
        (partial & other, value & other),
        (partial | other, value | other),
        (partial ^ other, value ^ other),
        (partial >> shift, value >> shift),
        (partial << shift, value << shift),
        (~partial, ~value),
    ):
        if isinstance(result, int):
            assert result == plain
        else:
            assert result.value == plain & result.known


@given(WORD, WORD, WORD)
def test_a_comparison_that_is_certain_is_right(value, known, other):
    for compare in ("__lt__", "__le__", "__gt__", "__ge__", "__eq__"):
        answers = set()
        for first in (False, True):
            partial = Partial(value, known | ~0xFFFF, Choices((first,)))
            answers.add(getattr(partial, compare)(other))
        if len(answers) == 1:
            assert answers == {getattr(value, compare)(other)}


@pytest.mark.parametrize("mode", MODES)
def test_a_whole_state_is_judged_as_by_the_processor(mode):
    state = valid_state(mode)
    verdict = judge_partly(ENTRY_RULES, state, {}, VMX_WIDTHS, CURRENT_PROCESSOR)
    assert (verdict.broken, verdict.unchecked) == ([], [])


@given(st.sampled_from(sorted(BREAKS)), st.randoms(use_true_random=False))
def test_what_is_said_of_a_part_is_true_of_the_whole(name, random):
    how = BREAKS[name]
    state = how.state()
    whole = {v.rule.id for v in check_vm_entry(state, how.capabilities).broken}
    part = {field: value for field, value in state.items() if random.random() < 0.7}
    verdict = judge_partly(ENTRY_RULES, part, {}, VMX_WIDTHS, how.capabilities)
    broken = {v.rule.id for v in verdict.broken}
    unchecked = {r.id for r in verdict.unchecked}
    assert broken <= whole
    assert whole <= broken | unchecked
