"""The VMX instructions themselves: where they are undefined, and how each succeeds and fails."""

from __future__ import annotations

from typing import Final

from undervisor.arch.vmx.errors import VmInstructionError as Error
from undervisor.arch.x86.events import Vector
from undervisor.arch.x86.registers import Cr4
from undervisor.conformance.expect import each, equal
from undervisor.conformance.suite import guest_test
from undervisor.conformance.vmx.lab import VmxLab

ALL: Final = (
    "vmxon (%rbx)", "vmclear (%rbx)", "vmptrld (%rbx)", "vmptrst (%rbx)", "vmread %rax, %rcx",
    "vmwrite %rcx, %rax", "vmlaunch", "vmresume", "vmcall", "vmxoff", "invept (%rbx), %rax",
    "invvpid (%rbx), %rax",
)  # fmt: skip


@guest_test("SDM: VMX Instruction Reference")
def every_instruction_is_undefined_outside_vmx_operation(lab: VmxLab) -> None:
    """Outside VMX operation each VMX instruction but VMXON causes #UD."""
    lab.l1.vmxoff()
    with lab.batch() as batch:
        answers = {
            text: batch.call(lab.assemble(text), {"rbx": lab.places.data})
            for text in ALL
            if not text.startswith("vmxon")
        }
    faults = {text: answer.fault and answer.fault.vector for text, answer in answers.items()}
    each("the exception outside VMX operation", dict(faults), Vector.UD)


@guest_test("SDM: VMXON—Enter VMX Operation")
def vmxon_is_undefined_without_cr4_vmxe(lab: VmxLab) -> None:
    """VMXON causes #UD while CR4.VMXE is 0."""
    lab.l1.vmxoff()
    lab.l1.write_cr(4, lab.facts.l1.cr4 & ~Cr4.vmxe)
    fault = lab.l1.vmxon(lab.places.region).fault
    equal("the exception of VMXON", fault and fault.vector, Vector.UD)


@guest_test("SDM: VMXON—Enter VMX Operation", "SDM: VM Instruction Error Numbers")
def vmxon_in_root_operation_fails(lab: VmxLab) -> None:
    """VMXON in VMX root operation is VMfail with error 15."""
    result = lab.l1.vmxon(lab.places.region).value
    equal("the error of VMXON", result.error, Error.VMXON_IN_VMX_ROOT_OPERATION)
