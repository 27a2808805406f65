"""Verdicts for pairs of machines that differ in one thing."""

import dataclasses
from pathlib import Path

import pytest

from undervisor.arch.vmx.capabilities import VmxMsr
from undervisor.host.access.recorded import RecordedHost
from undervisor.host.fact import Absent, Denied, Known, Unknown
from undervisor.host.facts.machine import gather
from undervisor.host.facts.version import flavour, parse_version
from undervisor.host.migration.capabilities import missing_controls
from undervisor.host.migration.judge import Side, Verdict, judge
from undervisor.host.migration.rules import Case

HOSTS = Path(__file__).parent.parent.parent / "hosts"
MSRS = {
    VmxMsr.IA32_VMX_PINBASED_CTLS: Known(0x7F_0000_0016),
    VmxMsr.IA32_VMX_PROCBASED_CTLS: Known(0xFFF9_FFFE_0401_E172),
    VmxMsr.IA32_VMX_PROCBASED_CTLS2: Known(0x0F7F_FFFF_0000_0000),
    VmxMsr.IA32_VMX_EXIT_CTLS: Known(0x0FFF_FFFF_0003_6DFF),
    VmxMsr.IA32_VMX_ENTRY_CTLS: Known(0x0007_F3FF_0000_11FF),
}


def machine(name):
    host = RecordedHost(str(HOSTS / name))
    return gather(host)


INTEL = machine("intel-l1-passthrough")
AMD = machine("amd-stable-7.1.2")


def side(base, kernel="7.1.2", qemu="9.1.0", nested=True, vmx=MSRS, **processor):
    module = base.kvm.expected
    parameters = {module: {"nested": Known("1" if nested else "0", "nested")}}
    return Side(
        dataclasses.replace(
            base,
            kernel=dataclasses.replace(
                base.kernel,
                release=Known(kernel),
                version=Known(parse_version(kernel)),
                flavour=flavour(kernel),
            ),
            software=dataclasses.replace(
                base.software, qemu=Known(parse_version(qemu)) if qemu else Absent("qemu")
            ),
            kvm=dataclasses.replace(base.kvm, parameters=parameters),
            processor=dataclasses.replace(base.processor, **processor),
        ),
        vmx if base is INTEL else {},
    )


def ids(move):
    return {finding.kind.id for finding in move.findings}


RUNNING = [
    # (base, kernel here, kernel there, QEMU here, QEMU there, verdict, finding)
    (INTEL, "7.1.2", "7.1.2", "9.1", "9.1", Verdict.SAFE, "nested-state-is-saved"),
    (INTEL, "5.3", "5.3", "4.2", "4.2", Verdict.SAFE, "nested-state-is-saved"),
    (INTEL, "5.2", "5.3", "4.2", "4.2", Verdict.RISKY, "kernel-below-document"),
    (INTEL, "4.19.300", "5.3", "4.2", "4.2", Verdict.UNSAFE, "kernel-without-nested-state"),
    (INTEL, "5.3", "5.3", "4.1", "4.2", Verdict.UNSAFE, "qemu-too-old"),
    (INTEL, "6.12.1", "6.6.1", "9.1", "9.1", Verdict.RISKY, "kernel-goes-back"),
    (INTEL, "6.6.1", "6.6.1", "9.1", "8.2", Verdict.RISKY, "qemu-goes-back"),
    (INTEL, "6.6.1", "6.6.1", "", "8.2", Verdict.UNKNOWN, "qemu-version-unknown"),
    (INTEL, "4.18.0-553.el8_10.x86_64", "6.6.1", "6.2", "8.2", Verdict.UNKNOWN,
     "kernel-number-unsure"),
    (AMD, "5.7", "5.8", "5.2", "5.2", Verdict.UNSAFE, "kernel-without-nested-state"),
    (AMD, "5.8", "5.8", "5.1", "5.2", Verdict.UNSAFE, "qemu-too-old"),
    (AMD, "5.8", "5.8", "5.2", "5.2", Verdict.RISKY, "nested-restore-defects"),
    (AMD, "6.12.85", "6.12.85", "9.1", "9.1", Verdict.RISKY, "nested-restore-defects"),
    (AMD, "6.12.86", "6.12.86", "9.1", "9.1", Verdict.RISKY, "nested-restore-defects"),
    (AMD, "7.0.4", "7.0.4", "9.1", "9.1", Verdict.SAFE_IF, "document-says-unsafe"),
    (AMD, "6.8.0-45-generic", "6.8.0-45-generic", "9.1", "9.1", Verdict.UNKNOWN,
     "nested-restore-unsure"),
]  # fmt: skip


@pytest.mark.parametrize(("base", "here", "there", "q1", "q2", "verdict", "finding"), RUNNING)
def test_an_l1_with_running_guests(base, here, there, q1, q2, verdict, finding):
    move = judge(side(base, here, q1), side(base, there, q2), Case.L1_RUNNING)
    assert move.verdict is verdict
    assert finding in ids(move)


@pytest.mark.parametrize("case", Case)
def test_vendors_never_mix(case):
    move = judge(side(INTEL), side(AMD), case)
    assert move.verdict is Verdict.UNSAFE
    assert ids(move) == {"vendors-differ"}


@pytest.mark.parametrize("base", [INTEL, AMD])
def test_a_configured_l1_moves_but_may_fail_later(base):
    move = judge(side(base), side(base), Case.L1_CONFIGURED)
    assert move.verdict is Verdict.SAFE_IF
    assert "may-fail-once-started" in ids(move)


@pytest.mark.parametrize("case", [Case.L2_SAME_HOST, Case.L2_OTHER_HOST, Case.L2_BARE_METAL])
@pytest.mark.parametrize("base", [INTEL, AMD])
def test_an_l2_moves_whatever_the_nested_state_does(base, case):
    move = judge(side(base, "5.4", nested=False), side(base, "5.4", nested=False), case)
    assert move.verdict is Verdict.SAFE


@pytest.mark.parametrize("case", [Case.L1_RUNNING, Case.L1_CONFIGURED])
def test_a_destination_without_nesting_is_unsafe(case):
    move = judge(side(AMD), side(AMD, nested=False), case)
    assert move.verdict is Verdict.UNSAFE
    assert "nested-off-there" in ids(move)


def test_missing_flags_are_named():
    flags = INTEL.processor.flags.value - {"avx512f", "rdseed", "pdcm"}
    move = judge(side(INTEL), side(INTEL, flags=Known(flags)), Case.L2_OTHER_HOST)
    told = [f for f in move.findings if f.kind.id == "features-missing-there"]
    assert told[0].evidence == ("rdseed",)
    assert move.verdict is Verdict.UNSAFE


def test_a_missing_vmx_control_has_qemus_name_and_its_bit():
    exits = MSRS[VmxMsr.IA32_VMX_EXIT_CTLS].value & ~(1 << 12 + 32)
    other = {**MSRS, VmxMsr.IA32_VMX_EXIT_CTLS: Known(exits)}
    move = judge(side(INTEL), side(INTEL, vmx=other), Case.L1_RUNNING)
    told = [f for f in move.findings if f.kind.id == "features-missing-there"]
    assert told[0].evidence == ("vmx-exit-load-perf-global-ctrl (IA32_VMX_EXIT_CTLS bit 44)",)


def test_a_feature_more_at_the_destination_is_no_difference():
    fewer = {**MSRS, VmxMsr.IA32_VMX_PINBASED_CTLS: Known(0x16_0000_0016)}
    move = judge(side(INTEL, vmx=fewer), side(INTEL), Case.L1_RUNNING)
    assert "features-missing-there" not in ids(move)


@pytest.mark.parametrize("fact", [Denied("MSR"), Unknown("MSR", "no device")])
def test_msrs_that_can_not_be_read_are_said(fact):
    blind = dict.fromkeys(MSRS, fact)
    move = judge(side(INTEL), side(INTEL, vmx=blind), Case.L1_RUNNING)
    assert move.verdict is Verdict.SAFE_IF
    assert "vmx-capabilities-unknown" in ids(move)
    assert missing_controls(MSRS, blind)[1] == [msr.name for msr in MSRS]


def test_ibm_z_moves():
    lpar = Side(machine("s390x-lpar"), {})
    assert judge(lpar, lpar, Case.L1_RUNNING).verdict is Verdict.SAFE


def test_a_machine_of_which_nothing_is_known_is_unknown():
    blind = Side(machine("unreadable"), {})
    assert judge(blind, side(AMD), Case.L1_RUNNING).verdict is Verdict.UNKNOWN


def test_a_machine_without_the_extension_holds_no_l1():
    lacking = Side(machine("amd-l1-host-model"), {})
    move = judge(side(AMD), lacking, Case.L1_RUNNING)
    assert move.verdict is Verdict.UNSAFE
    assert "no-extension-there" in ids(move)


def test_every_bad_verdict_has_a_source_or_a_remedy():
    move = judge(side(AMD, "5.7"), side(AMD, "5.7"), Case.L1_RUNNING)
    for finding in move.findings:
        assert finding.remedy or finding.kind.sources
