"""The proof on another machine: a local `sh`, Python behind it, and a stand-in for its KVM."""

import json
import os
import re
import sys
import time
from pathlib import Path

import pytest

from undervisor.cli import live_elsewhere
from undervisor.cli.main import main
from undervisor.host.access.agent import AgentHost
from undervisor.host.access.ssh import SshHost
from undervisor.host.fact import Known, Unknown

STANDINS = Path(__file__).parent.parent / "targets"


@pytest.fixture
def kvm_is(monkeypatch, tmp_path):
    """Puts a stand-in where the agent there has the kernel; the machine has this Python."""
    (tmp_path / "python3").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def choose(kernel):
        call = f"""
sys.path.append({str(STANDINS)!r})
from kvm_standin_agent import KERNELS
main([], KERNELS[{kernel!r}]())
"""
        monkeypatch.setattr(
            live_elsewhere, "_BOOT", live_elsewhere._BOOT.replace("main([])\n", call)
        )

    return choose


def asked(*command):
    host = SshHost("there", command or ["sh"])
    try:
        return live_elsewhere.ask_and_prove(host)
    finally:
        host.close()


def test_the_agent_goes_there_and_runs_the_guest(kvm_is):
    kvm_is("says")  # a guest that says something else than the probe, and ends
    offer, proof = asked()
    assert isinstance(offer, Known)
    assert (offer.value.svm, offer.value.vmx, offer.value.nested_state) == (True, False, 4224)
    assert (proof.vendor, proof.started, proof.failed) == ("svm", False, "the guest's first word")


def test_check_tells_what_came_of_it(kvm_is, capsys):
    kvm_is("says")
    with pytest.raises(SystemExit):
        main(["check", "--live", "--json", "--shell", "sh"])
    ids = [finding["id"] for finding in json.loads(capsys.readouterr().out)["findings"]]
    assert "live-guest-fails" in ids


def test_a_machine_without_kvm_is_told(kvm_is):
    kvm_is("none")
    offer, proof = asked()
    assert isinstance(offer, Unknown)
    assert "/dev/kvm: No such file" in offer.why
    assert proof is None


def test_a_machine_without_python_is_told():
    offer, proof = asked("env", "PATH=/no/such", "/bin/sh")
    assert (offer.why, proof) == ("it has no python3", None)


@pytest.mark.parametrize(
    ("python", "why"),
    [
        ("echo agent-refused its Python is 3.9, not 3.11; sleep 60", "its Python is 3.9, not 3.11"),
        ("exit 1", "closed before Python started"),
        ("cat /dev/zero", "no Python starts on there within 5 s"),
        ("echo agent-awaited; exit 0", "agent broke: Broken pipe|agent is gone"),
    ],
)
def test_a_python_that_does_not_run_the_agent_is_told(tmp_path, monkeypatch, python, why):
    monkeypatch.setattr(live_elsewhere, "_START_SECONDS", 5.0)
    (tmp_path / "python3").write_text(f"#!/bin/sh\n{python}\n")
    (tmp_path / "python3").chmod(0o755)
    begin = time.monotonic()
    offer, _ = asked("env", f"PATH={tmp_path}:{os.environ['PATH']}", "sh")
    assert re.search(why, offer.why)
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("said", [b"[]", b"{}", b'{"version": 1, "facts": []}', b"\xff{"])
def test_an_answer_that_makes_no_sense_is_told(kvm_is, monkeypatch, said):
    text = f"""
from undervisor.targets.kvm.words import Word, answer, say
os.write(1, say(Word.FACTS, 0, answer({said!r})))
os.read(0, 1 << 16)
"""
    boot = live_elsewhere._BOOT
    kept = boot[: boot.index("from undervisor")]
    monkeypatch.setattr(live_elsewhere, "_BOOT", kept + text)
    offer, proof = asked()
    assert "what answers is no agent of ours" in offer.why or "speaks version" in offer.why
    assert proof is None


def test_an_agent_of_libvirt_gives_no_line():
    offer, proof = live_elsewhere.ask_and_prove(AgentHost("guest"))
    assert "gives no line to a program" in offer.why
    assert proof is None
