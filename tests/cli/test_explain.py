"""`undervisor explain`."""

import json
from pathlib import Path

import pytest

from undervisor.cli.main import main

DUMPS = Path(__file__).parent.parent / "explain" / "dumps"
SCREEN = 40


def run(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(["explain", *words])
    return ended.value.code, capsys.readouterr()


def test_the_exit_code_is_0_for_a_clean_dump(capsys):
    code, output = run(capsys, str(DUMPS / "kvm-6-clean.txt"))
    assert code == 0
    assert "no rule is broken" in output.out


def test_a_broken_rule_is_told_with_value_section_and_remedy(capsys):
    code, output = run(capsys, str(DUMPS / "kvm-4-cs-dpl.txt"))
    assert code == 1
    for text in (
        "vmx.guest.cs.dpl",
        "GUEST_CS_ACCESS_RIGHTS = 0xa0fb",
        "Checks on Guest Segment Registers",
        "→",
        "not checked",
    ):
        assert text in output.out


def test_an_unreadable_input_ends_with_2_and_one_sentence(capsys, tmp_path):
    file = tmp_path / "nothing.txt"
    file.write_text("nothing to see here\n")
    code, output = run(capsys, str(file))
    assert code == 2
    assert "Traceback" not in output.err
    assert output.err.startswith("undervisor: ")


@pytest.mark.parametrize("name", ["nosuch", "/", "/dev/null", "a\0b"])
def test_a_file_that_cannot_be_read_ends_with_2(capsys, name):
    code, output = run(capsys, name)
    assert (code, output.out) == (2, "")


@pytest.mark.parametrize("path", sorted(DUMPS.iterdir()), ids=lambda p: p.name)
def test_the_answer_is_one_screen_unless_all_is_asked_for(capsys, path):
    if path.name == "expected.json":
        return
    _, short = run(capsys, str(path))
    _, whole = run(capsys, str(path), "--all")
    assert len(short.out.splitlines()) <= SCREEN
    assert len(whole.out.splitlines()) >= len(short.out.splitlines())


def test_json_lists_broken_and_unchecked_rules(capsys):
    code, output = run(capsys, str(DUMPS / "kvm-4-host-tr.txt"), "--json")
    data = json.loads(output.out)
    assert code == 1
    assert data["broken"][0]["id"] == "vmx.host.tr.null"
    assert data["broken"][0]["values"] == {"HOST_TR_SELECTOR": "0x0"}
    assert data["not_checked"]
    assert all(row["missing"] for row in data["not_checked"])
    assert data["checked"] + len(data["not_checked"]) == 376


def test_standard_input_is_read(capsys, monkeypatch):
    class Stdin:
        buffer = (DUMPS / "kvm-5-tr-available.txt").open("rb")

    monkeypatch.setattr("sys.stdin", Stdin)
    code, output = run(capsys, "-")
    Stdin.buffer.close()
    assert code == 1
    assert "vmx.guest.tr.type" in output.out


def test_capabilities_of_the_users_own_processor_decide(capsys, tmp_path):
    caps = tmp_path / "caps.json"
    caps.write_text(json.dumps({"cpus": [{"0x480": "0xda040000000004", "0x48b": "0x0"}]}))
    dump = str(DUMPS / "kvm-6-clean.txt")
    code, output = run(capsys, dump, "--caps", str(caps), "--json")
    assert code == 1
    broken = {row["id"] for row in json.loads(output.out)["broken"]}
    assert "vmx.controls.secondary.may-be-one" in broken


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (["--vm-instruction-error", "7"], ["invalid control field"]),
        (["--vm-instruction-error", "0"], ["VMfailInvalid"]),
        (["--exit-reason", "33", "--qualification", "4"], ["VMCS_LINK_POINTER"]),
        (["--exit-reason", "0x80000021"], ["ENTRY_FAILURE_INVALID_GUEST_STATE", "failed"]),
        (["--exit-reason", "48", "--qualification", "0x184"], ["EPT_VIOLATION", "= 0x1"]),
        (["--control", "primary=0x80000080"], ["HLT exiting", "Activate secondary controls"]),
        (["--control", "SECONDARY_VM_EXEC_CONTROL=0x100002"], ["Enable EPT", "XSAVES"]),
        (["--control", "cs.ar=0xa09b"], ["Segment type", "64-bit"]),
        (["--control", "int_ctl=0x01000000"], ["masks virtual interrupts"]),
        (["--exit-code", "0x400"], ["VMEXIT_NPF", "guest-physical"]),
        (["--exit-code", "-1"], ["VMEXIT_INVALID"]),
        (["--exit-code", "0xffffffff"], ["VMEXIT_INVALID"]),
        (["--suberror", "1"], ["EMULATION"]),
    ],
)
def test_single_numbers_are_decoded(capsys, words, texts):
    code, output = run(capsys, *words)
    assert code == 0
    for text in texts:
        assert text in output.out
    code, output = run(capsys, *words, "--json")
    assert code == 0
    json.loads(output.out)


@pytest.mark.parametrize(
    "words",
    [
        ["--vm-instruction-error", "99"],
        ["--exit-reason", "3000"],
        ["--exit-reason", "0x1ffffffff"],
        ["--exit-reason", "zebra"],
        ["--control", "primary"],
        ["--control", "nothing=1"],
        ["--control", "primary=0x1ffffffff"],
        ["--exit-code", "0x12345"],
        ["--suberror", "77"],
        ["--qualification", "3"],
        ["--suberror", "1", "--exit-code", "1"],
        ["--suberror", "1", "file"],
        [],
    ],
)
def test_numbers_without_a_meaning_are_refused(capsys, words):
    code, output = run(capsys, *words)
    assert (code, output.out) == (2, "")
    assert "Traceback" not in output.err


def test_the_register_dump_of_a_jump_into_the_video_hole_is_explained(capsys):
    code, output = run(capsys, str(DUMPS / "qemu-emulation-failure.txt"))
    assert code == 1
    for text in ("RIP 0xb0000", "video hole", "KVM_INTERNAL_ERROR_EMULATION", "FFH", "64-bit mode"):
        assert text in output.out


def test_the_svm_leaf_of_the_users_processor_decides(capsys, tmp_path):
    caps = tmp_path / "caps.json"
    leaf = {"eax": "0x1", "ebx": "0x8000", "ecx": "0x0", "edx": "0xbcff"}
    caps.write_text(json.dumps({"svm": leaf, "physical_address_width": 32}))
    dump = str(DUMPS / "kvm-svm-6-clean.txt")
    code, output = run(capsys, dump, "--caps", str(caps), "--json")
    assert code == 1
    data = json.loads(output.out)
    assert data["capabilities"] == "given"
    assert "svm.np.n_cr3.width" in {row["id"] for row in data["broken"]}


def test_capabilities_of_the_other_vendor_are_not_used(capsys, tmp_path):
    caps = tmp_path / "caps.json"
    caps.write_text(json.dumps({"cpus": [{"0x480": "0xda040000000004"}]}))
    code, output = run(capsys, str(DUMPS / "kvm-svm-6-clean.txt"), "--caps", str(caps), "--json")
    assert code == 0
    assert json.loads(output.out)["capabilities"].startswith("assumed")
