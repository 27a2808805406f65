"""The recorded comparison, its settlements and its page."""

from pathlib import Path

import pytest

from undervisor.arch.svm.checks import RULES as SVM_RULES
from undervisor.arch.vmx.checks import RULES as VMX_RULES
from undervisor.conformance.entries.comparison import (
    CPUS,
    as_json,
    from_json,
    recorded,
)
from undervisor.conformance.entries.comparison import column as on_target
from undervisor.conformance.entries.pages import NAME, page
from undervisor.conformance.entries.session import Result
from undervisor.conformance.entries.settled import SETTLED

DOCS = Path(__file__).parents[2] / "docs"
VMX, SVM = [r.id for r in VMX_RULES], [r.id for r in SVM_RULES]
RULES = {"builtin": VMX + SVM, "bochs": VMX + SVM, "qemu": SVM}
FEW_SVM = ["svm.np.g_pat.type", "svm.asid.zero", "svm.cr0.high"]
FEW_VMX = ["vmx.host.ss.null", "vmx.guest.dr7", "vmx.guest.pending-debug.bs-excess"]


@pytest.fixture(scope="module")
def targets():
    return {column.target: column for column in recorded()}


def test_the_record_names_every_rule_on_every_target(targets):
    assert {name: list(column.cells) for name, column in targets.items()} == RULES


def test_the_record_says_which_versions_and_processors(targets):
    for name, column in targets.items():
        assert column.version
        assert column.cpus == CPUS[name]


def test_our_l0_disagrees_with_no_rule(targets):
    results = {cell.result for cell in targets["builtin"].cells.values()}
    assert results == {Result.AGREES, Result.NOT_APPLICABLE}


def test_every_disagreement_is_settled_and_nothing_else(targets):
    differing = {
        rule
        for column in targets.values()
        for rule, cell in column.cells.items()
        if cell.result is Result.DIFFERS
    }
    assert differing == set(SETTLED)


def test_a_settlement_names_the_manual_and_the_target_that_differs(targets):
    for rule, text in SETTLED.items():
        assert text.startswith(("SDM", "APM", "Both refuse. SDM")), rule
        for name, word in (("bochs", "Bochs"), ("qemu", "QEMU")):
            cell = targets[name].cells.get(rule)
            assert (word in text) == (cell is not None and cell.result is Result.DIFFERS), rule


def test_what_is_not_applicable_says_why(targets):
    for column in targets.values():
        for rule, cell in column.cells.items():
            assert bool(cell.why) == (cell.result is Result.NOT_APPLICABLE), rule


def test_a_comparison_is_read_back_as_it_was_written():
    comparison = recorded()
    assert from_json(as_json(comparison)) == comparison


def test_the_page_is_made_from_the_record():
    current = (DOCS / NAME).read_text()
    assert current == page(recorded()), "run: python -m undervisor.conformance.entries.pages docs"
    assert all(f"`{rule}`" in current for rule in VMX + SVM)


@pytest.mark.parametrize(
    ("name", "cpu", "rules"),
    [
        pytest.param("qemu", "EPYC,+svm", FEW_SVM, marks=pytest.mark.qemu),
        pytest.param("bochs", "tigerlake", FEW_VMX, marks=pytest.mark.bochs),
    ],
)
def test_a_peer_does_with_a_few_rules_what_the_record_says(targets, name, cpu, rules):
    found = on_target(name, [cpu], rules)
    assert found.cells == {rule: targets[name].cells[rule] for rule in found.cells}
    assert sorted(found.cells) == sorted(rules)


@pytest.mark.deep
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=getattr(pytest.mark, n)) for n in CPUS if n != "builtin"]
)
def test_a_peer_does_what_the_record_says_of_it(targets, name):
    assert on_target(name).cells == targets[name].cells
