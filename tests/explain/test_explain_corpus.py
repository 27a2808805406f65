"""Dumps in every format, each with what must be found in it."""

import json
import sys
from pathlib import Path

import pytest

from undervisor.arch.vmx.boundary import BREAKS
from undervisor.arch.vmx.checks import check_vm_entry
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.explain import diagnose, read
from undervisor.explain.diagnosis import first_with_findings

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from explain_corpus import CORPUS  # noqa: E402
from explain_writers import haxm, kvm_vmcb, kvm_vmcs, linux_guest, svm_guest, xen_vmcs  # noqa: E402

DUMPS = HERE / "dumps"
EXPECTED = json.loads((DUMPS / "expected.json").read_text())


def examined(name):
    return first_with_findings(read((DUMPS / name).read_bytes()), None)


def test_the_corpus_has_dumps_of_every_format():
    assert len(EXPECTED) >= 25
    assert len({row["format"] for row in EXPECTED.values()}) >= 11


def test_the_files_are_what_the_corpus_says():
    assert {p.name for p in DUMPS.iterdir()} == {*CORPUS, "expected.json"}
    for name, (content, findings) in CORPUS.items():
        raw = content if isinstance(content, bytes) else ("\n".join(content) + "\n").encode()
        assert (DUMPS / name).read_bytes() == raw, "python tests/explain/explain_writers.py"
        assert EXPECTED[name] == findings


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_what_must_be_found_is_found_and_nothing_else(name):
    diagnosis = examined(name)
    assert {
        "format": diagnosis.dump.format,
        "code": 0 if diagnosis.is_clean else 1,
        "broken": [violation.rule.id for violation in diagnosis.broken],
        "observations": [one.id for one in diagnosis.observations],
        "named": [rule.id for rule in diagnosis.named],
    } == EXPECTED[name]


def lines(writer, state, **how):
    return "\n".join(writer(state, **how)).encode()


@pytest.mark.parametrize(
    ("writer", "how"),
    [(kvm_vmcs, {"version": v}) for v in (4, 5, 6)] + [(xen_vmcs, {}), (haxm, {})],
)
def test_every_printed_field_comes_back(writer, how):
    state = linux_guest() | {int(F.HOST_CR3): 0x1234_5000, int(F.GUEST_DR7): 0x4FF}
    (dump,) = read(lines(writer, state, **how))
    assert len(dump.state) > 80
    for field, value in dump.state.items():
        assert value == state[field], F(field).name


@pytest.mark.parametrize("version", [5, 6])
def test_every_printed_field_of_a_vmcb_comes_back(version):
    state = svm_guest()
    (dump,) = read(lines(kvm_vmcb, state, version=version))
    assert len(dump.state) > 90
    for field, value in dump.state.items():
        assert value == state[field], field


@pytest.mark.parametrize("rule", sorted(BREAKS))
def test_a_broken_rule_survives_the_way_through_json(rule):
    how = BREAKS[rule]
    state = {f"{field:#x}" if field < 0x1_0000 else None: v for field, v in how.state().items()}
    state.pop(None)
    (dump,) = read(json.dumps({"vendor": "vmx", "fields": state}).encode())
    whole = {int(f): v for f, v in how.state().items()}
    for field, value in whole.items():
        if field >= 0x1_0000:
            dump.state[field] = value
    found = {v.rule.id for v in diagnose(dump, how.capabilities).broken}
    assert found == {v.rule.id for v in check_vm_entry(whole, how.capabilities).broken}


PRINTED = {
    "vmx.guest.rip.canonical",
    "vmx.guest.cs.type",
    "vmx.host.tr.null",
    "vmx.guest.cr3.width",
    "vmx.guest.activity.range",
    "vmx.guest.tr.usable",
    "vmx.guest.rflags.reserved",
}


@pytest.mark.parametrize("rule", sorted(PRINTED))
@pytest.mark.parametrize("version", [4, 5, 6])
def test_a_broken_rule_is_seen_in_each_kernels_dump(rule, version):
    state = linux_guest() | {
        int(field): value
        for field, value in BREAKS[rule].state().items()
        if field in {int(f) for f in F} and value != BREAKS["vmx.host.cs.null"].state()[field]
    }
    diagnosis = first_with_findings(read(lines(kvm_vmcs, state, version=version)), None)
    assert rule in {v.rule.id for v in diagnosis.broken}


def test_missing_fields_leave_rules_unchecked_and_never_passed():
    (dump,) = read(b"Guest CR0 = 0x80000031\n")
    diagnosis = diagnose(dump)
    assert diagnosis.broken == []
    assert diagnosis.checked + len(diagnosis.unchecked) == 376
    assert all(diagnosis.missing(rule) for rule in diagnosis.unchecked)
    assert "vmx.guest.rflags.bit-1" in {rule.id for rule in diagnosis.unchecked}
