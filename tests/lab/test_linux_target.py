"""The target `linux`: a real kvm_intel on the built-in L0."""

import pytest

from undervisor.conformance.known import explain
from undervisor.conformance.runner import Verdict, run_all
from undervisor.conformance.suite import select
from undervisor.errors import BadInput
from undervisor.lab.linux import LinuxTarget
from undervisor.targets import catalogue


def test_it_has_a_name_and_an_intel_model_unless_another_is_asked_for():
    assert catalogue.named("linux").name == "linux (intel)"
    assert catalogue.named("linux", "amd").name == "linux (amd)"


def test_a_model_without_virtualization_is_refused():
    with pytest.raises(BadInput, match="neither VMX nor SVM"):
        LinuxTarget("intel,-vmx")


@pytest.mark.deep
@pytest.mark.xdist_group("lab")
@pytest.mark.parametrize(
    ("cpu", "good", "bad"),
    [
        (
            "intel",
            [
                "vmx.exits.cpuid_always_exits",
                "vmx.events_trap.an_injected_nmi_blocks_virtual_nmis_until_iret",
                "vmx.processors.each_processor_runs_its_own_l2_at_once[2 processors]",
            ],
            ["vmx.instructions.vmcall_fails_in_root_operation"],
        ),
        ("amd", ["svm.state.an_exit_clears_the_injected_event"], []),
    ],
)
def test_a_real_kvm_runs_guest_tests(cpu, good, bad):
    results = {r.test.id: r for r in run_all(select([*good, *bad]), LinuxTarget(cpu))}
    assert {name: results[name].verdict for name in good} == dict.fromkeys(good, Verdict.PASSED)
    for name in bad:
        assert results[name].verdict is Verdict.FAILED
        assert explain(results[name]) is not None
