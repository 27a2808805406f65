"""Findings that no recorded machine has, on machines that differ in one thing."""

import json
import shutil
from pathlib import Path

import pytest

from undervisor.host.access.recorded import RecordedHost
from undervisor.host.checks.engine import Verdict, examine
from undervisor.host.checks.finding import KINDS, Kind, Layer, Level
from undervisor.host.facts.machine import gather

HOSTS = Path(__file__).parent.parent.parent / "hosts"
VIRSH = ["virsh", "-r", "-c", "qemu:///system"]


@pytest.fixture
def altered(tmp_path):
    """The ids found on a recorded machine after `change(said, files)`."""

    def make(name, change):
        folder = tmp_path / name
        shutil.copytree(HOSTS / name, folder)
        said = json.loads((folder / "machine.json").read_text())
        change(said, folder / "files")
        (folder / "machine.json").write_text(json.dumps(said))
        return examine(gather(RecordedHost(str(folder))), with_security=True)

    return make


def ids(examination):
    return {finding.kind.id for finding in examination.findings}


def domains(**cpus):
    def change(said, files):
        said["commands"] += [
            {"argv": ["virsh", "--version"], "stdout": ["10.0.0"]},
            {"argv": [*VIRSH, "list", "--all", "--name"], "stdout": [*cpus]},
        ]
        for name, xml in cpus.items():
            said["commands"].append({"argv": [*VIRSH, "dumpxml", "--", name], "stdout": xml})

    return change


def test_wsl1_has_no_kernel(altered):
    def change(said, files):
        (files / "proc/sys/kernel/osrelease").write_text("4.4.0-19041-Microsoft\n")

    assert "wsl1" in ids(altered("intel-bare-metal", change))


@pytest.mark.parametrize(
    ("architecture", "finding"),
    [("ppc64le", "ppc64-nesting"), ("riscv64", "architecture-unchecked")],
)
def test_another_architecture_is_unknown_not_good(altered, architecture, finding):
    def change(said, files):
        said["commands"][0]["stdout"] = [architecture]

    examination = altered("arm64-bare-metal", change)
    assert finding in ids(examination)
    assert examination.verdict is Verdict.UNKNOWN


def test_nx_off_is_seen(altered):
    def change(said, files):
        path = files / "proc/cpuinfo"
        path.write_text(path.read_text().replace(" nx ", " "))

    assert "nx-off" in ids(altered("intel-bare-metal", change))


@pytest.mark.parametrize("text", ["", "maybe", "2\n", "Y N"])
def test_a_nested_parameter_that_makes_no_sense_is_unknown(altered, text):
    def change(said, files):
        (files / "sys/module/kvm_intel/parameters/nested").write_text(text)

    examination = altered("intel-bare-metal", change)
    assert "nested-unknown" in ids(examination)
    assert examination.verdict is Verdict.UNKNOWN


@pytest.mark.parametrize(
    ("code", "verdict"), [("EIO", "nested-unknown"), ("EACCES", "nested-unknown")]
)
def test_an_unreadable_nested_parameter_is_unknown(altered, code, verdict):
    def change(said, files):
        said["errors"]["/sys/module/kvm_intel/parameters/nested"] = code

    assert verdict in ids(altered("intel-bare-metal", change))


def test_a_missing_device_is_seen(altered):
    def change(said, files):
        del said["stat"]["/dev/kvm"]

    examination = altered("intel-bare-metal", change)
    assert examination.cause.kind.id == "device-missing"


@pytest.mark.parametrize(
    ("cpu", "type_", "finding"),
    [
        ("<cpu mode='host-model'/>", "kvm", "domain-host-model"),
        ("<cpu mode='host-passthrough'><feature policy='disable' name='svm'/></cpu>", "kvm",
         "domain-disables-extension"),
        ("<cpu mode='custom'><model>EPYC</model></cpu>", "kvm", "domain-named-model"),
        ("", "kvm", "domain-named-model"),
        ("<cpu mode='host-passthrough'/>", "qemu", "domain-emulated"),
    ],
)  # fmt: skip
def test_a_domain_without_the_extension_is_named(altered, cpu, type_, finding):
    xml = f"<domain type='{type_}'><name>guest</name>{cpu}</domain>"
    examination = altered("amd-stable-7.1.2", domains(guest=xml))
    told = [f for f in examination.findings if f.kind.id == finding]
    assert len(told) == 1
    assert told[0].evidence[0].startswith("guest: ")


@pytest.mark.parametrize(
    "cpu",
    [
        "<cpu mode='host-passthrough'/>",
        "<cpu mode='maximum'/>",
        "<cpu mode='host-model'><feature policy='require' name='svm'/></cpu>",
        "<cpu mode='custom'><model>EPYC</model><feature name='svm'/></cpu>",
    ],
)
def test_a_domain_with_the_extension_is_left_alone(altered, cpu):
    xml = f"<domain type='kvm'><name>guest</name>{cpu}</domain>"
    found = ids(altered("amd-stable-7.1.2", domains(guest=xml)))
    assert not {i for i in found if i.startswith("domain-")} - {"domain-without-limits"}


@pytest.mark.parametrize(
    ("cpu", "found"),
    [
        ("-cpu EPYC", True),
        ("", True),
        ("-cpu host,-svm", True),
        ("-cpu EPYC,+svm", False),
        ("-cpu EPYC,svm=on", False),
        ("-cpu host", False),
        ("-cpu max", False),
    ],
)
def test_a_guest_of_qemu_alone_is_read_from_its_command_line(altered, cpu, found):
    def change(said, files):
        for command in said["commands"]:
            if command["argv"][0] == "ps":
                command["stdout"] = [f"77 qemu-system-x86_64 -accel kvm -name l1 {cpu}"]

    examination = altered("amd-stable-7.1.2", change)
    assert ("guest-without-extension" in ids(examination)) == found


CAPABILITIES = """<domainCapabilities><domain>{domain}</domain><cpu>
<mode name='host-passthrough' supported='yes'/><mode name='host-model' supported='yes'>
<model fallback='forbid'>EPYC-Rome</model><feature policy='{policy}' name='svm'/></mode></cpu>
</domainCapabilities>"""


@pytest.mark.parametrize(
    ("domain", "policy", "expected"),
    [
        ("kvm", "require", set()),
        ("kvm", "disable", {"domain-named-model"}),
        ("qemu", "require", {"libvirt-without-kvm"}),
    ],
)
def test_libvirt_tells_what_host_model_is_here(altered, domain, policy, expected):
    xml = "<domain type='kvm'><name>guest</name><cpu mode='host-model'/></domain>"

    def change(said, files):
        domains(guest=xml)(said, files)
        text = CAPABILITIES.format(domain=domain, policy=policy)
        said["commands"].append({"argv": [*VIRSH, "domcapabilities"], "stdout": text})

    found = ids(altered("amd-stable-7.1.2", change))
    wanted = {"domain-named-model", "domain-host-model", "libvirt-without-kvm"}
    assert found & wanted == expected


@pytest.mark.parametrize(
    "xml",
    ["", "<domain", "<network/>", "<!DOCTYPE d [<!ENTITY a 'x'>]><domain>&a;</domain>", "\0"],
)
def test_xml_that_is_no_domain_is_left_out(altered, xml):
    examination = altered("amd-stable-7.1.2", domains(guest=xml))
    assert "libvirt" in ids(examination)


def test_ten_megabytes_of_garbage_in_a_file_are_unknown_and_nothing_else_is_lost(altered):
    def change(said, files):
        (files / "proc/cpuinfo").write_bytes(b"\xffgarbage\n" * 1_300_000)

    examination = altered("intel-bare-metal", change)
    assert "flags-unknown" in ids(examination)
    assert "device-usable" in ids(examination)


def test_a_kind_without_a_remedy_can_not_be_declared():
    with pytest.raises(TypeError):
        Kind("bad-one", Layer.KERNEL, Level.FAIL, "title", "meaning")
    assert "bad-one" not in KINDS


def test_an_id_can_not_be_declared_twice():
    with pytest.raises(TypeError):
        Kind("bare-metal", Layer.PLACE, Level.OK, "title", "meaning")


def test_evidence_holds_no_control_characters_and_no_floods():
    finding = KINDS["bare-metal"].found("\x1b[31mred\x07\udcff" + "x" * 10_000)
    assert finding.evidence[0].startswith("?[31mred??x")
    assert len(finding.evidence[0]) == 1000
