"""`undervisor state`."""

import json
import sys
from pathlib import Path

import pytest

from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.cli.main import main

HERE = Path(__file__).parent.parent / "explain"
DUMPS = HERE / "dumps"
sys.path.insert(0, str(HERE))

from explain_writers import linux_guest, nested_svm, nested_vmx, svm_guest, vmcb_bytes  # noqa: E402


def run(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(["state", *words])
    return ended.value.code, capsys.readouterr()


@pytest.fixture
def blob(tmp_path):
    def write(name, raw):
        (tmp_path / name).write_bytes(raw)
        return str(tmp_path / name)

    return write


CLEAN = linux_guest() | {int(F.EXIT_REASON): 0}


def test_a_valid_state_of_a_running_l2_is_told_with_its_flags(capsys, blob):
    code, output = run(capsys, blob("a", nested_vmx(CLEAN, flags=3)))
    assert code == 0
    for text in ("VMX format, 4224 bytes", "GUEST_MODE", "RUN_PENDING", "vmcs12_pa = 0x2000"):
        assert text in output.out


def test_a_state_without_l2_is_valid(capsys, blob):
    none = (1 << 64) - 1
    code, output = run(capsys, blob("a", nested_vmx(None, flags=0, vmxon=none, current=none)))
    assert code == 0
    assert "128 bytes" in output.out


def test_broken_rules_of_vmcs12_are_named(capsys):
    code, output = run(capsys, str(DUMPS / "nested-vmx-running.bin"))
    assert code == 1
    assert "vmx.guest.dr7" in output.out


def test_broken_rules_of_vmcb12_are_named(capsys):
    code, output = run(capsys, str(DUMPS / "nested-svm.bin"))
    assert code == 1
    assert "svm.intercept.vmrun" in output.out


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ({"flags": 0x101}, "a flag of SVM"),
        ({"vmxon": 0x1004}, "VMXON pointer is not aligned"),
        ({"current": 0x2004}, "current-VMCS pointer is not aligned"),
        ({"current": 0x1000}, "equals the VMXON pointer"),
        ({"vmxon": (1 << 64) - 1}, "without VMX operation"),
    ],
)
def test_an_inconsistent_header_is_a_problem(capsys, blob, how, text):
    code, output = run(capsys, blob("a", nested_vmx(CLEAN, **how)))
    assert code == 1
    assert "problem: " in output.out
    assert text in output.out


def test_a_foreign_revision_is_not_decoded(capsys, blob):
    raw = bytearray(nested_vmx(CLEAN))
    raw[128:132] = b"\x01\0\0\0"
    code, output = run(capsys, blob("a", bytes(raw)))
    assert code == 1
    assert "its layout is unknown" in output.out


def test_a_blob_that_is_cut_off_says_so(capsys, blob):
    code, output = run(capsys, blob("a", nested_vmx(CLEAN)[:3000]))
    assert code == 1
    assert "cut off" in output.out


def test_the_fields_that_differ_between_two_blobs_are_listed(capsys, blob):
    one = blob("one", nested_vmx(CLEAN))
    two = blob("two", nested_vmx(CLEAN | {int(F.GUEST_RIP): 0x1234}, flags=3))
    code, output = run(capsys, one, two, "--json")
    rows = {row["name"]: (row["first"], row["second"]) for row in json.loads(output.out)}
    assert code == 1
    assert rows["flags"] == ("0x1", "0x3")
    assert rows["GUEST_RIP"] == (hex(CLEAN[F.GUEST_RIP]), "0x1234")
    assert len(rows) == 2
    assert run(capsys, one, one)[0] == 0


def test_blobs_of_two_vendors_are_not_compared(capsys, blob):
    svm = blob("svm", nested_svm(vmcb_bytes(svm_guest())))
    code, output = run(capsys, blob("vmx", nested_vmx(CLEAN)), svm)
    assert (code, output.out) == (2, "")


@pytest.mark.parametrize("raw", [b"", b"\0" * 127, b"hello" * 100, bytes(128), b"\xff" * 5000])
def test_what_is_not_a_blob_is_refused(capsys, blob, raw):
    code, output = run(capsys, blob("a", raw))
    assert (code, output.out) == (2, "")
    assert "Traceback" not in output.err


def test_json_has_header_flags_and_diagnosis(capsys):
    _, output = run(capsys, str(DUMPS / "nested-vmx-running.bin"), "--json")
    data = json.loads(output.out)
    assert data["header"]["vmxon_pa"] == "0x1000"
    assert data["diagnosis"]["broken"][0]["id"] == "vmx.guest.dr7"


def test_all_lists_every_field(capsys, blob):
    _, output = run(capsys, blob("a", nested_vmx(CLEAN)), "--all")
    assert "GUEST_RIP = 0xffffffff81062ad6" in output.out
