"""The Python API."""

import pytest

from undervisor.arch.svm import boundary as svm_boundary
from undervisor.arch.svm.vmcb import VmcbField as V
from undervisor.arch.vmx import boundary as vmx_boundary
from undervisor.arch.vmx.capabilities import CURRENT_PROCESSOR
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.explain import Dump, diagnose, explain
from undervisor.explain.dump import VMX, Failure


def ids(violations):
    return [violation.rule.id for violation in violations]


def test_a_vmx_state_is_explained():
    state = vmx_boundary.valid_state()
    assert explain(state) == []
    assert ids(explain(state | {F.GUEST_RFLAGS: 0, F.HOST_TR_SELECTOR: 0})) == [
        "vmx.host.tr.null",
        "vmx.guest.rflags.bit-1",
    ]


def test_a_vmcb_is_explained():
    state = svm_boundary.valid_state()
    assert explain(state) == []
    state[V.GUEST_ASID] = 0
    assert ids(explain(state, svm_boundary.PROCESSOR)) == ["svm.asid.zero"]
    assert ids(explain(svm_boundary.to_vmcb(state))) == ["svm.asid.zero"]


@pytest.mark.parametrize("module", [vmx_boundary, svm_boundary])
def test_every_boundary_state_is_explained_by_its_rule(module):
    for rule, how in module.BREAKS.items():
        assert rule in ids(explain(how.state(), how.capabilities))


def test_a_vmcb_is_not_held_against_an_intel_processor():
    with pytest.raises(TypeError):
        explain(svm_boundary.valid_state(), CURRENT_PROCESSOR)


def test_an_empty_state_breaks_nothing():
    assert explain({}) == []
    assert diagnose(Dump("nothing")).is_clean


@pytest.mark.parametrize(
    ("failure", "first"),
    [
        (Failure(error=7), "vmx.controls.vpid.zero"),
        (Failure(error=8), "vmx.host.tr.null"),
        (Failure(reason=0x8000_0021, qualification=0), "vmx.guest.rflags.bit-1"),
        (Failure(reason=0x8000_0021, qualification=4), "vmx.guest.link.aligned"),
    ],
)
def test_the_rule_that_fits_the_reported_failure_comes_first(failure, first):
    state = vmx_boundary.valid_state("full") | {
        F.VPID: 0,
        F.HOST_TR_SELECTOR: 0,
        F.GUEST_RFLAGS: 0,
        F.VMCS_LINK_POINTER: 4,
    }
    broken = diagnose(Dump("x", VMX, dict(state), failure=failure)).broken
    assert broken[0].rule.id == first
    assert len(broken) == 4


def test_a_rule_that_the_log_names_comes_first():
    state = vmx_boundary.valid_state() | {F.HOST_TR_SELECTOR: 0, F.GUEST_RFLAGS: 0}
    dump = Dump("x", VMX, dict(state), named=["vmx.guest.rflags.bit-1"])
    assert ids(diagnose(dump).broken)[0] == "vmx.guest.rflags.bit-1"
