"""`undervisor rules`."""

import json

import pytest

from undervisor.cli.main import main


def run(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(["rules", *words])
    return ended.value.code, capsys.readouterr()


def test_the_count_is_as_promised(capsys):
    code, output = run(capsys, "--count")
    vmx, svm = (int(line.split()[0]) for line in output.out.splitlines())
    assert code == 0
    assert vmx >= 220
    assert svm >= 35


def test_a_rule_says_its_id_words_section_outcome_and_remedy(capsys):
    code, output = run(capsys, "vmx.guest.cs.dpl-data")
    assert code == 0
    for text in ("vmx.guest.cs.dpl-data", "Checks on Guest Segment Registers", "33", "→", "reads"):
        assert text in output.out


def test_json_has_every_rule_with_all_its_parts(capsys):
    _, output = run(capsys, "--json")
    rules = json.loads(output.out)
    assert len({rule["id"] for rule in rules}) == len(rules) >= 255
    for rule in rules:
        assert rule["text"]
        assert rule["section"]
        assert rule["fields"]
        assert rule["remedy"]


@pytest.mark.parametrize("pattern", ["svm.*", "guest_cr4", "link pointer", "vmx.host.?s.rpl"])
def test_a_pattern_finds_by_id_field_or_word(capsys, pattern):
    code, output = run(capsys, pattern, "--count")
    assert code == 0
    assert sum(int(line.split()[0]) for line in output.out.splitlines()) > 0


def test_a_pattern_that_matches_nothing_is_refused(capsys):
    code, output = run(capsys, "no-such-rule")
    assert code == 2
    assert "Traceback" not in output.err
