"""What we don't know stays, whatever is changed."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lxml import etree
from xml_documents import documents

from undervisor.domains.libvirt_xml import DomainXml
from undervisor.domains.model import (
    AddressBits,
    Balloon,
    Boot,
    Console,
    CpuLimits,
    Disk,
    HugePages,
    Interface,
    MemoryLimits,
    Mode,
    NumaTuning,
    Pinning,
    Policy,
    Topology,
)

REALISTIC = sorted((Path(__file__).parent / "realistic").glob("*.xml"))
THOROUGH = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


def canonical(text):
    return etree.tostring(etree.fromstring(text.encode()), method="c14n", with_comments=True)


def unknown_parts(text):
    """Elements that the model does not hold, and comments, as text, in order."""
    root = etree.fromstring(text.encode())
    names = {"clock", "metadata", "vcpusched", "memnode", "bootmenu", "boot", "tpm", "hostdev"}
    found = []
    for node in root.iter():
        known = isinstance(node.tag, str) and not node.tag.startswith("x") and node.tag not in names
        if not known:
            copy = etree.fromstring(etree.tostring(node, with_tail=False)) if isinstance(
                node.tag, str) else node  # fmt: skip
            found.append(etree.tostring(copy, with_tail=False))
    return sorted(found)


def changes():
    """Changes of every part of the model; none removes an element with unknown parts in it."""
    s = frozenset({1, 2})
    return st.sampled_from([
        lambda g: replace(g, vcpus=g.vcpus + 1),
        lambda g: replace(g, name=g.name + "x"),
        lambda g: replace(g, machine="pc", architecture="i686", type="qemu"),
        lambda g: replace(g, iothreads=7),
        lambda g: replace(g, agent=True, balloon=Balloon("none")),
        lambda g: replace(g, memory=replace(g.memory, size=g.memory.size + 1, current=5)),
        lambda g: replace(g, memory=replace(g.memory, huge=(HugePages(2048, s),), locked=True)),
        lambda g: replace(g, memory=replace(g.memory, numa=NumaTuning("preferred", s))),
        lambda g: replace(g, memory=replace(g.memory, source="memfd", access="private")),
        lambda g: replace(g, memory_limits=MemoryLimits(1, 2, 3)),
        lambda g: replace(g, cpu_limits=CpuLimits(2, 1000, 1000, 1000, 1000)),
        lambda g: replace(g, pinning=Pinning("auto", s, ((0, s), (5, s)), s, ((1, s),))),
        lambda g: replace(g, boot=Boot("/a", "/b", "/c", "/d", "e f")),
        lambda g: replace(g, cpu=replace(g.cpu, mode=Mode.CUSTOM, model="EPYC", vendor="AMD")),
        lambda g: replace(g, cpu=replace(g.cpu, topology=Topology(2, 1, 3, 4), check="none")),
        lambda g: replace(g, cpu=replace(g.cpu, address_bits=AddressBits(False, 39))),
        lambda g: replace(g, cpu=replace(g.cpu, migratable=True, match="strict")),
        lambda g: replace(g, cpu=g.cpu.with_feature("vmx", Policy.REQUIRE)),
        lambda g: replace(g, disks=(*g.disks, Disk("vdz", "/z", format="raw", cache="none"))),
        lambda g: replace(g, disks=tuple(replace(d, cache="none", io="native") for d in g.disks)),
        lambda g: replace(g, interfaces=(*g.interfaces, Interface("bridge", "br0", "virtio"))),
        lambda g: replace(g, interfaces=tuple(replace(i, driver="vhost", queues=3)
                                              for i in g.interfaces)),
        lambda g: replace(g, consoles=(*g.consoles, Console("pty", "virtio"))),
        lambda g: replace(g, extra=(*g.extra, "-gdb", "tcp::1")),
    ])  # fmt: skip


@given(documents(), st.lists(changes(), min_size=1, max_size=4))
@THOROUGH
def test_a_document_is_read_written_and_changed_without_loss(text, wishes):
    document = DomainXml.parse(text)
    guest = document.guest
    assert canonical(document.with_guest(guest).text) == canonical(text)
    for wish in wishes:
        guest = wish(guest)
    changed = document.with_guest(guest)
    assert DomainXml.parse(changed.text).guest == guest
    assert unknown_parts(changed.text) == unknown_parts(text)
    assert DomainXml.new(fresh(guest)).guest == guest


def fresh(guest):
    """As if it had never been in a document."""
    return replace(
        guest,
        disks=tuple(replace(d, ordinal=-1) for d in guest.disks),
        interfaces=tuple(replace(i, ordinal=-1) for i in guest.interfaces),
        consoles=tuple(replace(c, ordinal=-1) for c in guest.consoles),
        cpu=replace(guest.cpu, cells=tuple(replace(c, ordinal=-1) for c in guest.cpu.cells)),
    )


def test_there_are_thirty_realistic_documents():
    assert len(REALISTIC) >= 30


@pytest.mark.parametrize("path", REALISTIC, ids=lambda p: p.stem)
def test_a_realistic_document_is_read_and_written_without_loss(path):
    text = path.read_text()
    document = DomainXml.parse(text)
    assert document.guest.name
    assert canonical(document.with_guest(document.guest).text) == canonical(text)
    more = replace(document.guest, vcpus=document.guest.vcpus + 1)
    assert DomainXml.parse(document.with_guest(more).text).guest == more


def test_comments_around_the_root_stay():
    inner = "<domain type='kvm'><name>a</name><memory>1</memory></domain>"
    text = f"<!-- edit with virsh -->\n{inner}\n<!-- end -->"
    document = DomainXml.parse(text)
    said = document.with_guest(replace(document.guest, vcpus=3)).text
    assert "edit with virsh" in said
    assert "<!-- end -->" in said


def test_a_removed_part_takes_only_itself_along():
    text = ("<domain type='kvm'><name>a</name><memory>1</memory><devices>"
            "<disk type='file'><source file='/a'/><target dev='vda'/><serial>S1</serial></disk>"
            "<disk type='file'><source file='/b'/><target dev='vdb'/><serial>S2</serial></disk>"
            "</devices></domain>")  # fmt: skip
    document = DomainXml.parse(text)
    changed = document.with_guest(replace(document.guest, disks=document.guest.disks[1:]))
    assert "S2" in changed.text
    assert "S1" not in changed.text
    assert [d.target for d in DomainXml.parse(changed.text).guest.disks] == ["vdb"]
