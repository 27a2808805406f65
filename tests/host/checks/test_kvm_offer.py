import json
import shutil
from pathlib import Path

import pytest

from undervisor.host.access.protocol import KvmOffer
from undervisor.host.access.recorded import RecordedHost
from undervisor.host.checks.engine import Verdict, examine
from undervisor.host.checks.live import Proof
from undervisor.host.fact import Denied, Known, Unknown
from undervisor.host.facts.machine import gather

HOSTS = Path(__file__).parent.parent.parent / "hosts"


@pytest.mark.parametrize(
    ("offer", "finding", "verdict"),
    [
        (Known(KvmOffer(12, 8320, True, False)), "live-kvm-offers", Verdict.USABLE),
        (Known(KvmOffer(12, 8320, False, False)), "live-kvm-offers-not", Verdict.NOT_USABLE),
        (Known(KvmOffer(12, 8320, False, True)), "live-kvm-offers-not", Verdict.NOT_USABLE),
        (Unknown("/dev/kvm", "a shell makes no ioctl"), "live-kvm-not-asked", Verdict.USABLE),
        (Denied("/dev/kvm"), "live-kvm-answers-not", Verdict.NOT_USABLE),
    ],
)
def test_what_kvm_answers_counts(offer, finding, verdict):
    machine = gather(RecordedHost(str(HOSTS / "intel-bare-metal")))
    examination = examine(machine, offer=offer)
    assert [f.kind.id for f in examination.findings if f.kind.id.startswith("live")] == [finding]
    assert examination.verdict is verdict


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ({"api_version": 12, "nested_state": 0, "vmx": False, "svm": False}, Known),
        ({"api_version": "12", "nested_state": 0, "vmx": False, "svm": False}, Unknown),
        ({"api_version": 12}, Unknown),
    ],
)
def test_a_recorded_answer_is_read_back(tmp_path, said, kind):
    shutil.copytree(HOSTS / "software-kvm", tmp_path / "m")
    path = tmp_path / "m" / "machine.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kvm": said}))
    assert isinstance(RecordedHost(str(tmp_path / "m")).kvm(), kind)


OFFERED = Known(KvmOffer(12, 8320, True, False))


@pytest.mark.parametrize(
    ("proof", "finding", "verdict", "evidence"),
    [
        (
            Proof("vmx", True, "", "", "VM exit 0x12 (VMCALL)", 0.031, 0.012),
            "live-nested-works",
            Verdict.USABLE,
            ("L2 ran and left with VM exit 0x12 (VMCALL), 12 ms", "the guest started in 31 ms"),
        ),
        (
            Proof("vmx", True, "an L2 with vmx", "VMLAUNCH: VMfailValid 7", "", 0.031),
            "live-nested-fails",
            Verdict.NOT_USABLE,
            ("an L2 with vmx: VMLAUNCH: VMfailValid 7", "the guest started in 31 ms"),
        ),
        (
            Proof("", True, boot_seconds=0.031),
            "live-guest-runs-without-nesting",
            Verdict.NOT_USABLE,
            ("the guest started in 31 ms", "vmx and svm are not in the CPUID that KVM supports"),
        ),
        (
            Proof("vmx", False, "the start of the guest", "no memory"),
            "live-guest-fails",
            Verdict.NOT_USABLE,
            ("the start of the guest: no memory",),
        ),
    ],
)
def test_what_came_of_a_guest_counts(proof, finding, verdict, evidence):
    machine = gather(RecordedHost(str(HOSTS / "intel-bare-metal")))
    examination = examine(machine, offer=OFFERED, proof=proof)
    (found,) = [f for f in examination.findings if f.kind.id.startswith("live")]
    assert found.kind.id == finding
    assert found.evidence[: len(evidence)] == evidence
    assert examination.verdict is verdict
