import json
from pathlib import Path

import pytest

from undervisor.cli.main import main

HOSTS = Path(__file__).parent.parent / "hosts"


def run(*words):
    with pytest.raises(SystemExit) as end:
        main([*map(str, words)])
    return end.value.code or 0


@pytest.fixture
def root(tmp_path):
    (tmp_path / "etc" / "modprobe.d").mkdir(parents=True)
    (tmp_path / "etc" / "modprobe.d" / "kvm.conf").write_text("options kvm_intel nested=0\n")
    return tmp_path


def texts(root):
    return {p.name: p.read_text() for p in (root / "etc/modprobe.d").iterdir()}


def test_a_dry_run_changes_nothing(root, capsys):
    before = texts(root)
    assert run("enable", "--root", root, "--dry-run") == 0
    assert "nested=1" in capsys.readouterr().out
    assert texts(root) == before


def test_enable_disable_and_undo(root):
    before = texts(root)
    assert run("enable", "--root", root, "--yes") == 0
    assert "nested=1" in texts(root)["zz-undervisor-nested.conf"]
    assert run("disable", "--root", root, "--yes") == 0
    assert "nested=0" in texts(root)["zz-undervisor-nested.conf"]
    assert run("disable", "--undo", "--root", root, "--yes") == 0
    assert texts(root) == before


def test_a_refusal_is_a_negative_verdict(capsys):
    words = ["enable", "--dry-run", "--recording", HOSTS / "wsl2-nested-off"]
    assert run(*words) == 1
    assert ".wslconfig" in capsys.readouterr().out


def test_the_plan_as_json(capsys):
    run("enable", "--dry-run", "--json", "--recording", HOSTS / "intel-nested-off")
    said = json.loads(capsys.readouterr().out)
    assert said["commands"][0]["argv"] == ["modprobe", "-r", "kvm_intel"]


@pytest.mark.parametrize(
    "words",
    [
        ["--recording", str(HOSTS / "intel-nested-off")],
        ["--root", "/no/such/folder", "--yes"],
        ["--root", "/tmp", "--module", "floppy", "--yes"],
    ],
)
def test_bad_options_are_bad_input(words):
    assert run("enable", *words) == 2


def test_nobody_to_ask_is_bad_input(root):
    assert run("enable", "--root", root) == 2
    assert list(texts(root)) == ["kvm.conf"]
