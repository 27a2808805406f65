"""Targets compared: the overview, a page for each disagreement, the record that is read back."""

import re
import shlex

import pytest

from undervisor.cli.test_files import write_pages
from undervisor.conformance import compare
from undervisor.conformance.known import KNOWN, Known, explain
from undervisor.conformance.record import NAME, Record, as_json, from_json, renewed
from undervisor.conformance.runner import Result, Verdict
from undervisor.conformance.suite import all_tests, select
from undervisor.errors import BadInput

(STRINGS,) = select(["svm.exits_io.string_io_says_so"])
(PORTS,) = select(["svm.exits_io.a_port_in_the_map_exits_with_size_and_direction"])
SIZE = "EXITINFO1: 6 of 6 wrong"
RESULTS = [
    Result(PORTS, "builtin (amd)", Verdict.PASSED),
    Result(STRINGS, "builtin (amd)", Verdict.PASSED),
    Result(PORTS, "qemu (amd)", Verdict.SKIPPED, "no ports"),
    Result(STRINGS, "qemu (amd)", Verdict.FAILED, SIZE),
]
VERSIONS = {"builtin": "undervisor 0", "qemu": "qemu 7"}


def record(results=RESULTS):
    return Record(compare.compare(results), "undervisor test 'a b'", VERSIONS)


def files(results=RESULTS):
    return dict(record(results).files())


def test_the_overview_counts_and_links_what_failed():
    text = files()["README.md"]
    assert "Made by `undervisor test 'a b'`." in text
    assert "| version | undervisor 0 | qemu 7 |" in text
    assert "| passed | 2 | 0 |" in text
    assert "| skipped | 0 | 1 |" in text
    assert "| failed | 0 | 1 |" in text
    page = compare.page_name(STRINGS)
    assert f"| [string_io_says_so]({page}) | ✓ | ✗ |" in text


def test_the_overview_names_each_defect_with_the_tests_that_show_it():
    text = files()["README.md"]
    known = explain(RESULTS[-1])
    assert f"## What is wrong with qemu\n\n- {known.what} ([{STRINGS.id}](" in text
    assert "What is wrong with builtin" not in text


def test_a_page_has_the_manuals_words_the_verdicts_and_the_evidence():
    text = files()[compare.page_name(STRINGS)]
    known = explain(RESULTS[-1])
    assert STRINGS.title in text
    assert "## builtin: passed" in text
    assert f"## qemu: failed\n\n    {SIZE}" in text
    assert f"{known.what} {known.evidence}" in text


def test_every_test_can_be_compared():
    results = [Result(test, "builtin (any)", Verdict.PASSED) for test in all_tests()]
    assert [row.test for row in compare.compare(results).rows] == list(all_tests())


def test_a_disagreement_that_nobody_knows_is_not_explained_away():
    new = [Result(PORTS, "qemu (amd)", Verdict.FAILED, "something new")]
    assert compare.compare(new).unexplained == new
    assert "Nothing is known of this defect." in files(new)[compare.page_name(PORTS)]


def test_what_is_known_asks_for_the_target_the_test_and_the_words():
    known = Known("qemu .*", r"svm\.exits_io\..*", "It is.", "APM.", message="wrong$")
    assert known.fits(RESULTS[-1])
    assert not known.fits(RESULTS[1])
    assert not Known("bochs .*", ".*", "", "").fits(RESULTS[-1])
    assert not Known("qemu .*", r"svm\.exits", "", "").fits(RESULTS[-1])
    assert not Known("qemu .*", ".*", "", "", message="right").fits(RESULTS[-1])


def test_a_record_is_read_back_as_it_was_written():
    assert from_json(as_json(record())) == record()
    assert files()[NAME] == as_json(record())


def test_a_record_of_a_test_that_is_gone_says_so():
    text = as_json(record()).replace("string_io_says_so", "string_io_said_so")
    with pytest.raises(BadInput) as caught:
        from_json(text)
    assert "svm.exits_io.string_io_said_so" in caught.value.message
    assert "undervisor test 'a b'" in caught.value.hint


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"command": "", "versions": {}}', as_json(
    record()).replace('"failed"', '"odd"')])  # fmt: skip
def test_what_is_no_record_is_told(text):
    with pytest.raises(BadInput) as caught:
        from_json(text)
    assert "no record of a comparison" in caught.value.message


def test_pages_that_are_there_are_renewed_and_those_of_no_failure_go(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/undervisor", "test", "--pages", "a b"])
    write_pages(tmp_path, RESULTS)
    first = {path.name for path in tmp_path.iterdir()}
    assert first == {"README.md", NAME, compare.page_name(STRINGS)}
    write_pages(tmp_path, [Result(STRINGS, "qemu (amd)", Verdict.PASSED)])
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", NAME}
    text = (tmp_path / "README.md").read_text()
    whole = shlex.join(["undervisor", "test", "--on", "builtin", "--on", "qemu", "--pages"])
    assert f"Made by `{whole} {tmp_path}`" in text
    assert "| string_io_says_so | ✓ | ✓ |" in text
    assert "| skipped | 0 | 1 |" in text


def test_a_test_that_is_gone_can_be_left_out():
    text = as_json(record()).replace("string_io_says_so", "string_io_said_so")
    assert from_json(text, without_gone=True) == record(RESULTS[::2])


def test_a_part_is_renewed_and_the_rest_kept():
    better = Result(STRINGS, "qemu (amd)", Verdict.PASSED)
    again = Record(compare.compare([better]), "undervisor test a", {"qemu": "qemu 8"})
    found = renewed(record(), again, "a b")
    assert found.comparison == compare.compare([*RESULTS[:3], better])
    assert found.command == "undervisor test --on builtin --on qemu --pages 'a b'"
    assert found.versions == {"builtin": "undervisor 0", "qemu": "qemu 8"}


def test_a_column_is_added_beside_the_others():
    more = Record(compare.compare([Result(PORTS, "bochs (amd)", Verdict.PASSED)]), "more", {})
    found = renewed(record(), Record(more.comparison, "more", {"bochs": "bochs 2"}), "here")
    assert found.command == "undervisor test --on builtin --on qemu --on bochs --pages here"
    assert found.comparison.columns == ("builtin", "qemu", "bochs")
    assert [row.sign("bochs") for row in found.comparison.rows] == ["✓", ""]


def test_a_run_of_everything_brings_its_own_command():
    again = Record(record().comparison, "undervisor test", VERSIONS)
    assert renewed(record(), again, "here") == again


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: f"{known.target[:5]} {known.tests[:60]}")
def test_what_is_known_is_about_tests_that_exist(known):
    assert any(re.fullmatch(known.tests, test.id) for test in all_tests())


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: f"{known.target[:5]} {known.tests[:60]}")
def test_what_is_known_is_said_in_sentences_that_name_the_manual(known):
    assert known.what.endswith(".")
    assert known.evidence.startswith(("APM, ", "SDM, ", "docs/"))
    assert known.evidence.endswith(".")
