from dataclasses import replace

import pytest
from broken_guests import CASES, GOOD
from machines import CLIENT, INTEL, machine

from undervisor.domains.host_topology import topology
from undervisor.domains.libvirt_xml import DomainXml
from undervisor.domains.limits import CHECKS, HOST_CHECKS, Weight, problems
from undervisor.domains.model import (
    HugePages,
    Memory,
    Pinning,
)
from undervisor.domains.nesting import View, able, lacks
from undervisor.host.access.recorded import RecordedHost

KNOWN = frozenset({"vmx", "svm", "xsave", "spec-ctrl", "npt"})


def document(cpu, kind="kvm"):
    return DomainXml.parse(
        f"<domain type='{kind}'><name>a</name><memory unit='GiB'>4</memory>{cpu}</domain>"
    )


PASSTHROUGH = "<cpu mode='host-passthrough'>{}</cpu>"
VMX = "<feature policy='{}' name='vmx'/>"


@pytest.mark.parametrize(
    ("cpu", "host_model", "id_", "weight"),
    [
        ("", None, "domain-named-model", Weight.REFUSED),
        ("<cpu><model>Skylake-Client-IBRS</model></cpu>", None, "domain-named-model",
         Weight.REFUSED),
        ("<cpu mode='host-model'/>", None, "domain-host-model", Weight.WARN),
        ("<cpu mode='host-model'/>", {"vmx": "disable"}, "domain-host-model", Weight.REFUSED),
        (PASSTHROUGH.format(VMX.format("disable")), None, "domain-disables-extension",
         Weight.REFUSED),
        (PASSTHROUGH.format("<feature name='ept'/>"), None, "feature-misnamed", Weight.REFUSED),
        (PASSTHROUGH.format("<feature name='vmx-ept'/>"), None, "feature-too-new", Weight.REFUSED),
        (PASSTHROUGH.format("<feature name='turbo'/>"), None, "feature-unknown", Weight.REFUSED),
        (PASSTHROUGH.format("<feature name='vmx-ept' policy='disable'/>"), None,
         "sub-feature-off", Weight.WARN),
        ("<cpu mode='host-passthrough' migratable='off'/>", None, "not-migratable", Weight.NOTE),
    ],
)  # fmt: skip
def test_what_is_lacking_is_named(cpu, host_model, id_, weight):
    found = {p.id: p for p in lacks(document(cpu), View("vmx", host_model, None, KNOWN))}
    assert found[id_].weight is weight
    assert found[id_].remedy


@pytest.mark.parametrize("host_model", [None, {"vmx": "require"}])
def test_what_lacks_nothing_is_not_blamed(host_model):
    view = View("vmx", host_model, None, KNOWN)
    assert lacks(document(PASSTHROUGH.format("")), view) == ()
    assert lacks(document(PASSTHROUGH.format(VMX.format("require"))), view) == ()
    if host_model:
        assert lacks(document("<cpu mode='host-model'/>"), view) == ()


def test_emulation_is_told_apart():
    view = View("vmx")
    (found,) = (p for p in lacks(document(PASSTHROUGH.format(""), "qemu"), view)
                if p.id == "domain-emulated")  # fmt: skip
    assert found.weight is Weight.REFUSED
    (found,) = lacks(document(PASSTHROUGH.format(""), "qemu"), View("svm"))
    assert found.weight is Weight.WARN


def test_the_address_width_of_a_named_model_is_compared_with_the_host(tmp_path):
    for name, cpu in (("server", INTEL), ("client", CLIENT)):
        host = topology(RecordedHost(machine(tmp_path / name, cpu=cpu)))
        named = document("<cpu><model>Broadwell</model><feature name='vmx'/></cpu>")
        (found,) = lacks(named, View("vmx", None, host))
        assert found.id == "address-width"
        assert str(cpu[5]) in found.what
        bits = "<model>B</model><maxphysaddr mode='emulate' bits='39'/><feature name='vmx'/>"
        assert lacks(document(f"<cpu>{bits}</cpu>"), View("vmx", None, host)) == ()
    assert "phys-bits=39" in found.remedy


@pytest.mark.parametrize(
    "cpu",
    ["", "<cpu><model>Skylake-Client-IBRS</model></cpu>", "<cpu mode='host-model'/>",
     PASSTHROUGH.format(VMX.format("forbid") + "<feature name='ept'/>"),
     PASSTHROUGH.format("<feature name='vmx-ept' policy='disable'/>")],
)  # fmt: skip
def test_the_repaired_guest_lacks_nothing(cpu):
    view = View("vmx", None, None, KNOWN)
    before = document(cpu, "qemu")
    after = before.with_guest(able(before.guest, view))
    assert [p for p in lacks(after, view) if p.weight is not Weight.NOTE] == []
    assert after.guest.type == "kvm"


ON_HOST = [
    ("pin-offline", replace(GOOD, pinning=Pinning(vcpus=((0, frozenset({99})),)))),
    ("overcommitted", replace(GOOD, vcpus=9)),
    ("siblings", replace(GOOD, pinning=Pinning(vcpus=((0, frozenset({0})),
                                                      (1, frozenset({1})))))),
    ("huge-pages", replace(GOOD, memory=Memory(4 << 20, huge=(HugePages(2048),)))),
]  # fmt: skip


@pytest.mark.parametrize(("id_", "guest"), CASES, ids=[c[0] for c in CASES])
def test_a_problem_is_found(id_, guest):
    assert id_ in {p.id for p in problems(guest)}


@pytest.mark.parametrize(("id_", "guest"), ON_HOST, ids=[c[0] for c in ON_HOST])
def test_a_problem_on_a_host_is_found(id_, guest, tmp_path):
    host = topology(RecordedHost(machine(tmp_path / "host")))
    assert id_ in {p.id for p in problems(guest, host)}
    assert id_ not in {p.id for p in problems(guest)}


def test_a_good_guest_has_no_problem(tmp_path):
    assert problems(GOOD, topology(RecordedHost(machine(tmp_path / "host")))) == ()
    assert len(CHECKS) + len(HOST_CHECKS) == 10
