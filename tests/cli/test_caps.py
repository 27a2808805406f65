"""`undervisor caps`."""

import json
import struct
from pathlib import Path

import pytest

from undervisor.arch.kvm import Request
from undervisor.arch.vmx.capabilities import CURRENT_PROCESSOR
from undervisor.cli import capability_devices, capability_sources
from undervisor.cli.main import main
from undervisor.errors import BadInput

MSRS = CURRENT_PROCESSOR.to_msrs()
HOSTS = Path(__file__).parent.parent / "hosts"


def run(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(["caps", *words])
    return ended.value.code, capsys.readouterr()


@pytest.fixture
def saved(tmp_path):
    def save(name, *cpus, **more):
        path = tmp_path / f"{name}.json"
        blocks = [{f"{i:#x}": f"{v:#x}" for i, v in cpu.items()} for cpu in cpus]
        path.write_text(json.dumps({"name": name, "cpus": blocks, **more}))
        return str(path)

    return save


def test_every_group_is_shown_with_the_three_names_of_a_bit(capsys, saved):
    code, output = run(capsys, saved("host", MSRS), "--all")
    assert code == 0
    for text in (
        "Pin-based",
        "Primary",
        "Secondary",
        "Tertiary",
        "VM functions",
        "VM-exit",
        "VM-entry",
        "EPT",
        "Miscellaneous",
        "Basic",
        "Enable XSAVES/XRSTORS",
        "vmx-unrestricted-guest",
        "unrestricted_guest",
        "default",
        "allowed",
    ):
        assert text in output.out


def test_processors_that_differ_are_named(capsys, saved):
    other = {**MSRS, 0x48B: MSRS[0x48B] & ~(1 << 52)}
    code, output = run(capsys, saved("host", MSRS, other, MSRS, MSRS))
    assert code == 0
    assert "the processors differ in IA32_VMX_PROCBASED_CTLS2 (0x48b)" in output.out
    assert "on 0, 2-3" in output.out
    assert "on 1" in output.out


def test_json_can_be_read_back(capsys, saved, tmp_path):
    _, output = run(capsys, saved("host", MSRS), "--json")
    again = tmp_path / "again.json"
    again.write_text(output.out)
    code, second = run(capsys, "diff", saved("host", MSRS), str(again))
    assert code == 0
    assert "no difference" in second.out


@pytest.mark.parametrize("model", ["cpu:intel-haswell", "cpu:amd", "cpu:intel,-vmx-xsaves"])
def test_a_cpu_model_is_a_source(capsys, model):
    code, output = run(capsys, model)
    assert code == 0
    assert model.split(",")[0] in output.out


def test_two_control_values_go_through_diff_with_xsaves_first(capsys):
    code, output = run(capsys, "diff", "48b=1f7cff00000000,phys=39", "48b=378ef00000000,phys=40")
    assert code == 1
    rows = [line for line in output.out.splitlines() if "IA32_VMX_PROCBASED_CTLS2 bit" in line]
    assert len(rows) == 5
    assert rows[0].split()[:2] == ["Enable", "XSAVES/XRSTORS"]
    for text in (
        "39 bits and 40 bits",
        "-cpu ...,vmx-xsaves=on",
        "name='vmx-xsaves'",
        "#UD",
        "host-phys-bits",
    ):
        assert text in output.out


def test_three_sources_are_compared_in_a_chain(capsys):
    code, output = run(
        capsys, "diff", "cpu:intel", "cpu:intel-haswell", "cpu:intel-westmere", "--json"
    )
    assert code == 1
    first, second = json.loads(output.out)
    assert "vmx-pml" in {row["qemu"] for row in first["lost"]}
    assert "vmx-shadow-vmcs" in {row["qemu"] for row in second["lost"]}


@pytest.mark.parametrize(
    ("words", "code", "texts"),
    [
        (
            ["secondary", "0x100002", "48b=378ef00000000"],
            1,
            ["is 1 and may not be: bit 20", "XSAVES", "0x0000000000000002  adjusted"],
        ),
        (["pin", "0", "481=7f00000016"], 1, ["must be 1 and is 0: bit 1", "0x16"]),
        (["primary", "0x401e172", "482=fff9fffe0401e172"], 0, ["adjusted"]),
        (["SECONDARY_VM_EXEC_CONTROL", "2", "48b=378ef00000000"], 0, ["SECONDARY_CONTROLS"]),
    ],
)
def test_adjust_shows_the_arithmetic(capsys, words, code, texts):
    got, output = run(capsys, "adjust", *words)
    assert got == code
    for text in texts:
        assert text.replace("0x16", "16") in output.out


@pytest.mark.parametrize(
    "words",
    [
        ["diff", "480=1"],
        ["diff"],
        ["adjust", "secondary"],
        ["adjust", "nothing", "1", "480=1"],
        ["adjust", "pin", "0x100000000", "481=1"],
        ["adjust", "pin", "1", "48b=1"],
        ["a", "b"],
        ["nosuchfile"],
        ["cpu:nosuchmodel"],
        ["diff", "48b=1", "nosuchfile"],
        ["diff", "cpu:intel", "cpu:amd"],
    ],
)
def test_words_that_make_no_sense_are_refused(capsys, words):
    code, output = run(capsys, *words)
    assert (code, output.out) == (2, "")
    assert "Traceback" not in output.err


@pytest.mark.parametrize("name", ["intel-bare-metal", "amd-bare-metal", "garbage"])
def test_a_recorded_machine_is_read_or_refused(capsys, name):
    code, output = run(capsys, str(HOSTS / name))
    assert code in (0, 2)
    assert "Traceback" not in output.err


class Kvm:
    """Stands for the ioctls of /dev/kvm."""

    def __init__(self, version=12):
        self.version = version
        self.asked = []

    def __call__(self, number, request, buffer):
        self.asked.append(request)
        if request == Request.GET_API_VERSION:
            return self.version
        if request == Request.GET_MSR_FEATURE_INDEX_LIST:
            struct.pack_into(f"I{len(MSRS) + 1}I", buffer, 0, len(MSRS) + 1, 0x10A, *MSRS)
            return 0
        (index,) = struct.unpack_from("I", buffer, 8)
        if index == 0x493:
            raise OSError(22, "Invalid argument")
        struct.pack_into("Q", buffer, 16, MSRS[index])
        return 1


def test_kvms_feature_msrs_are_read_without_root(monkeypatch, tmp_path):
    device = tmp_path / "kvm"
    device.write_bytes(b"")
    kvm = Kvm()
    monkeypatch.setattr(capability_devices.fcntl, "ioctl", kvm)
    found = capability_sources.from_kvm(str(device))
    assert found.msrs == {i: v for i, v in MSRS.items() if i != 0x493}
    # Only what reads: version, the list of feature MSRs, and their values.
    assert set(kvm.asked) == {0xAE00, 0xC004_AE0A, 0xC008_AE88}


def test_a_device_that_is_not_kvm_is_refused(monkeypatch, tmp_path):
    device = tmp_path / "kvm"
    device.write_bytes(b"")
    with pytest.raises(BadInput):
        capability_sources.from_kvm(str(device))
    monkeypatch.setattr(capability_devices.fcntl, "ioctl", Kvm(version=1))
    with pytest.raises(BadInput):
        capability_sources.from_kvm(str(device))
    with pytest.raises(BadInput):
        capability_sources.from_kvm(str(tmp_path / "none"))


@pytest.mark.parametrize("model", ["intel-haswell", "amd"])
def test_a_guest_of_the_built_in_l0_reads_what_its_cpu_model_says(capsys, model):
    code, output = run(capsys, "diff", f"cpu:{model}", f"probe:{model}")
    assert code == 0, output.out
    assert "no difference" in output.out
    assert "not compared" not in output.out
