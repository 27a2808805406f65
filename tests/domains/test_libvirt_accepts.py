"""A real libvirtd takes what we make: defined, started, verified, changed, removed."""

import contextlib
import json
from dataclasses import replace

import pytest
from broken_guests import CASES
from guide_examples import EXAMPLES, mapping, produce
from machines import machine
from tcg import empty_qcow2, for_tcg

from undervisor.cli.main import main
from undervisor.domains import apply as applying
from undervisor.domains.connection import Libvirt
from undervisor.domains.harden import Options, harden
from undervisor.domains.host_topology import topology
from undervisor.domains.libvirt_xml import DomainXml
from undervisor.domains.limits import Weight, problems
from undervisor.domains.model import Guest, Memory, Policy
from undervisor.domains.nesting import View, lacks
from undervisor.domains.recommend import Need, recommend
from undervisor.domains.tune import tune
from undervisor.errors import BadInput
from undervisor.host.access.live import LiveHost

ROWS = mapping()
DOMAINS = [n for n in ROWS if EXAMPLES[n].suffix == ".xml" and ROWS[n][0] == "guest"]


@pytest.fixture
def libvirt(libvirtd):
    with Libvirt(libvirtd.uri) as connection:
        yield connection
        for name in connection.domains():
            with contextlib.suppress(BadInput):
                connection.stop(name)
            connection.undefine(name)
        for name in connection.networks():
            connection.remove_network(name)


def undervisor(*words):
    with pytest.raises(SystemExit) as end:
        main(list(map(str, words)))
    return end.value.code or 0


@pytest.mark.parametrize("name", DOMAINS)
def test_an_example_is_defined_and_starts(name, libvirt, tmp_path, capsys, request):
    if name == "huge-pages":
        request.getfixturevalue("huge_pages")
    document = DomainXml.parse(produce(ROWS[name], machine(tmp_path / "host"), capsys))
    images = {"/var/lib/libvirt/images/vm.qcow2": empty_qcow2(tmp_path / "vm.qcow2")}
    as_it_is = document.with_guest(replace(document.guest, type="qemu"))
    libvirt.define(as_it_is.text)
    kept = libvirt.document(as_it_is.guest.name).guest
    assert kept.cpu.features == document.guest.cpu.features
    assert kept.cpu.mode is document.guest.cpu.mode
    assert kept.cpu_limits == document.guest.cpu_limits
    assert kept.memory_limits == document.guest.memory_limits
    if name == "isolated-interface":
        assert undervisor("network", "up", "isolated", "--connect", libvirt.uri, "--yes") == 0
    libvirt.undefine(as_it_is.guest.name)
    libvirt.define(document.with_guest(for_tcg(document.guest, images=images)).text)
    libvirt.start(document.guest.name)
    assert libvirt.active(document.guest.name)


def test_libvirt_refuses_to_start_the_guides_own_names(libvirt):
    guest = Guest("words", Memory(64 << 10), type="qemu", machine="q35")
    guest = for_tcg(replace(guest, cpu=recommend(Need.HERE, "vmx").cpu))
    document = DomainXml.new(replace(guest, cpu=guest.cpu.with_feature("ept", Policy.REQUIRE)))
    libvirt.define(document.text)
    with pytest.raises(BadInput, match="unknown CPU feature: ept"):
        libvirt.start("words")
    assert "feature-misnamed" in {p.id for p in lacks(document, View("vmx"))}


def test_a_tuned_and_hardened_guest_is_defined(libvirt):
    guest = Guest("l1", Memory(64 << 10), machine="q35", vcpus=2)
    tuned = tune(guest, topology(LiveHost()), Need.HERE, "vmx", {}).guest
    hard = harden(tuned, Options()).guest
    libvirt.define(DomainXml.new(replace(hard, type="qemu")).text)
    kept = libvirt.document("l1").guest
    assert kept.pinning.vcpus == hard.pinning.vcpus
    assert kept.memory_limits == hard.memory_limits
    assert kept.cpu_limits == hard.cpu_limits


def test_a_domain_is_defined_changed_started_removed_and_brought_back(
    libvirt, tmp_path, history, capsys
):
    path = tmp_path / "l1.xml"
    guest = for_tcg(Guest("l1", Memory(64 << 10), machine="q35"))
    path.write_text(DomainXml.new(guest).text)
    base = ("guest", "apply", path, "--connect", libvirt.uri)
    assert undervisor(*base, "--dry-run") == 0
    assert not libvirt.has_domain("l1")
    assert undervisor(*base, "--yes", "--start") == 0
    assert libvirt.active("l1")
    uuid = libvirt.document("l1").uuid
    path.write_text(DomainXml.new(replace(guest, vcpus=2)).text)
    capsys.readouterr()
    assert undervisor(*base, "--yes") == 0
    assert "counts at its next start" in capsys.readouterr().out
    assert libvirt.document("l1").guest.vcpus == 2
    assert libvirt.document("l1").uuid == uuid
    undo = ("guest", "apply", "l1", "--undo", "--connect", libvirt.uri, "--yes")
    assert undervisor(*undo) == 0
    assert libvirt.document("l1").guest.vcpus == 1
    assert undervisor("guest", "remove", "l1", "--connect", libvirt.uri, "--yes") == 2  # it runs
    libvirt.stop("l1")
    assert undervisor("guest", "remove", "l1", "--connect", libvirt.uri, "--yes") == 0
    assert not libvirt.has_domain("l1")
    assert undervisor(*undo) == 0  # the removal
    assert libvirt.document("l1").uuid == uuid
    assert undervisor(*undo) == 0  # the definition
    assert not libvirt.has_domain("l1")
    assert undervisor(*undo) == 2
    assert not list(history.iterdir())


def test_what_somebody_else_changed_is_not_undone(libvirt, history):
    guest = for_tcg(Guest("l1", Memory(64 << 10), machine="q35"))
    keep = applying.History()
    applying.apply(libvirt, applying.plan(libvirt, DomainXml.new(guest)), keep)
    document = libvirt.document("l1")
    libvirt.define(document.with_guest(replace(document.guest, vcpus=3)).text)
    with pytest.raises(BadInput, match="changed by somebody else"):
        applying.plan_undo(libvirt, "l1", keep)


def test_a_definition_that_libvirt_refuses_leaves_no_trace(libvirt, history):
    keep = applying.History()
    document = DomainXml.new(Guest("l1", Memory(64 << 10), type="kvm", machine="q35"))
    with pytest.raises(BadInput, match="libvirt can't define"):  # there is no KVM for it
        applying.apply(libvirt, applying.plan(libvirt, document), keep)
    with pytest.raises(BadInput, match="no change of l1"):
        keep.last("l1")


def test_a_network_lives_from_definition_to_removal(libvirt, tmp_path, capsys):
    base = ("--connect", libvirt.uri)
    up = ("network", "up", "isolated", "--address", "192.168.100.1/24", "--bridge", "virbr1")
    assert undervisor(*up, *base, "--dry-run") == 0
    assert not libvirt.networks()
    assert undervisor(*up, *base, "--yes") == 0
    network = libvirt.network("isolated")
    assert network.isActive()
    assert network.autostart()
    assert undervisor(*up, *base, "--yes", "--no-autostart") == 0  # again: only what differs
    assert not network.autostart()
    capsys.readouterr()
    assert undervisor("network", "show", *base, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert [(n["name"], n["runs"], n["isolated"], n["problems"]) for n in said] == [
        ("isolated", True, True, [])
    ]
    path = tmp_path / "l1.xml"
    with_network = ("guest", "new", "l1", "--vendor", "amd", "--type", "qemu", "--network")
    capsys.readouterr()
    assert undervisor(*with_network, "isolated") == 0
    path.write_text(capsys.readouterr().out)
    libvirt.define(path.read_text())
    assert undervisor("network", "remove", "isolated", *base, "--yes") == 2  # l1 uses it
    libvirt.undefine("l1")
    assert undervisor("network", "remove", "isolated", *base, "--yes") == 0
    assert not libvirt.networks()


def test_diff_and_show_read_a_domain_of_libvirt(libvirt, capsys):
    text = "<cpu mode='host-model' check='partial'/>"
    document = DomainXml.new(Guest("l1", Memory(64 << 10), type="qemu", machine="q35"))
    libvirt.define(document.text.replace("<devices/>", f"{text}<devices/>"))
    capsys.readouterr()
    assert undervisor("guest", "diff", "l1", "--vendor", "intel", "--connect", libvirt.uri,
                      "--json") == 1  # fmt: skip
    said = {p["id"]: p for p in json.loads(capsys.readouterr().out)["problems"]}
    assert "vmx" in said["domain-host-model"]["what"]
    assert undervisor("guest", "show", "l1", "--connect", libvirt.uri) == 0
    assert "host-model" in capsys.readouterr().out


def test_verify_says_why_it_can_not_look_inside(libvirt, capsys):
    libvirt.define(DomainXml.new(for_tcg(Guest("l1", Memory(64 << 10), machine="q35"))).text)
    base = ("guest", "verify", "l1", "--connect", libvirt.uri)
    assert undervisor(*base, "--agent") == 2
    assert "does not run" in capsys.readouterr().err
    libvirt.start("l1")
    assert undervisor(*base, "--agent") == 2
    assert "agent" in capsys.readouterr().err
    assert undervisor(*base, "--console") == 2
    assert "console" in capsys.readouterr().err


REFUSED = [
    (id_, guest)
    for id_, guest in CASES
    if any(p.id == id_ and p.weight is Weight.REFUSED for p in problems(guest))
]


@pytest.mark.parametrize(("id_", "guest"), REFUSED, ids=[id_ for id_, _ in REFUSED])
def test_what_we_say_will_not_start_does_not(id_, guest, libvirt):
    cells = tuple(replace(c, memory=32 << 10) for c in guest.cpu.cells)
    small = replace(guest, type="qemu", machine="q35", cpu=replace(guest.cpu, cells=cells),
                    memory=replace(guest.memory, size=64 << 10))  # fmt: skip
    text = DomainXml.new(small).text
    with pytest.raises(BadInput, match=r"libvirt can't (define|start)"):
        define_and_start(libvirt, small.name, text)


def define_and_start(libvirt, name, text):
    libvirt.define(text)
    libvirt.start(name)
