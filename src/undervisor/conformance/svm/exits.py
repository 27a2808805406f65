"""Instructions of L2 that exit by an intercept, and that do not without it."""

from __future__ import annotations

from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.svm.intercepts import Intercept
from undervisor.conformance.expect import equal
from undervisor.conformance.suite import guest_test
from undervisor.conformance.svm.lab import SvmLab


@guest_test("APM: Intercept Operation", "APM: Instruction Intercepts")
def cpuid_exits_with_its_intercept_only(lab: SvmLab) -> None:
    """CPUID causes #VMEXIT when intercepted, before it changes anything; else it runs."""
    run = lab.run("mov $5, %eax; cpuid", wants=[Intercept.CPUID])
    run.exits_with(ExitCode.CPUID)
    equal("L2's RAX", run.registers["rax"], 5)
    lab.run("mov $5, %eax; cpuid").ends()
