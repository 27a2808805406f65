import json
from pathlib import Path

import pytest

from undervisor.cli.main import main

HOSTS = Path(__file__).parent.parent / "hosts"


def run(*words):
    with pytest.raises(SystemExit) as end:
        main(["migrate", *map(str, words)])
    return end.value.code or 0


def test_all_five_cases_are_judged(capsys):
    run(HOSTS / "amd-stable-7.1.2", HOSTS / "amd-stable-7.1.2", "--json")
    said = json.loads(capsys.readouterr().out)
    assert [move["verdict"] for move in said] == ["safe if", "safe if", "safe", "safe", "safe"]


@pytest.mark.parametrize(
    ("source", "destination", "case", "code"),
    [
        ("amd-stable-7.1.2", "amd-stable-7.1.2", "l1-running", 0),
        ("amd-stable-6.12.40", "amd-stable-6.12.40", "l1-running", 1),
        ("amd-stable-6.12.40", "amd-stable-6.12.40", "l2-same-host", 0),
        ("intel-bare-metal", "amd-bare-metal", "l2-bare-metal", 1),
        ("intel-bare-metal", "intel-nested-off", "l1-configured", 1),
    ],
)
def test_the_exit_code_is_the_verdict(source, destination, case, code, capsys):
    assert run(HOSTS / source, HOSTS / destination, "--case", case) == code
    assert "source: " in capsys.readouterr().out


@pytest.mark.parametrize("words", [["/no/such/a", "/no/such/b"], ["here", "here", "--case", "x"]])
def test_bad_options_are_bad_input(words):
    assert run(*words) == 2


def test_evidence_says_which_of_the_two_machines_it_is_about(capsys):
    run(HOSTS / "amd-stable-6.12.40", HOSTS / "amd-stable-6.12.40", "--json")
    said = json.loads(capsys.readouterr().out)[0]["findings"]
    words = " ".join(piece for finding in said for piece in finding["evidence"])
    assert "source, amd-stable-6.12.40: kernel 6.12.40" in words
    assert "destination, amd-stable-6.12.40: kernel 6.12.40" in words


def test_a_level_of_a_lab_is_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert run("lab:nobody/l1", HOSTS / "amd-bare-metal") == 2
    assert "the lab nobody does not run" in capsys.readouterr().err
