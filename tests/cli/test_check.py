import json
from pathlib import Path

import pytest

from undervisor.cli.main import main

HOSTS = Path(__file__).parent.parent / "hosts"


def run(*words):
    with pytest.raises(SystemExit) as end:
        main(["check", *map(str, words)])
    return end.value.code or 0


def on(name, *words):
    return run("--recording", HOSTS / name, *words)


@pytest.mark.parametrize(
    ("name", "code"),
    [("intel-bare-metal", 0), ("software-kvm", 1), ("unreadable", 1), ("s390x-lpar", 0)],
)
def test_the_exit_code_is_the_verdict(name, code):
    assert on(name) == code
    assert on(name, "--inside") == code
    assert on(name, "--json") == code


def test_a_security_failure_is_a_failure_only_where_it_is_asked_for():
    assert on("amd-stable-6.12.40") == 0
    assert on("amd-stable-6.12.40", "--security") == 1


def test_the_line_for_ci_is_one_line_with_the_cause(capsys):
    on("ci-runner-device-denied", "--inside")
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "[device-denied]" in said
    assert "0660 root:kvm" in said


def test_json_holds_findings_and_what_is_below(capsys):
    on("intel-l1-soft-lockups", "--json")
    said = json.loads(capsys.readouterr().out)
    assert said["below"] == "kvm"
    assert said["guests"][0]["below"] == "tcg"
    assert {"id", "layer", "level", "evidence", "remedy"} <= set(said["findings"][0])


@pytest.mark.parametrize(
    ("name", "below", "code"),
    [
        ("intel-l1-passthrough", "kvm", 0),
        ("tcg-l1", "kvm", 1),
        ("tcg-l1", "tcg", 0),
        ("intel-bare-metal", "nothing", 0),
        ("unreadable", "kvm", 1),
    ],
)
def test_ci_can_ask_what_is_below(name, below, code):
    assert on(name, "--below", below) == code


def test_a_verdict_names_the_first_thing_to_do(capsys):
    on("software-kvm")
    said = " ".join(capsys.readouterr().out.split())
    assert "nested KVM is not usable here" in said
    assert "Start with l0-hides-virtualization" in said
    assert "kvm_pvm" in said


@pytest.mark.parametrize(
    "words",
    [
        ["--recording", "/no/such"],
        ["--recording", "/tmp", "--host", "x"],
        ["--host", "-oProxyCommand=x"],
        ["--host", "a b"],
        ["--guest", "--connect"],
        ["--below", "windows"],
        ["--shell", "'"],
        ["--shell", " "],
        ["--shell", "no-such-command-at-all"],
        ["--shell", "false"],
        ["--shell", "sh", "--host", "x"],
    ],
)
def test_bad_options_are_bad_input(words, capsys):
    assert run(*words) == 2
    assert capsys.readouterr().err.startswith("undervisor: ")


def test_a_command_that_gives_a_shell_is_a_way_in(capsys):
    assert run("--shell", "sh", "--json") in (0, 1)
    through = json.loads(capsys.readouterr().out)
    run("--json")
    here = json.loads(capsys.readouterr().out)
    assert through["verdict"] == here["verdict"]
    assert through["cause"] == here["cause"]


def test_this_machine_can_be_checked(capsys):
    assert run("--json") in (0, 1)
    said = json.loads(capsys.readouterr().out)
    assert said["machine"] == "this machine"
    assert said["findings"]
