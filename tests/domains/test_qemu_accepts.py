"""Real QEMU takes the command lines: every machine is realized, then told to quit."""

import json
import shutil
import subprocess
from dataclasses import replace

import pytest
from guide_examples import EXAMPLES, mapping
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machines import INTEL, machine
from tcg import empty_qcow2, for_tcg

from undervisor.cli.main import main
from undervisor.domains.libvirt_xml import DomainXml
from undervisor.domains.model import (
    AddressBits,
    Balloon,
    Boot,
    Cell,
    Console,
    Cpu,
    Disk,
    Guest,
    HugePages,
    Interface,
    Memory,
    Mode,
    NumaTuning,
    Policy,
    Topology,
)
from undervisor.domains.qemu_command import cpu_word, qemu_command

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="no qemu-system-x86_64"),
]
ROWS = mapping()
FLASH = 256 << 10
SECONDS = 120


def talk(argv, *commands, network=False, folder=None):
    """Start QEMU with a QMP monitor, say `commands` and quit; its answers and what it complains."""
    words = [*argv, "-qmp", "stdio"]
    if network:  # a network of its own with the bridge and the tap that the notes ask for
        setup = ("ip link add virbr0 type bridge && ip tuntap add tap0 mode tap multi_queue && "
                 "ip link set tap0 master virbr0 up && exec \"$@\"")  # fmt: skip
        words = ["unshare", "--net", "sh", "-c", setup, "sh", *words]
    spoken = [{"execute": "qmp_capabilities"}, *commands, {"execute": "quit"}]
    ended = subprocess.run(
        words, input="".join(json.dumps(c) + "\n" for c in spoken), capture_output=True,
        text=True, timeout=SECONDS, cwd=folder, check=False,
    )  # fmt: skip
    answers = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    said = [a["return"] for a in answers if "return" in a]
    assert ended.returncode == 0, ended.stderr
    return said[1:-1], ended.stderr


def realize(guest, folder, network=False):
    """Realize the machine of a guest, stopped; serial consoles go nowhere."""
    guest = replace(guest, consoles=tuple(replace(c, kind="null") for c in guest.consoles))
    return talk([*qemu_command(guest).argv, "-S"], network=network, folder=folder)[1]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    (folder / "fat").mkdir()
    for name in ("CODE", "VARS"):
        (folder / name).write_bytes(bytes(FLASH))
    disk = empty_qcow2(folder / "disk.qcow2")
    return {
        "/var/lib/libvirt/images/vm.qcow2": disk,
        "/srv/arch.qcow2": disk,
        "/srv/other.qcow2": empty_qcow2(folder / "other.qcow2"),
        "/srv/virtual_fat": str(folder / "fat"),
        "/srv/OVMF_CODE.fd": str(folder / "CODE"),
        "/srv/OVMF_VARS.fd": str(folder / "VARS"),
    }


@pytest.mark.parametrize("name", [n for n in ROWS if ROWS[n][0] == "guest" and "s390x" not in n])
def test_every_example_is_realized(name, tmp_path, images, capsys, request):
    if name == "huge-pages":
        request.getfixturevalue("huge_pages")
    words = [w for w in ROWS[name] if w not in ("--as", "qemu")]
    with pytest.raises(SystemExit):
        main([*words, "--recording", machine(tmp_path / "host", cores=8)])
    guest = for_tcg(DomainXml.parse(capsys.readouterr().out).guest, images=images)
    guest = replace(guest, extra=())  # -s: one port for all tests
    said = realize(guest, tmp_path, network=name == "bridge")
    usual = ("TCG doesn't support", "vhost", "hyperthreading", "topoext")
    assert [line for line in said.splitlines() if not any(u in line for u in usual)] == []


def test_the_debugger_port_is_opened(tmp_path):
    guest = for_tcg(Guest("a", Memory(1 << 20), machine="q35", extra=("-gdb", "unix:gdb,server")))
    # An unknown word after it shows that QEMU read it at all.
    ended = subprocess.run([*qemu_command(guest).argv, "-s", "-nonsense"], capture_output=True,
                           text=True, cwd=tmp_path, check=False)  # fmt: skip
    assert "-nonsense: invalid option" in ended.stderr
    assert "-s" not in ended.stderr.split("-nonsense")[0].split()


def test_what_stands_behind_host_has_every_property_that_we_write(tmp_path):
    """-cpu host needs KVM; its type tells its properties without."""
    cpu = Cpu(Mode.PASSTHROUGH, migratable=True, address_bits=AddressBits(True, limit=39))
    for name in ("vmx", "svm", "invtsc", "amd-stibp", "spec-ctrl", "xsave", "xsaves", "vmx-ept",
                 "vmx-vpid", "vmx-unrestricted-guest", "vmx-flexpriority", "vmx-vnmi",
                 "vmx-shadow-vmcs", "vmx-posted-intr", "vmx-preemption-timer", "vmx-pml",
                 "vmx-eptad", "vmx-xsaves", "npt", "nrip-save", "vgif", "v-vmsave-vmload",
                 "lahf_lm", "pclmuldq", "tsc_adjust"):  # fmt: skip
        cpu = cpu.with_feature(name, Policy.REQUIRE)
    guest = Guest("a", Memory(1 << 20), cpu=cpu)
    second = replace(guest, cpu=replace(cpu, address_bits=AddressBits(False, 39)))
    asked = {"execute": "qom-list-properties", "arguments": {"typename": "host-x86_64-cpu"}}
    (answer,), _ = talk(["qemu-system-x86_64", "-machine", "none", "-display", "none"], asked)
    known = {entry["name"] for entry in answer}
    for word in (cpu_word(guest), cpu_word(second)):
        head, *properties = word.split(",")
        assert head == "host"
        assert {p.split("=")[0] for p in properties} - known == set()


@st.composite
def guests(draw):
    """Guests of every shape that our commands can make."""
    one = lambda *choices: draw(st.sampled_from(choices))  # noqa: E731
    vcpus = one(1, 2, 4)
    memory = 64 << 10
    shape = Topology(1, 1, vcpus, 1) if one(True, False) else None
    cells = tuple(Cell(i, frozenset(range(i * vcpus // 2, (i + 1) * vcpus // 2)), memory // 2)
                  for i in range(2)) if vcpus > 1 and one(True, False) else ()  # fmt: skip
    mode = one(Mode.DEFAULT, Mode.MAXIMUM, Mode.PASSTHROUGH, Mode.CUSTOM)
    cpu = Cpu(mode, "EPYC" if mode is Mode.CUSTOM else "", topology=shape, cells=cells,
              address_bits=one(None, AddressBits(False, 40)))  # fmt: skip
    for name in ("svm", "xsave", "invtsc"):
        policy = one(None, *Policy)
        cpu = cpu.with_feature(name, policy) if policy else cpu
    numa = one(
        None, NumaTuning("strict", frozenset({0})), NumaTuning("restrictive", frozenset({0}))
    )
    backing = Memory(memory, huge=one(None, None, (HugePages(2048),), ()), numa=numa,
                     source=one("", "memfd"), access=one("", "shared", "private"))  # fmt: skip
    kinds = st.sampled_from(["virtio", "scsi", "sata", "usb", "ide"])
    buses = draw(st.lists(kinds, max_size=2))
    paths = ("/srv/arch.qcow2", "/srv/other.qcow2")
    disks = tuple(
        Disk(f"vd{'ab'[i]}", paths[i], bus=bus, format="qcow2", io=one("", "threads"),
             cache=one("", "none", "writeback"),
             read_only=bus not in ("sata", "ide") and one(True, False))
        for i, bus in enumerate(buses)
    )  # fmt: skip
    if disks and disks[0].bus == "virtio":
        disks = (replace(disks[0], iothread=1, queues=one(None, vcpus)), *disks[1:])
    networks = tuple(Interface(one("user", "network"), "isolated", one("virtio", "e1000e"),
                               mac=one("", f"52:54:00:00:00:0{i}"))
                     for i in range(draw(st.integers(0, 2))))  # fmt: skip
    consoles = tuple(
        Console("pty", one("serial", "virtio")) for _ in range(draw(st.integers(0, 2)))
    )
    return Guest(
        f"a{one('', ' b', ',c')}", backing, type="qemu", vcpus=vcpus, machine=one("", "q35", "pc"),
        cpu=cpu, iothreads=1, boot=one(Boot(), Boot(loader="/srv/OVMF_CODE.fd")), disks=disks,
        interfaces=networks, consoles=consoles, agent=one(True, False),
        balloon=one(None, Balloon("none"), Balloon("virtio")),
    )  # fmt: skip


def test_guests_of_every_shape_are_realized(images, tmp_path, huge_pages):
    @given(guests())
    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
    def check(guest):
        guest = for_tcg(guest, images=images)
        realize(guest, tmp_path)

    check()


@pytest.mark.parametrize("bits", [36, 39, 46])
def test_the_guest_sees_the_width_that_was_asked_for(bits, tmp_path):
    cpu = Cpu(Mode.CUSTOM, "EPYC", address_bits=AddressBits(False, bits))
    guest = for_tcg(Guest("a", Memory(1 << 20), machine="q35", cpu=cpu))
    asked = {"execute": "qom-get", "arguments": {"path": "/machine/unattached/device[0]",
                                                 "property": "phys-bits"}}  # fmt: skip
    (answer,), _ = talk([*qemu_command(guest).argv, "-S"], asked, folder=tmp_path)
    assert answer == bits


def test_the_examples_that_are_no_xml_are_all_here():
    assert {n for n in ROWS if EXAMPLES[n].suffix == ".txt"} == {
        "qemu-host", "qemu-named", "qemu-s390x", "qemu-uefi-hypervisor",
    }  # fmt: skip
    assert INTEL[0] == "GenuineIntel"
