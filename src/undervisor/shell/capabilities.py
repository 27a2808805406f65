"""The capabilities that a running probe reads on its processor."""

from __future__ import annotations

from undervisor.arch.vmx.capabilities import VmxMsr
from undervisor.errors import BadInput
from undervisor.explain.capabilities import MSRS, CapabilitySet
from undervisor.guest.probe.batch import BatchCore
from undervisor.guest.probe.l1 import Runner

_SVM_LEAF, _WIDTHS_LEAF = 0x8000_000A, 0x8000_0008


def from_probe(probe: Runner, name: str) -> CapabilitySet:
    """What a running probe reads on its processor, on whatever target it runs."""
    batch = BatchCore()
    leaves = {n: batch.cpuid(n) for n in (0x8000_0000, 0x8000_0001, _WIDTHS_LEAF, _SVM_LEAF)}
    msrs = {index: batch.rdmsr(index) for index in sorted(MSRS)}
    probe.run(batch)
    found = CapabilitySet(name)
    # A fault is an MSR that the processor does not have.
    values = {index: one.outcome for index, one in msrs.items() if isinstance(one.outcome, int)}
    if VmxMsr.IA32_VMX_BASIC in values:
        found.cpus = [values]
    top, extended, widths, svm = (leaf.value for leaf in leaves.values())
    highest = top["rax"] & 0xFFFF_FFFF
    if highest >= _WIDTHS_LEAF:
        found.physical_width = widths["rax"] & 0xFF
        found.linear_width = widths["rax"] >> 8 & 0xFF
    if not found.cpus and highest >= _SVM_LEAF and extended["rcx"] >> 2 & 1:
        eax, ebx, ecx, edx = (svm[r] & 0xFFFF_FFFF for r in ("rax", "rbx", "rcx", "rdx"))
        found.svm = (eax, ebx, ecx, edx)
    if not found.vendor:
        raise BadInput(f"{name}: a guest there sees neither VMX nor SVM")
    return found
