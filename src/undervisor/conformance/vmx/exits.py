"""Instructions of L2 that exit: always, by a control, by a bitmap; and those that must not."""

from __future__ import annotations

from undervisor.arch.vmx.exits import ExitReason
from undervisor.conformance.expect import equal
from undervisor.conformance.suite import guest_test
from undervisor.conformance.vmx.lab import VmxLab


@guest_test("SDM: Instructions That Cause VM Exits Unconditionally")
def cpuid_always_exits(lab: VmxLab) -> None:
    """CPUID causes a VM exit unconditionally, before it changes anything."""
    run = lab.run("mov $5, %eax; cpuid")
    run.exits_with(ExitReason.CPUID, qualification=0)
    equal("the exit's instruction length", run.length, 2)
    equal("L2's RAX", run.registers["rax"], 5)
