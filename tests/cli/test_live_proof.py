"""The proof of `check --live`, on targets that nest and targets that do not."""

import dataclasses
import json
from pathlib import Path

import pytest

from undervisor.cli import live_proof
from undervisor.cli.main import main
from undervisor.errors import BadInput
from undervisor.host.access.live import LiveHost
from undervisor.host.access.protocol import KvmOffer
from undervisor.host.access.recorded import RecordedHost
from undervisor.host.fact import Denied, Known
from undervisor.targets import End, How
from undervisor.targets.builtin import BuiltinTarget
from undervisor.targets.kvm import target as kvm_target

HOSTS = Path(__file__).parent.parent / "hosts"


@pytest.mark.parametrize(
    ("cpu", "vendor", "left"),
    [
        ("intel", "vmx", "VM exit 0x12 (VMCALL)"),
        ("amd", "svm", "#VMEXIT 0x81 (VMMCALL)"),
    ],
)
def test_a_guest_of_a_guest_ran(cpu, vendor, left):
    proof = live_proof.prove(BuiltinTarget(cpu), vendor)
    assert (proof.failed, proof.why, proof.l2_exit) == ("", "", left)
    assert proof.started
    assert 0 < proof.l2_seconds < 60
    assert 0 < proof.boot_seconds < 60


def test_without_an_extension_the_guest_only_starts():
    proof = live_proof.prove(BuiltinTarget("amd,-svm"), "")
    assert proof.started
    assert (proof.vendor, proof.l2_exit, proof.failed) == ("", "", "")


@pytest.mark.parametrize(
    ("cpu", "vendor"), [("amd,-svm", "svm"), ("intel,-vmx", "vmx"), ("amd", "vmx")]
)
def test_an_extension_that_is_offered_and_does_not_work_fails_at_its_step(cpu, vendor):
    proof = live_proof.prove(BuiltinTarget(cpu), vendor)
    assert proof.started
    assert proof.failed == f"an L2 with {vendor}"
    assert "exception" in proof.why


class Silent:
    """A machine that ends without a word."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def receive(self, timeout):
        raise EOFError

    def send(self, data):
        raise EOFError

    def wait(self, timeout=None):
        return End(How.TARGET_DIED, "KVM internal error, suberror 1")


class Starts:
    """A target whose start gives `what`."""

    def __init__(self, what):
        self.what = what

    def start(self, job):
        if isinstance(self.what, Exception):
            raise self.what
        return self.what


@pytest.mark.parametrize(
    ("what", "step", "why"),
    [
        (Silent(), "the guest's first word", "KVM internal error, suberror 1"),
        (BadInput("no memory", hint="free some"), "the start of the guest", "free some"),
    ],
)
def test_a_guest_that_says_nothing_has_not_started(what, step, why):
    proof = live_proof.prove(Starts(what), "svm")
    assert (proof.started, proof.failed) == (False, step)
    assert why in proof.why


@pytest.mark.parametrize(("rax", "left"), [(45, "L2 computed 45"), (46, "not with the call")])
def test_an_l2_that_is_wrong_is_a_failure(rax, left):
    with pytest.raises(Exception, match=left):
        live_proof._judged("#VMEXIT 0x78 (HLT)", rax == 45, rax)


def live(monkeypatch, capsys, offer, cpu):
    """`check --live --json` where KVM offers `offer` and is played by a CPU model of our L0."""
    monkeypatch.setattr(LiveHost, "kvm", lambda self: offer)
    monkeypatch.setattr(kvm_target, "KvmTarget", lambda: BuiltinTarget(cpu))
    with pytest.raises(SystemExit):
        main(["check", "--live", "--json"])
    said = json.loads(capsys.readouterr().out)
    return [finding for finding in said["findings"] if finding["id"].startswith("live-")]


OFFER = KvmOffer(12, 4224, False, True)


@pytest.mark.parametrize(
    ("offer", "cpu", "finding", "evidence"),
    [
        (Known(OFFER), "amd", "live-nested-works", "L2 ran and left with #VMEXIT 0x81"),
        (Known(OFFER), "amd,-svm", "live-nested-fails", "an L2 with svm: "),
        (
            Known(dataclasses.replace(OFFER, svm=False)),
            "amd,-svm",
            "live-guest-runs-without-nesting",
            "the guest started in",
        ),
        (Denied("/dev/kvm"), "amd", "live-kvm-answers-not", "/dev/kvm"),
    ],
)
def test_check_runs_the_guest_and_tells(monkeypatch, capsys, offer, cpu, finding, evidence):
    (found,) = live(monkeypatch, capsys, offer, cpu)
    assert found["id"] == finding
    assert evidence in found["evidence"][0]


def test_on_a_recorded_machine_no_guest_is_run(monkeypatch, capsys):
    def started():
        raise AssertionError("a guest is run for a recording")

    monkeypatch.setattr(RecordedHost, "kvm", lambda self: Known(OFFER))
    monkeypatch.setattr(kvm_target, "KvmTarget", started)
    with pytest.raises(SystemExit):
        main(["check", "--live", "--json", "--recording", str(HOSTS / "amd-bare-metal")])
    ids = [finding["id"] for finding in json.loads(capsys.readouterr().out)["findings"]]
    assert "live-kvm-offers" in ids
