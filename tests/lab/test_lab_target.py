"""The target that is the KVM of a lab's L1: a stand-in for L1, and in the deep run a real one."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from undervisor.cli.live_proof import prove
from undervisor.errors import BadInput
from undervisor.guest.image import Image
from undervisor.guest.probe.program import program
from undervisor.lab.target import AGENT, PATIENCE, LabTarget
from undervisor.targets import How, Job, catalogue

STAND_IN = Path(__file__).parent.parent / "targets" / "kvm_standin_agent.py"
JOB = Job(Image.parse(program().elf, "probe"), memory=16 << 20)


class Level:
    """L1: a command is run when it is asked for."""

    def __init__(self, lab):
        self.lab = lab

    def run(self, command):
        assert command == AGENT
        ours, theirs = socket.socketpair()
        with theirs:
            self.lab.process = subprocess.Popen(
                [sys.executable, str(STAND_IN), self.lab.guests],
                stdin=theirs,
                stdout=theirs,
                start_new_session=True,
            )
        self.lab.line = ours


class StandInLab:
    """A lab whose L1 is a process with a stand-in for KVM."""

    made = ()

    def __init__(self, guests):
        self.guests, self.process, self.closed = guests, None, False
        StandInLab.made = (*StandInLab.made, self)

    def start(self, levels):
        assert levels == 1, "nothing but L1 is needed"

    def level(self, number):
        assert number == 1
        return Level(self)

    def stream(self, name):
        assert name == "agent"
        return self.line

    def last_words(self):
        return "L1 ended: killed" if self.process.poll() is not None else ""

    def close(self):
        self.closed = True
        assert self.line.fileno() == -1, "the target closes the stream that it asked for"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def a_lab(guests):
    StandInLab.made = ()
    target = LabTarget(make=lambda: StandInLab(guests))
    try:
        yield target
    finally:
        target.close()


def test_l1_is_started_once_and_when_it_is_needed():
    with a_lab("says") as target:
        assert StandInLab.made == ()
        assert target.abilities.vendors == {"svm"}
        assert (target.abilities.at_once, target.abilities.patience) == (1, PATIENCE)
        for _ in range(2):
            with target.start(JOB) as running:
                assert running.wait(20).status == 9
        assert len(StandInLab.made) == 1


def test_an_l1_that_has_died_is_started_again():
    with a_lab("sleeps") as target:
        known = target.abilities
        with target.start(JOB) as running:
            os.killpg(StandInLab.made[0].process.pid, signal.SIGKILL)
            StandInLab.made[0].process.wait()
            end = running.wait(20)
        text = "the machine is out of reach: its agent: L1 ended: killed"
        assert (end.how, end.text) == (How.TARGET_DIED, text)
        assert target.abilities is known, "what is known is not asked of a new L1"
        assert len(StandInLab.made) == 1
        with target.start(JOB) as running:
            assert not running.registers()[0]
        first, second = StandInLab.made
        assert first.closed
        assert not second.closed


def test_an_l1_without_kvm_says_so():
    with a_lab("none") as target, pytest.raises(BadInput, match="/dev/kvm: No such file"):
        target.start(JOB)


def test_closing_ends_l1():
    with a_lab("says") as target:
        assert target.abilities.most_cpus == 4
        target.close()
        assert StandInLab.made[0].closed
        target.close()


def test_it_has_a_name_and_no_cpu_models():
    assert isinstance(catalogue.named("lab"), LabTarget)
    with pytest.raises(BadInput, match="'amd'"):
        catalogue.named("lab", "amd")


@pytest.mark.deep
@pytest.mark.qemu
def test_a_guest_of_a_real_kvm_runs_its_own_guest():
    target = LabTarget()
    try:
        proofs = [prove(target, "svm") for _ in range(3)]
    finally:
        target.close()
    assert [proof.failed for proof in proofs] == ["", "", ""]
    assert {proof.l2_exit for proof in proofs} == {"#VMEXIT 0x81 (VMMCALL)"}
