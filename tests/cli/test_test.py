"""`undervisor test` and `undervisor quirks`."""

import json
import subprocess
import sys
from xml.etree import ElementTree

import pytest

TESTS = ("vmx.exits.cpuid_always_exits", "svm.state.an_exit_clears_the_injected_event")


def undervisor(*words, check=None):
    done = subprocess.run(
        [sys.executable, "-m", "undervisor", *words], capture_output=True, text=True, timeout=120
    )
    if check is not None:
        assert done.returncode == check, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    return done


def test_both_vendors_run_on_their_models():
    done = undervisor("test", *TESTS, check=0)
    assert "builtin (intel): 1 passed" in done.stderr
    assert "builtin (amd): 1 passed" in done.stderr
    assert done.stdout.startswith("2 passed in ")


def test_a_model_runs_the_tests_of_its_vendor_only():
    done = undervisor("test", *TESTS, "--cpu", "amd", check=0)
    assert done.stdout.startswith("1 passed")


def test_the_verdicts_as_json():
    data = json.loads(undervisor("test", *TESTS, "--json", check=0).stdout)
    assert data["totals"] == {"passed": 2}
    assert {row["test"] for row in data["results"]} == set(TESTS)
    assert all(row["refs"] and row["title"] and row["seconds"] > 0 for row in data["results"])


def test_the_verdicts_as_tap():
    lines = undervisor("test", *TESTS, "--tap", check=0).stdout.splitlines()
    assert lines[:2] == ["TAP version 14", "1..2"]
    assert [line.split(" - ")[0] for line in lines[2:]] == ["ok 1", "ok 2"]


def test_the_verdicts_as_junit(tmp_path):
    file = tmp_path / "junit.xml"
    undervisor("test", *TESTS, "--junit", str(file), check=0)
    suites = ElementTree.parse(file).getroot()
    assert {suite.get("name") for suite in suites} == {"builtin (intel)", "builtin (amd)"}
    assert [case.get("name") for case in suites.iter("testcase")] == [
        name.rpartition(".")[2] for name in TESTS
    ]
    assert not list(tmp_path.glob("*.part"))


def test_a_quirk_makes_its_test_fail_in_the_manuals_words(tmp_path):
    file = tmp_path / "junit.xml"
    name = "svm.state_caching.an_exit_does_not_change_the_clean_bits"
    words = ("test", name, "--quirk", "svm-clean-bits-written", "--junit", str(file))
    done = undervisor(*words, check=1)
    assert f"failed: {name} on builtin (amd)" in done.stdout
    assert "APM: VMCB Clean Bits" in done.stdout
    assert "→ the clean bits after the exit" in done.stdout
    (failure,) = ElementTree.parse(file).getroot().iter("failure")
    assert "the clean bits" in failure.get("message")


def test_a_repeated_test_runs_so_often():
    data = json.loads(undervisor("test", TESTS[0], "--repeat", "3", "--json", check=0).stdout)
    assert data["totals"] == {"passed": 3}


def test_the_list_has_every_test_with_its_sections():
    rows = json.loads(undervisor("test", "--list", "--json", check=0).stdout)
    assert len(rows) > 160
    assert undervisor("test", TESTS[0], "--list", check=0).stdout.startswith(TESTS[0])


def test_a_quirk_is_caught_by_its_own_test():
    words = ("test", "--quirks", "--quirk", "svm-clean-bits-written", "--json")
    (row,) = json.loads(undervisor(*words, check=0).stdout)
    assert [found["caught"] for found in row["catches"]] == [True]
    assert row["source"] == "CVE-2026-46071"


def test_a_mutant_is_killed_by_a_test():
    words = ("test", "--mutants", "1", "--seed", "1", "--json")
    data = json.loads(undervisor(*words).stdout)
    (mutant,) = data["mutants"]
    assert mutant["change"]
    assert data["score"] in (0, 1)
    assert (mutant["killed_by"] is not None) == bool(data["score"])


def test_the_quirks_are_listed_with_their_sources():
    rows = json.loads(undervisor("quirks", "--json", check=0).stdout)
    assert len(rows) >= 24
    assert all(row["about"] and row["source"] and row["caught_by"] for row in rows)
    assert "CVE-2021-29657" in undervisor("quirks", check=0).stdout


def test_targets_stand_side_by_side(tmp_path):
    words = ("test", TESTS[1], "--on", "builtin", "--on", "builtin", "--pages", str(tmp_path))
    done = undervisor(*words, check=0)
    assert done.stdout.splitlines()[0].split() == ["test", "builtin"]
    assert "✓" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nonsense"], "no test matches 'nonsense'"),
        (["--on", "vax"], "there is no target 'vax'"),
        (["--cpu", "z80"], "unknown CPU model"),
        (["--quirk", "none-such"], "there is no quirk 'none-such'"),
        (["--quirk", "mutant-99999"], "there is no mutant-99999"),
        (["--on", "qemu", "--quirk", "svm-clgi-ignored"], "the target qemu has no quirks"),
        (["vmx.", "--cpu", "amd"], "none of these tests"),
        (["--repeat", "0"], "--repeat 0"),
        (["--json", "--tap"], "both want standard output"),
        (["--mutants", "-1"], "--mutants -1"),
        ([TESTS[0], "--junit", "/nowhere/at/all.xml"], "cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_message(words, said):
    done = undervisor("test", *words, check=2)
    assert said in done.stderr
