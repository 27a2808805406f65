"""The parsers of facts, on the forms that systems really print."""

import pytest

from undervisor.host.access.protocol import Cpuid
from undervisor.host.facts.kernel import parse_modprobe, parse_modules, parse_os_release
from undervisor.host.facts.place import signature
from undervisor.host.facts.processor import parse_cpuinfo
from undervisor.host.facts.software import parse_domain, parse_guest, split_command
from undervisor.host.facts.version import Flavour, Version, flavour, parse_version
from undervisor.host.facts.zsystem import Level, parse_sysinfo


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("6.8.0-45-generic", Version(6, 8, 0)),
        ("QEMU emulator version 8.2.2 (Debian 1:8.2.2+ds-0ubuntu1.4)", Version(8, 2, 2)),
        ("QEMU emulator version 2.12.0(qemu-kvm-ev-2.12.0-44.1.el7_8.1)", Version(2, 12, 0)),
        ("10.0.0\n", Version(10, 0, 0)),
        ("7.1-rc3", Version(7, 1, 0, 3)),
        ("5.15.153.1-microsoft-standard-WSL2", Version(5, 15, 153)),
    ],
)
def test_a_version_is_found_in_what_programs_print(text, version):
    assert parse_version(text) == version


@pytest.mark.parametrize("text", ["", "no version", "1", "v.1.x", "-1.-2"])
def test_text_without_a_version_is_refused(text):
    with pytest.raises(ValueError, match="no version"):
        parse_version(text)


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ("6.12.40", Flavour.UPSTREAM),
        ("6.8.0-45-generic", Flavour.DISTRIBUTION),
        ("6.1.0-26-cloud-amd64", Flavour.DISTRIBUTION),
        ("5.14.0-427.13.1.el9_4.x86_64", Flavour.DISTRIBUTION),
        ("6.10.12-200.fc40.x86_64", Flavour.DISTRIBUTION),
        ("6.8.12-2-pve", Flavour.DISTRIBUTION),
        ("6.12.4-arch1-1", Flavour.DISTRIBUTION),
        ("6.4.0-150600.23.25-default", Flavour.DISTRIBUTION),
        ("6.18.44-edge", Flavour.CUSTOM),
        ("6.12.40+", Flavour.CUSTOM),
        ("", Flavour.CUSTOM),
    ],
)
def test_where_a_kernel_comes_from(release, expected):
    assert flavour(release) is expected


def test_the_first_processor_counts():
    fields = parse_cpuinfo("processor\t: 0\nflags\t\t: fpu vmx\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    assert fields == {"processor": "0", "flags": "fpu vmx"}


def test_modules_have_users():
    text = "kvm_intel 479232 4 - Live 0x0\nkvm 1409024 1 kvm_intel, Live 0x0\nrubbish\nx y z w\n"
    modules = parse_modules(text)
    assert (modules["kvm_intel"].references, modules["kvm"].users) == (4, ("kvm_intel",))
    assert set(modules) == {"kvm_intel", "kvm"}


def test_modprobe_lines_are_joined_and_dashes_are_underscores():
    text = (
        "# options kvm nested=0\noptions kvm-intel nested=1 \\\n  ept=1\nblacklist kvm-amd\n\nodd\n"
    )
    lines = parse_modprobe("f", text)
    assert [(line.verb, line.module, line.words) for line in lines] == [
        ("options", "kvm_intel", ("nested=1", "ept=1")),
        ("blacklist", "kvm_amd", ()),
    ]


def test_os_release_has_quotes():
    text = 'ID=debian\nPRETTY_NAME="Debian GNU/Linux 12"\nBROKEN="x\n# no\n'
    assert parse_os_release(text) == {
        "ID": "debian",
        "PRETTY_NAME": "Debian GNU/Linux 12",
        "BROKEN": '"x',
    }


def test_a_signature_is_ebx_ecx_edx():
    assert signature(Cpuid(0x40000001, 0x4B4D564B, 0x564B4D56, 0x4D)) == "KVMKVMKVM"


@pytest.mark.parametrize(
    ("command", "name", "cpu", "wants"),
    [
        ("/usr/bin/qemu-system-x86_64 -name guest=l1,a=on -accel kvm -cpu host,migratable=on",
         "l1", "host,migratable=on", True),
        ("qemu-system-x86_64 -enable-kvm -cpu EPYC,+svm", "pid 7", "EPYC,+svm", True),
        ("qemu-system-x86_64 -machine q35,accel=kvm:tcg", "pid 7", "", True),
        ("qemu-system-x86_64 -M microvm,accel=tcg -m 512", "pid 7", "", False),
        ("/usr/libexec/qemu-kvm -name x", "x", "", False),
        ("qemu-system-x86_64 -name 'a b' -accel tcg -drive file=kvm.img", "a b", "", False),
        ("kvm -cpu max", "pid 7", "max", True),
    ],
)  # fmt: skip
def test_a_qemu_command_line_is_read(command, name, cpu, wants):
    guest = parse_guest(7, split_command(command))
    assert (guest.name, guest.cpu, guest.wants_kvm) == (name, cpu, wants)


@pytest.mark.parametrize(
    "command", ["", "vim qemu-system-x86_64", "qemu-img create x", "'", "grep kvm"]
)
def test_another_program_is_no_guest(command):
    assert parse_guest(7, split_command(command)) is None


@pytest.mark.parametrize("text", ["", "<a/>", "<domain>", "x" * 100])
def test_text_that_is_no_domain_is_refused(text):
    with pytest.raises(ValueError, match=r"\S"):
        parse_domain(text)


def test_an_entity_is_not_expanded():
    bomb = (
        "<!DOCTYPE d [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;&a;'>]><domain><name>&b;</name></domain>"
    )
    assert "aaaa" not in parse_domain(bomb).name


def test_a_domain_says_what_it_gives():
    domain = parse_domain(
        "<domain type='kvm'><name>n</name><cpu mode='custom'><model>EPYC</model>"
        "<feature policy='require' name='svm'/></cpu><memtune><hard_limit>1</hard_limit></memtune>"
        "<cputune><shares>1</shares></cputune>"
        "<devices><interface><source bridge='br0'/></interface></devices></domain>"
    )
    assert (domain.gives("svm"), domain.gives("vmx")) == (True, False)
    assert (domain.memory_limit, domain.cpu_limit, domain.bridges) == (True, True, ("br0",))


def test_the_levels_of_ibm_z_come_from_the_outside_in():
    text = (
        "Type:  8561\nLPAR Number:          27\n\nVM00 Control Program: KVM/Linux\n"
        "VM01 Control Program: z/VM    7.3.0\n"
    )
    assert parse_sysinfo(text) == (
        Level("LPAR", "PR/SM"),
        Level("VM01", "z/VM    7.3.0"),
        Level("VM00", "KVM/Linux"),
    )
