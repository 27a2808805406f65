import json
import shutil
from pathlib import Path

import pytest

from undervisor.host.access.protocol import KvmOffer
from undervisor.host.access.recorded import RecordedHost
from undervisor.host.checks.engine import Verdict, examine
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
