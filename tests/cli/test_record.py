import json

import pytest

from undervisor.cli.main import main


def run(*words):
    with pytest.raises(SystemExit) as end:
        main([*map(str, words)])
    return end.value.code or 0


def test_a_recording_is_checked_as_the_machine_is(tmp_path, capsys):
    assert run("record", tmp_path / "machine") == 0
    capsys.readouterr()
    run("check", "--json", "--security")
    live = json.loads(capsys.readouterr().out)
    run("check", "--json", "--security", "--recording", tmp_path / "machine")
    recorded = json.loads(capsys.readouterr().out)
    # What depends on the moment: timings, and guests that other tests run.
    moment = {"inside-hypervisor", "guest-emulated", "bare-metal", "hidden-hypervisor"}
    moment |= {"guest-without-extension"}
    for said in (live, recorded):
        said["findings"] = [f for f in said["findings"] if f["id"] not in moment]
    assert recorded["findings"] == live["findings"]
    assert recorded["verdict"] == live["verdict"]


def test_a_recording_never_overwrites(tmp_path):
    (tmp_path / "file").write_text("")
    assert run("record", tmp_path) == 2
    assert run("record", tmp_path / "file" / "below") == 2


def test_secrets_of_other_processes_are_not_recorded(tmp_path, monkeypatch):
    run("record", tmp_path / "machine")
    said = json.loads((tmp_path / "machine" / "machine.json").read_text())
    for command in said["commands"]:
        if command["argv"][0] == "ps":
            assert all("qemu" in line or "kvm" in line for line in command["stdout"])
