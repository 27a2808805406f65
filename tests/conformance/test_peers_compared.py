"""The recorded comparison of the targets: complete, explained, and what the peers do today."""

from dataclasses import replace
from pathlib import Path

import pytest

from undervisor.conformance.known import KNOWN, explain
from undervisor.conformance.record import NAME, from_json
from undervisor.conformance.runner import Verdict, run_all
from undervisor.targets import catalogue

FOLDER = Path(__file__).parents[2] / "docs" / "compared"
PEERS = [
    pytest.param("qemu", "amd", marks=pytest.mark.qemu, id="qemu"),
    pytest.param("bochs", "intel", marks=pytest.mark.bochs, id="bochs, VMX"),
    pytest.param("bochs", "amd", marks=pytest.mark.bochs, id="bochs, SVM"),
]
LINUX = [
    pytest.param("lab", "host", marks=[pytest.mark.qemu, pytest.mark.deep], id="lab"),
    pytest.param("linux", "intel", marks=pytest.mark.deep, id="linux"),
]
FEW = {
    "qemu (amd)": {
        "svm.exits_io.an_io_exit_names_the_next_instruction",
        "svm.controls.vmexit_invalid_has_64_bits",
        "svm.exits.the_pause_filter_lets_some_through",
        "svm.events_virtual.lowering_cr8_lets_a_virtual_interrupt_in",
    },
    "bochs (intel)": {
        "vmx.exits.rdrand_and_rdseed_tell_their_destination",
        "vmx.tlb.invept_fails_for_bad_types_and_eptps",
        "vmx.events_trap.an_instruction_that_exits_does_so_instead",
        "vmx.apic.a_fetch_from_the_page_exits",
    },
    "bochs (amd)": {
        "svm.exits_io.an_io_exit_names_the_next_instruction",
        "svm.events_virtual.stgi_and_clgi_of_l2_change_v_gif",
        "svm.exits.the_pause_filter_lets_some_through",
        "svm.events_injection.a_fault_while_a_double_fault_is_delivered_is_a_shutdown",
    },
    "lab": {
        "svm.exits_io.an_io_exit_names_the_next_instruction",
        "svm.controls.vmexit_invalid_has_64_bits",
        "svm.controls.nested_cr3_below_the_physical_width_is_accepted",
        "svm.exits.the_pause_filter_lets_some_through",
        "svm.msr.svmdis_cannot_be_set_while_svm_is_on",
        "svm.instructions.vmmcall_in_l2_without_its_intercept_is_undefined",
        "svm.events_virtual.lowering_cr8_lets_a_virtual_interrupt_in",
    },
    "linux (intel)": {
        "vmx.exits.cpuid_always_exits",
        "vmx.controls_addresses.cr3_just_past_the_width_is_refused",
        "vmx.entry_modes.outside_ia32e_mode_efer_has_lma_0_and_lme_0_under_paging",
        "vmx.timers.the_multiplier_scales_before_the_offset",
        "vmx.processors.each_processor_runs_its_own_l2_at_once[2 processors]",
    },
}
"""Tests with different verdicts, for every run."""
HANGS = 2.0
"""Seconds, times the target's patience, for a test that is known to get no answer."""


@pytest.fixture(scope="module")
def record():
    return from_json((FOLDER / NAME).read_text(encoding="utf-8"))


def on(record, target):
    """The recorded results of a target and model."""
    found = [r for row in record.comparison.rows for r in row.results.values()]
    return {result.test.id: result for result in found if result.target == target}


def test_they_are_compared_by_the_command_that_the_page_names(record):
    columns = list(record.versions)
    assert columns == ["builtin", "qemu", "bochs", "lab", "linux"]
    assert all(record.versions.values())
    words = " ".join(f"--on {column}" for column in columns)
    assert record.command == f"undervisor test {words} --pages docs/compared"


def test_our_l0_fails_no_test(record):
    results = [row.results["builtin"] for row in record.comparison.rows]
    assert {result.verdict for result in results} == {Verdict.PASSED, Verdict.SKIPPED}


def test_every_disagreement_is_explained(record):
    assert [(r.test.id, r.target, r.message) for r in record.comparison.unexplained] == []


def test_every_known_defect_is_seen(record):
    bad = [result for row in record.comparison.rows for result in row.disagreements]
    assert set(KNOWN) == {explain(result) for result in bad}


def test_the_pages_are_made_from_the_record(record):
    made = dict(record.files())
    there = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
    assert there == made, f"run: {record.command}"


def compared(target, expected):
    """Run the tests of `expected`; the verdicts that differ, twice, from the recorded ones."""
    tests = [
        replace(r.test, seconds=HANGS) if r.verdict is Verdict.TIMED_OUT else r.test
        for r in expected.values()
    ]
    found = run_all(tests, target)
    # What was late on a busy host is not late again.
    again = [r.test for r in found if r.verdict is not expected[r.test.id].verdict]
    found = [r for r in found if r.test not in again] + run_all(again, target, jobs=1)
    assert [r for r in found if not r.verdict.good and explain(r) is None] == []
    return {
        r.test.id: (r.verdict, r.message)
        for r in found
        if r.verdict is not expected[r.test.id].verdict
    }


@pytest.mark.parametrize(("name", "cpu"), [*PEERS, *LINUX])
def test_a_peer_does_with_a_few_tests_what_the_record_says(record, name, cpu):
    target = catalogue.named(name, cpu)
    recorded = on(record, target.name)
    few = {test: recorded[test] for test in FEW[target.name]}
    assert len({result.verdict for result in few.values()}) >= 3
    assert compared(target, few) == {}


@pytest.mark.deep
@pytest.mark.parametrize(("name", "cpu"), PEERS)
def test_a_peer_does_with_every_test_what_the_record_says(record, name, cpu):
    target = catalogue.named(name, cpu)
    assert compared(target, on(record, target.name)) == {}
