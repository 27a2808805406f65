"""The commands themselves, on files and on libvirt's test driver."""

import io
import json
import re
from pathlib import Path

import pytest

from undervisor.cli.main import main
from undervisor.domains.libvirt_xml import DomainXml

ROOT = Path(__file__).parent.parent.parent
L1 = "<domain type='kvm'><name>l1</name><memory unit='GiB'>4</memory>{}</domain>"
TEST = "test:///default"


def undervisor(*words):
    with pytest.raises(SystemExit) as end:
        main(list(map(str, words)))
    return end.value.code or 0


@pytest.fixture
def xml(tmp_path):
    path = tmp_path / "l1.xml"
    path.write_text(L1.format("<cpu mode='host-passthrough'/>"))
    return path


@pytest.fixture
def kept(tmp_path, monkeypatch):
    folder = str(tmp_path / "kept")
    monkeypatch.setattr("undervisor.domains.apply._state_folder", lambda: folder)
    return Path(folder)


def test_a_pipe_of_commands_gives_a_definition(monkeypatch, capsys):
    assert undervisor("guest", "new", "l1", "--vendor", "amd", "--network", "default") == 0
    for verb in (["tune", "-", "--vendor", "amd"], ["harden", "-"], ["show", "-", "--as", "xml"]):
        text = capsys.readouterr().out
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        assert undervisor("guest", *verb) == 0
    guest = DomainXml.parse(capsys.readouterr().out).guest
    assert guest.cpu.policy("svm").gives
    assert guest.interfaces[0].source == "isolated"
    assert guest.memory_limits.hard > guest.memory.size


def test_reasons_go_to_stderr_and_definitions_to_stdout(xml, capsys):
    assert undervisor("guest", "harden", xml) == 0
    said = capsys.readouterr()
    assert "why: " in said.err
    assert DomainXml.parse(said.out).guest.name == "l1"


def test_json_has_the_guest_the_xml_and_the_command(xml, capsys):
    assert undervisor("guest", "show", xml, "--as", "json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["guest"]["cpu"]["mode"] == "host-passthrough"
    assert "ordinal" not in json.dumps(said["guest"])
    assert said["qemu"]["argv"][0] == "qemu-system-x86_64"
    assert DomainXml.parse(said["xml"]).guest.name == "l1"


def test_what_the_command_line_leaves_out_is_told(tmp_path, capsys):
    path = tmp_path / "l1.xml"
    devices = (
        "<devices><tpm model='tpm-crb'/><hostdev/><hostdev/></devices><features><smm/></features>"
    )
    path.write_text(L1.format(devices + "<cputune><vcpupin vcpu='0' cpuset='1'/></cputune>"))
    assert undervisor("guest", "show", path, "--as", "qemu") == 0
    said = capsys.readouterr().err
    for word in ("<tpm> (1)", "<hostdev> (2)", "<smm> (1)", "taskset -pc 1"):
        assert word in said


def test_limits_become_a_scope_of_systemds(tmp_path, capsys):
    path = tmp_path / "l1.xml"
    path.write_text(L1.format(
        "<vcpu>4</vcpu><memtune><hard_limit unit='GiB'>8</hard_limit></memtune>"
        "<cputune><shares>2048</shares><period>100000</period><quota>50000</quota></cputune>"
    ))  # fmt: skip
    assert undervisor("guest", "show", path, "--as", "qemu") == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(
        "systemd-run --scope -p MemoryMax=8388608K -p CPUWeight=200 -p CPUQuota=200%"
    )


def test_workarounds_say_why(capsys):
    assert undervisor("guest", "new", "l1", "--vendor", "intel", "--cpu", "Haswell", "--workaround",
                      "xsaves", "--workaround", "host-phys-bits", "--workaround",
                      "phys-bits=39") == 0  # fmt: skip
    said = capsys.readouterr()
    guest = DomainXml.parse(said.out).guest
    assert not guest.cpu.policy("xsaves").gives
    assert (guest.cpu.address_bits.host, guest.cpu.address_bits.bits) == (False, 39)
    assert "enable XSAVES/XRSTORS" in said.err
    assert "40 bits" in said.err


@pytest.mark.parametrize(
    "words",
    [
        ["show", "/no/such/file.xml"],
        ["new", "a/b", "--vendor", "intel"],
        ["new", "", "--vendor", "intel"],
        ["new", "l1", "--vendor", "transmeta"],
        ["new", "l1", "--vendor", "intel", "--arch", "vax"],
        ["new", "l1", "--vendor", "intel", "--type", "xen"],
        ["new", "l1", "--vendor", "intel", "--memory", "none"],
        ["new", "l1", "--vendor", "intel", "--memory", "1k"],
        ["new", "l1", "--vendor", "intel", "--vcpus", "-1"],
        ["new", "l1", "--vendor", "intel", "--vcpus", "3", "--topology", "1x2x2"],
        ["new", "l1", "--vendor", "intel", "--topology", "0x1x1"],
        ["new", "l1", "--vendor", "intel", "--numa", "0-3"],
        ["new", "l1", "--vendor", "intel", "--pin", "0-3", "--allow", "0"],
        ["new", "l1", "--vendor", "intel", "--allow", "x"],
        ["new", "l1", "--vendor", "intel", "--huge-pages", "3M"],
        ["new", "l1", "--vendor", "intel", "--balloon", "hot-air"],
        ["new", "l1", "--vendor", "intel", "--balloon", "virtio@8"],
        ["new", "l1", "--vendor", "intel", "--disk", "relative.qcow2"],
        ["new", "l1", "--vendor", "intel", "--disk", "/a,cache=perhaps"],
        ["new", "l1", "--vendor", "intel", "--disk", "/a,colour=blue"],
        ["new", "l1", "--vendor", "intel", "--disk", "/a,target=vda", "--disk", "/b,target=vda"],
        ["new", "l1", "--vendor", "intel", "--network", "a,queues=0"],
        ["new", "l1", "--vendor", "intel", "--bridge", "a b"],
        ["new", "l1", "--vendor", "intel", "--cpu", "a,b=c"],
        ["new", "l1", "--vendor", "intel", "--check", "maybe"],
        ["new", "l1", "--vendor", "intel", "--migratable", "maybe"],
        ["new", "l1", "--vendor", "intel", "--require", "a b"],
        ["new", "l1", "--vendor", "intel", "--workaround", "hope"],
        ["new", "l1", "--vendor", "intel", "--workaround", "phys-bits"],
        ["new", "l1", "--vendor", "intel", "--workaround", "phys-bits=99"],
        ["new", "l1", "--vendor", "intel", "--workaround", "xsave=1"],
        ["apply", "/no/such.xml"],
        ["verify"],
        ["verify", "l1", "--host", "x"],
        ["verify", "l1", "--agent", "--console"],
        ["verify", "--shell", "false"],
    ],
)
def test_bad_options_are_bad_input(words, capsys):
    assert undervisor("guest", *words) == 2
    said = capsys.readouterr().err
    assert re.match(r"(.*\n)*undervisor: .+", said)
    assert "Traceback" not in said


def test_without_libvirts_module_the_remedy_is_told(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "libvirt", None)
    assert undervisor("guest", "show", "l1") == 2
    assert "pip install" in capsys.readouterr().err


def test_apply_asks_and_changes_nothing_without_an_answer(xml, kept, capsys):
    pytest.importorskip("libvirt", reason="libvirt-python is not installed")
    assert undervisor("guest", "apply", xml, "--connect", TEST) == 2
    assert "nobody is there to ask" in capsys.readouterr().err
    assert undervisor("guest", "apply", xml, "--connect", TEST, "--dry-run", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["before"] == ""
    assert said["name"] == "l1"
    assert not kept.exists()


def test_what_would_not_start_is_not_applied_unless_forced(tmp_path, kept, capsys):
    pytest.importorskip("libvirt", reason="libvirt-python is not installed")
    path = tmp_path / "bad.xml"
    topology = "<topology sockets='1' cores='2' threads='1'/>"
    inner = f"<vcpu>3</vcpu><os><type>hvm</type></os><cpu>{topology}</cpu>"
    path.write_text(L1.format(inner))
    base = ("guest", "apply", path, "--connect", TEST, "--yes")
    assert undervisor(*base) == 2
    assert "it would not start" in capsys.readouterr().err
    assert not list(kept.glob("*"))
    assert undervisor(*base, "--force") == 0  # the test driver starts anything
    assert list(kept.glob("*"))


def test_the_test_driver_takes_a_tuned_and_hardened_kvm_guest(tmp_path, kept, capsys):
    pytest.importorskip("libvirt", reason="libvirt-python is not installed")
    path = tmp_path / "l1.xml"
    assert undervisor("guest", "new", "l1", "--vendor", "intel", "--hard-limit", "8G") == 0
    path.write_text(capsys.readouterr().out)
    assert undervisor("guest", "harden", path) == 0
    path.write_text(capsys.readouterr().out)
    assert undervisor("guest", "apply", path, "--connect", TEST, "--yes") == 0
    assert "define the domain l1" in capsys.readouterr().out
    (entry,) = json.loads((kept / "l1.json").read_text())
    assert entry["before"] == ""
    assert DomainXml.parse(entry["after"]).guest.cpu.policy("vmx").gives


def test_a_connection_that_fails_is_bad_input(capsys):
    pytest.importorskip("libvirt", reason="libvirt-python is not installed")
    assert undervisor("guest", "show", "l1", "--connect", "qemu+unix:///system?socket=/no") == 2
    assert "start libvirtd or virtqemud" in capsys.readouterr().err
    assert undervisor("guest", "show", "nobody", "--connect", TEST) == 2
    assert undervisor("network", "show", "nobody", "--connect", TEST) == 2
    assert undervisor("guest", "remove", "test", "--connect", TEST) == 2  # it runs


def test_networks_of_the_test_driver_are_shown(capsys):
    pytest.importorskip("libvirt", reason="libvirt-python is not installed")
    assert undervisor("network", "show", "--connect", TEST) == 0
    said = capsys.readouterr().out
    assert "default" in said
    assert "not-isolated" in said  # it has <forward>


@pytest.mark.parametrize(
    "words",
    [["new", "a/b"], ["new", "n", "--address", "10.0.0.1"], ["new", "n", "--address", "8.8.8.1/24"],
     ["new", "n", "--bridge", "x" * 16], ["up", "/no/such.xml", "--connect", TEST]],
)  # fmt: skip
def test_bad_networks_are_bad_input(words, capsys):
    pytest.importorskip("libvirt", reason="libvirt-python is not installed")
    assert undervisor("network", *words) == 2
    assert "undervisor: " in capsys.readouterr().err


def test_a_network_that_leads_out_is_refused_unless_forced(tmp_path, capsys):
    pytest.importorskip("libvirt", reason="libvirt-python is not installed")
    path = tmp_path / "nat.xml"
    path.write_text("<network><name>n</name><forward mode='nat'/></network>")
    base = ("network", "up", path, "--connect", TEST, "--dry-run")
    assert undervisor(*base) == 2
    assert "leads out" in capsys.readouterr().err
    assert undervisor(*base, "--force") == 0


def test_the_documentation_names_every_command():
    said = (ROOT / "docs/cli.md").read_text()
    for verb in ("new", "tune", "harden", "show", "diff", "apply", "remove", "verify"):
        assert f"guest {verb}" in said
    for verb in ("new", "up", "show", "remove"):
        assert f"network {verb}" in said
