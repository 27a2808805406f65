"""Disabling any one rule makes the test of that rule fail, for every rule of both vendors.

The tests are those of `tests/arch`: each is called here with its rule switched off.
"""

import contextlib
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from undervisor.arch.svm import checks as svm_checks
from undervisor.arch.vmx import checks as vmx_checks
from undervisor.arch.vmx.checks import msr_lists
from undervisor.explain.diagnosis import ALL_RULES

ARCH = Path(__file__).parent.parent / "arch"


def loaded(path):
    """A test module by its path, under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"mutated_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


VMX = loaded(ARCH / "vmx" / "checks" / "test_vmx_every_rule.py")
LISTS = loaded(ARCH / "vmx" / "checks" / "test_vmx_msr_lists.py")
SVM = loaded(ARCH / "svm" / "test_svm_checks.py")


def svm_rows(rule):
    return [row for row in SVM.BROKEN if f"svm.{row[0]}" == rule]


def run_test_of(rule):
    """The test that `tests/arch` has for a rule."""
    if rule.startswith("svm."):
        for row in svm_rows(rule):
            SVM.test_a_state_that_breaks_one_rule_is_refused_for_it_alone(*row)
    elif rule in LISTS.BROKEN:
        LISTS.test_the_entry_that_breaks_a_rule_is_numbered_from_one(rule)
    elif rule in LISTS.NOT_SAVED:
        LISTS.test_an_entry_that_cannot_be_saved_is_numbered_from_one(rule)
    else:
        VMX.test_the_broken_rule_is_named_and_no_other(rule)


def without(rules, rule):
    """The rules, with one of them holding always."""
    return type(rules)(
        replace(one, holds=lambda state, capabilities: True) if one.id == rule else one
        for one in rules
    )


@contextlib.contextmanager
def disabled(monkeypatch, rule):
    """Every list of rules that has the rule, with it switched off."""
    with monkeypatch.context() as patched:
        for module, name in (
            (vmx_checks, "ENTRY_RULES"),
            (msr_lists, "LOAD_RULES"),
            (msr_lists, "STORE_RULES"),
            (svm_checks, "RULES"),
        ):
            patched.setattr(module, name, without(getattr(module, name), rule))
        yield


def test_every_rule_has_a_test():
    tested = {*VMX.BREAKS, *LISTS.BROKEN, *LISTS.NOT_SAVED, *(f"svm.{r[0]}" for r in SVM.BROKEN)}
    assert set(ALL_RULES) == tested


@pytest.mark.parametrize("rule", sorted(ALL_RULES))
def test_the_test_of_a_rule_fails_when_the_rule_is_disabled(monkeypatch, rule):
    run_test_of(rule)
    with disabled(monkeypatch, rule), pytest.raises((AssertionError, AttributeError)):
        run_test_of(rule)


@pytest.mark.deep
@pytest.mark.parametrize("rule", sorted(ALL_RULES))
def test_no_other_rule_covers_for_a_disabled_one(monkeypatch, rule):
    """All tests of all rules, with one rule switched off: just its own and its companions fail."""
    companions = {name for name, how in VMX.BREAKS.items() if rule in how.also}
    with disabled(monkeypatch, rule):
        for other in ALL_RULES:
            if other == rule or other in companions:
                continue
            run_test_of(other)
