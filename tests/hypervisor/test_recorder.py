"""What is told of each transition, and that what is told and what is counted agree."""

from collections import Counter
from importlib import resources
from itertools import pairwise

import pytest

from undervisor.arch.svm.vmcb import VmcbField
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.guest import loops
from undervisor.guest.image import Image
from undervisor.guest.loops import Loop
from undervisor.hypervisor import models
from undervisor.hypervisor.recorder import Both, Recorder, Tally
from undervisor.targets import Job
from undervisor.targets.builtin import build

CPU = {"svm": "amd", "vmx": "intel"}


def traced(image, cpu, cpus=1):
    """`(transitions, tally)` of a whole run."""
    seen, tally = [], Tally()
    machine = build(Job(image, cpus), models.named(cpu), tracer=Both(Recorder(seen.append), tally))
    machine.run(60)
    return seen, tally, machine


def example(vendor):
    data = resources.files("undervisor").joinpath("data", "examples", f"{vendor}.elf").read_bytes()
    return Image.parse(data, vendor)


def loop(vendor, body="nop"):
    elf = Loop(body, 1, 1, vendor).elf(models.named(CPU[vendor]).vmx)
    return Image.parse(elf, "loop")


@pytest.fixture(scope="module", params=["svm", "vmx"])
def run(request):
    return request.param, *traced(example(request.param), CPU[request.param], 2)


def test_every_exit_is_told_and_counted(run):
    _, seen, tally, machine = run
    assert sum(cell.count for cell in tally.cells.values()) == len(seen) >= machine.exits


def test_what_is_told_is_what_is_counted(run):
    _, seen, tally, _ = run
    told = Counter((t.vcpu, t.level, t.to, t.reason) for t in seen)
    assert told == {key: cell.count for key, cell in tally.cells.items()}


def test_levels_join_up_on_every_vcpu(run):
    _, seen, _, _ = run
    at = {0: 1, 1: 1}
    for transition in seen:
        assert transition.level == at[transition.vcpu], transition
        at[transition.vcpu] = transition.to


def test_time_goes_forward_and_the_guests_share_of_it_fits(run):
    _, seen, _, _ = run
    for before, after in pairwise(seen):
        assert after.time >= before.time
        assert 0 <= after.ran <= after.time - before.time


def test_every_entry_of_l2_is_left_again(run):
    _, seen, _, _ = run
    entries = sum((t.level, t.to) == (1, 2) for t in seen)
    exits = sum((t.level, t.to) == (2, 1) for t in seen)
    assert entries == exits > 0


def test_reasons_are_in_the_vendors_own_words(run):
    vendor, seen, _, _ = run
    reasons = {t.reason for t in seen}
    if vendor == "vmx":
        expected = {"VMLAUNCH", "VMRESUME", "VMREAD", "VMCALL", "IO_INSTRUCTION", "EPT_VIOLATION"}
        assert not [r for r in reasons if r.startswith("EXCP_") or r in ("NPF", "IOIO", "MSR")]
    else:
        expected = {"VMRUN", "VMLOAD", "IOIO", "NPF", "#VMEXIT(VMMCALL)"}
    assert expected <= reasons


def test_each_vmx_instruction_is_named_on_every_vcpu(run):
    vendor, seen, _, _ = run
    if vendor == "vmx":
        assert Counter(t.reason for t in seen)["VMXON"] == 2


def test_details_say_what_an_exit_was_about(run):
    _, seen, _, _ = run
    details = {t.reason.removeprefix("#VMEXIT(").rstrip(")"): t.detail for t in seen if t.detail}
    assert details["CPUID"].startswith("leaf 0x")
    port = details.get("IOIO") or details["IO_INSTRUCTION"]
    assert "port 0x" in port


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        (F.HOST_CR3, 1 << 60, "VMfailValid(8): VM entry with invalid host-state field(s): "
         "vmx.host.cr3.width"),
        (F.CR3_TARGET_COUNT, 99, "VMfailValid(7)"),
        (F.CR3_TARGET_COUNT, 99, "vmx.controls.cr3-target-count"),
        (F.GUEST_RFLAGS, 0, "VM-entry failure: vmx.guest.rflags.bit-1"),
    ],
)  # fmt: skip
def test_a_vm_entry_that_fails_names_the_rule(monkeypatch, field, value, said):
    good = loops.vmcs_fields
    monkeypatch.setattr(loops, "vmcs_fields", lambda caps: good(caps) | {field: value})
    seen, _, _ = traced(loop("vmx"), "intel")
    failed = [t for t in seen if t.reason == "VMLAUNCH"]
    assert said in failed[-1].why
    assert failed[-1].to == 1


def test_a_vmrun_that_fails_names_every_broken_rule(monkeypatch):
    area = bytearray(loops.vmcb())
    area[VmcbField.GUEST_ASID] = 0
    area[VmcbField.CR0 + 4] = 1  # bit 32
    monkeypatch.setattr(loops, "vmcb", lambda: bytes(area))
    seen, _, _ = traced(loop("svm"), "amd")
    why = next(t.why for t in seen if t.reason == "VMRUN")
    assert "svm.asid.zero" in why
    assert "svm.cr0" in why


def test_two_runs_are_told_in_the_same_words(run):
    vendor, seen, _, _ = run
    again, _, _ = traced(example(vendor), CPU[vendor], 2)
    assert again == seen


def test_tracing_changes_nothing(run):
    vendor, _, _, machine = run
    plain = build(Job(example(vendor), 2), models.named(CPU[vendor]))
    plain.run(60)
    assert (plain.now(), plain.exits) == (machine.now(), machine.exits)
