"""The VMX instructions in VMX root operation: how each succeeds and fails, and what it changes."""

from __future__ import annotations

import struct
from typing import Final

from undervisor.arch.vmx.capabilities import VmxMisc, VmxMsr
from undervisor.arch.vmx.controls import SecondaryControls
from undervisor.arch.vmx.errors import VmInstructionError as Error
from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import BITS, FieldArea, FieldWidth
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.registers import Rflags
from undervisor.conformance.expect import each, equal
from undervisor.conformance.suite import guest_test
from undervisor.conformance.vmx.lab import VmxLab
from undervisor.guest.probe.answers import Answer, Returned, VmxOutcome
from undervisor.guest.probe.vmx_setup import NO_VMCS

STATUS: Final = (
    Rflags.cf | Rflags.pf | Rflags.af | Rflags.zf | Rflags.sf | Rflags.of_
)  # fmt: skip
"""The six flags that every VMX instruction writes."""
SHADOW: Final = 1 << 31
"""Bit 31 of a VMCS region's first dword: the shadow-VMCS indicator."""
PATTERN: Final = 0xA5A5_5A5A_C3C3_3C3C


def _second_vmcs(lab: VmxLab, revision: int | None = None) -> int:
    """A page that may become a VMCS."""
    page = lab.places.control2
    lab.fill(page, 0x1000)
    lab.write_u32(page, lab.facts.basic.revision if revision is None else revision)
    return page


@guest_test("SDM: VMXON—Enter VMX Operation", "SDM: VM Instruction Error Numbers")
def vmxon_in_root_operation_fails(lab: VmxLab) -> None:
    """VMXON in VMX root operation is VMfail with error 15."""
    result = lab.l1.vmxon(lab.places.region).value
    equal("the error of VMXON", result.error, Error.VMXON_IN_VMX_ROOT_OPERATION)


@guest_test("SDM: VMXON—Enter VMX Operation", "SDM: Software Use of Virtual-Machine Control"
            " Structures")  # fmt: skip
def vmxon_demands_an_aligned_region_with_the_revision(lab: VmxLab) -> None:
    """VMXON is VMfailInvalid for an unaligned pointer or another revision, bit 31 included."""
    region, other = lab.places.region, _second_vmcs(lab)
    revision = lab.facts.basic.revision
    with lab.batch() as batch:
        batch.vmxoff()
        bad = {"unaligned": batch.vmxon(region + 8)}
        for name, value in (("another revision", revision ^ 1), ("bit 31", revision | SHADOW)):
            batch.write(other, struct.pack("<I", value))
            bad[name] = batch.vmxon(other)
        good = batch.vmxon(region)
    each("the outcome of VMXON", {what: answer.value.outcome for what, answer in bad.items()},
         VmxOutcome.FAIL_INVALID)  # fmt: skip
    equal("the outcome of a right VMXON", good.value.outcome, VmxOutcome.SUCCEED)


@guest_test("SDM: VMXOFF—Leave VMX Operation")
def vmxoff_leaves_and_vmxon_enters_again(lab: VmxLab) -> None:
    """After VMXOFF there is no VMX operation; VMXON enters it anew, without a current VMCS."""
    with lab.batch() as batch:
        off, absent = batch.vmxoff(), batch.vmptrst()
        on, pointer = batch.vmxon(lab.places.region), batch.vmptrst()
        loaded = batch.vmptrld(lab.places.control)
    equal("the outcome of VMXOFF", off.value.outcome, VmxOutcome.SUCCEED)
    equal("the exception of VMPTRST outside", absent.fault and absent.fault.vector, 6)
    equal("the outcome of VMXON", on.value.outcome, VmxOutcome.SUCCEED)
    equal("the current-VMCS pointer after VMXON", pointer.value.value, NO_VMCS)
    equal("the outcome of VMPTRLD", loaded.value.outcome, VmxOutcome.SUCCEED)
    lab.run("cpuid").exits_with(ExitReason.CPUID)


@guest_test("SDM: VMCLEAR—Clear Virtual-Machine Control Structure")
def vmclear_fails_for_bad_pointers(lab: VmxLab) -> None:
    """VMCLEAR: error 2 for an unaligned pointer, error 3 for the VMXON pointer."""
    with lab.batch() as batch:
        unaligned = batch.vmclear(lab.places.control + 0x10)
        region = batch.vmclear(lab.places.region)
        current = batch.vmptrst()
    equal("the error for an unaligned pointer", unaligned.value.error,
          Error.VMCLEAR_WITH_INVALID_PHYSICAL_ADDRESS)  # fmt: skip
    equal("the error for the VMXON pointer", region.value.error,
          Error.VMCLEAR_WITH_VMXON_POINTER)  # fmt: skip
    equal("the current VMCS afterwards", current.value.value, lab.places.control)


@guest_test("SDM: VMPTRLD—Load Pointer to Virtual-Machine Control Structure")
def vmptrld_fails_for_bad_pointers_and_keeps_the_current(lab: VmxLab) -> None:
    """VMPTRLD: error 9 unaligned, 10 the VMXON pointer, 11 another revision; nothing changes."""
    other = _second_vmcs(lab, lab.facts.basic.revision ^ 1)
    with lab.batch() as batch:
        answers = [batch.vmptrld(gpa) for gpa in (other + 0x10, lab.places.region, other)]
        current = batch.vmptrst()
    equal("the errors", [int(answer.value.error) for answer in answers],
          [Error.VMPTRLD_WITH_INVALID_PHYSICAL_ADDRESS, Error.VMPTRLD_WITH_VMXON_POINTER,
           Error.VMPTRLD_WITH_INCORRECT_REVISION_IDENTIFIER])  # fmt: skip
    equal("the current VMCS afterwards", current.value.value, lab.places.control)


@guest_test("SDM: VMPTRLD—Load Pointer to Virtual-Machine Control Structure",
            "SDM: Shadow VMCS")  # fmt: skip
def a_shadow_vmcs_is_loaded_only_with_vmcs_shadowing(lab: VmxLab) -> None:
    """VMPTRLD of a shadow VMCS fails with error 11 unless "VMCS shadowing" may be 1.

    VM entry never takes a shadow VMCS: it is VMfailInvalid.
    """
    other = _second_vmcs(lab, lab.facts.basic.revision | SHADOW)
    with lab.batch() as batch:
        loaded, launched = batch.vmptrld(other), batch.vmlaunch()
        batch.vmptrld(lab.places.control)
    if lab.supports(SecondaryControls, "vmcs_shadowing"):
        equal("the outcome of VMPTRLD", loaded.value.outcome, VmxOutcome.SUCCEED)
        equal("the outcome of VMLAUNCH", launched.value.outcome, VmxOutcome.FAIL_INVALID)
    else:
        equal("the error of VMPTRLD", loaded.value.error,
              Error.VMPTRLD_WITH_INCORRECT_REVISION_IDENTIFIER)  # fmt: skip


@guest_test("SDM: VMCLEAR—Clear Virtual-Machine Control Structure",
            "SDM: VMPTRST—Store Pointer to Virtual-Machine Control Structure")  # fmt: skip
def vmclear_of_the_current_vmcs_leaves_none(lab: VmxLab) -> None:
    """VMCLEAR of the current VMCS makes the pointer FFFFFFFF_FFFFFFFFH; of another it does not.

    Without a current VMCS, VMREAD, VMWRITE, VMLAUNCH, VMRESUME and bad pointers are VMfailInvalid.
    """
    other = _second_vmcs(lab)
    with lab.batch() as batch:
        batch.vmclear(other)
        kept = batch.vmptrst()
        batch.vmclear(lab.places.control)
        pointer = batch.vmptrst()
        failing = {
            "VMREAD": batch.vmread(F.GUEST_RIP), "VMWRITE": batch.vmwrite(F.GUEST_RIP, 0),
            "VMLAUNCH": batch.vmlaunch(), "VMRESUME": batch.vmresume(),
            "VMCLEAR": batch.vmclear(1), "VMPTRLD": batch.vmptrld(1),
            "VMXON": batch.vmxon(lab.places.region),
        }  # fmt: skip
    equal("the pointer after VMCLEAR of another VMCS", kept.value.value, lab.places.control)
    equal("the pointer after VMCLEAR of the current VMCS", pointer.value.value, NO_VMCS)
    each("the outcome without a current VMCS",
         {name: answer.value.outcome for name, answer in failing.items()},
         VmxOutcome.FAIL_INVALID)  # fmt: skip


@guest_test("SDM: VMLAUNCH/VMRESUME—Launch/Resume Virtual Machine",
            "SDM: Initializing a VMCS")  # fmt: skip
def the_launch_state_decides_between_vmlaunch_and_vmresume(lab: VmxLab) -> None:
    """VMRESUME of a clear VMCS fails with 5, VMLAUNCH of a launched one with 4; VMCLEAR clears."""
    lab.run("cpuid").exits_with(ExitReason.CPUID)
    with lab.batch() as batch:
        again = batch.vmlaunch()
        batch.vmclear(lab.places.control)
        batch.vmptrld(lab.places.control)
        early = batch.vmresume()
    equal("the error of VMLAUNCH of a launched VMCS", again.value.error,
          Error.VMLAUNCH_WITH_NON_CLEAR_VMCS)  # fmt: skip
    equal("the error of VMRESUME of a clear VMCS", early.value.error,
          Error.VMRESUME_WITH_NON_LAUNCHED_VMCS)  # fmt: skip
    lab.run("cpuid").exits_with(ExitReason.CPUID)
    lab.resume({F.GUEST_RIP: lab.places.code}).exits_with(ExitReason.CPUID)


@guest_test("SDM: Software Use of Virtual-Machine Control Structures")
def each_vmcs_keeps_its_fields_and_launch_state(lab: VmxLab) -> None:
    """A VMCS keeps its data and launch state while another is current, and through VMCLEAR."""
    other = _second_vmcs(lab)
    lab.run("cpuid").exits_with(ExitReason.CPUID)
    with lab.batch() as batch:
        batch.vmwrite(F.GUEST_RSP, 0x1111)
        batch.vmclear(other)
        batch.vmptrld(other)
        batch.vmwrite(F.GUEST_RSP, 0x2222)
        clear = batch.vmresume()
        batch.vmclear(other)
        batch.vmptrld(lab.places.control)
        first, launched = batch.vmread(F.GUEST_RSP), batch.vmlaunch()
        batch.vmptrld(other)
        second = batch.vmread(F.GUEST_RSP)
    equal("the error of VMRESUME of the second VMCS", clear.value.error,
          Error.VMRESUME_WITH_NON_LAUNCHED_VMCS)  # fmt: skip
    equal("the error of VMLAUNCH of the first VMCS", launched.value.error,
          Error.VMLAUNCH_WITH_NON_CLEAR_VMCS)  # fmt: skip
    equal("guest RSP of the first VMCS", first.value.value, 0x1111)
    equal("guest RSP of the second VMCS, after VMCLEAR", second.value.value, 0x2222)


@guest_test("SDM: VMREAD—Read Field from Virtual-Machine Control Structure",
            "SDM: VMWRITE—Write Field to Virtual-Machine Control Structure")  # fmt: skip
def an_encoding_that_no_field_has_is_error_12(lab: VmxLab) -> None:
    """VMREAD and VMWRITE of an unsupported component fail with error 12.

    Bits 12 and 63:15 of an encoding are reserved, and only 64-bit fields have a high half.
    """
    rip = int(F.GUEST_RIP)
    encodings = [
        *(rip | 1 << bit for bit in (12, *range(15, 32), 32, 63)),
        F.GUEST_ES_SELECTOR | 1, F.PIN_BASED_CONTROLS | 1, rip | 1, 0x7FFE,
    ]  # fmt: skip
    with lab.batch() as batch:
        answers = {(e, "VMREAD"): batch.vmread(e) for e in encodings}
        answers |= {(e, "VMWRITE"): batch.vmwrite(e, 0) for e in encodings}
    each("the error for encoding", {what: a.value.error for what, a in answers.items()},
         Error.ACCESS_TO_UNSUPPORTED_COMPONENT)  # fmt: skip


@guest_test("SDM: VMWRITE—Write Field to Virtual-Machine Control Structure",
            "SDM: Miscellaneous Data")  # fmt: skip
def vm_exit_information_is_read_only_or_writable_as_misc_says(lab: VmxLab) -> None:
    """VMWRITE to a VM-exit information field fails with 13 unless IA32_VMX_MISC bit 29 is 1."""
    misc = VmxMisc(lab.l1.rdmsr(VmxMsr.IA32_VMX_MISC).value)
    fields = sorted(f for f in lab.known if f.area is FieldArea.READ_ONLY)
    with lab.batch() as batch:
        answers = {field: batch.vmwrite(field, 0) for field in fields}
    want = 0 if misc.vmwrite_any_field else Error.VMWRITE_TO_READ_ONLY_COMPONENT
    each("the error of VMWRITE to", {f: a.value.error for f, a in answers.items()}, want)


@guest_test("SDM: VMREAD—Read Field from Virtual-Machine Control Structure", "SDM: Field Width")
def every_field_holds_its_width_and_not_more(lab: VmxLab) -> None:
    """VMWRITE of more bits than a field has ignores those beyond; VMREAD gives zeros there.

    Access rights are left out: processors may drop their reserved bits.
    """
    fields = sorted(
        f for f in lab.known
        if f.area is not FieldArea.READ_ONLY and not f.name.endswith("ACCESS_RIGHTS")
    )  # fmt: skip
    with lab.batch() as batch:
        for field in fields:
            batch.vmwrite(field, PATTERN)
        values = batch.vmreads(fields, lab.places.scratch)
    each("VMREAD gives in", dict(values.value), lambda f: PATTERN & (1 << BITS[f.width]) - 1)


@guest_test("SDM: VMCS Component Encoding", "SDM: Field Width")
def the_high_half_of_a_64_bit_field_is_a_component(lab: VmxLab) -> None:
    """An encoding with bit 0 set names bits 63:32 of a 64-bit field; the others stay."""
    fields = sorted(
        f for f in lab.known
        if f.width is FieldWidth.BITS_64 and f.area is not FieldArea.READ_ONLY
    )  # fmt: skip
    with lab.batch() as batch:
        for field in fields:
            batch.vmwrite(field, PATTERN)
            batch.vmwrite(field | 1, 0xFFFFFFFF_12345678)
        halves = batch.vmreads([f | 1 for f in fields], lab.places.scratch)
        whole = batch.vmreads(fields, lab.places.scratch + 0x1000)
    each("the high half of", dict(halves.value), 0x12345678)
    each("the whole of", dict(whole.value), 0x12345678 << 32 | PATTERN & 0xFFFFFFFF)


@guest_test("SDM: VMREAD—Read Field from Virtual-Machine Control Structure",
            "SDM: VMWRITE—Write Field to Virtual-Machine Control Structure")  # fmt: skip
def vmread_and_vmwrite_take_8_bytes_of_memory(lab: VmxLab) -> None:
    """In 64-bit mode memory operands have 64 bits whatever the field's width."""
    data = lab.places.data
    lab.write_u64(data, *[PATTERN] * 4)
    registers = {"rbx": data, "rdx": F.GUEST_RIP, "rcx": F.GUEST_ES_SELECTOR}
    lab.call("vmwrite (%rbx), %rdx; vmread %rdx, 8(%rbx); vmread %rcx, 16(%rbx)", registers)
    selector = lab.l1.vmread(F.GUEST_ES_SELECTOR).value.value
    values = struct.unpack("<4Q", lab.read(data, 32))
    equal("memory after VMREADs of RIP and of a selector", values,
          (PATTERN, PATTERN, selector, PATTERN))  # fmt: skip


@guest_test("SDM: VMFUNC—Invoke VM Function")
def vmfunc_is_undefined_in_root_operation(lab: VmxLab) -> None:
    """In VMX root operation VMFUNC causes #UD."""
    fault = lab.l1.vmfunc(0).fault
    equal("the exception of VMFUNC", fault and fault.vector, 6)


@guest_test("SDM: VMCALL—Call to VM Monitor")
def vmcall_fails_in_root_operation(lab: VmxLab) -> None:
    """In VMX root operation VMCALL is VMfail with error 1."""
    with lab.batch() as batch:
        call, error = batch.vmcall(), batch.vmread(F.VM_INSTRUCTION_ERROR)
    equal("the status flags of VMCALL", call.value.rflags & STATUS, int(Rflags.zf))
    equal("the VM-instruction error", error.value.value, Error.VMCALL_IN_VMX_ROOT_OPERATION)


@guest_test("SDM: Conventions")
def success_and_failure_write_all_six_flags(lab: VmxLab) -> None:
    """VMsucceed clears CF, PF, AF, ZF, SF and OF; VMfailValid sets ZF, VMfailInvalid CF alone."""
    lab.write_u64(lab.places.data, lab.places.control, 1)
    pages = {"rbx": lab.places.data, "rax": F.GUEST_RIP, "rcx": 0x7FFE}
    answers: dict[tuple[str, int], Answer[Returned]] = {}
    with lab.batch() as batch:
        for text, flags in (
            ("vmptrld (%rbx)", 0), ("vmread %rax, %rdx", 0), ("vmwrite %rdx, %rax", 0),
            ("vmptrst 16(%rbx)", 0), ("vmptrld 8(%rbx)", Rflags.zf), ("vmlaunch", Rflags.zf),
            ("vmread %rcx, %rdx", Rflags.zf), ("vmwrite %rdx, %rcx", Rflags.zf),
            ("vmclear 8(%rbx)", Rflags.zf), ("vmresume", Rflags.zf), ("vmclear (%rbx)", 0),
            ("vmptrld 8(%rbx)", Rflags.cf), ("vmlaunch", Rflags.cf), ("vmresume", Rflags.cf),
            ("vmread %rax, %rdx", Rflags.cf), ("vmclear 8(%rbx)", Rflags.cf),
        ):  # fmt: skip
            for before in (0x2, 0x2 | STATUS):
                answer = batch.call(lab.assemble(text), pages | {"rflags": before}, [])
                answers[text, flags | before << 32] = answer
    got = {what: a.value.rflags & STATUS for what, a in answers.items()}
    each("the status flags after", dict(got), lambda what: what[1] & STATUS)


@guest_test("SDM: VM Instruction Error Numbers")
def only_a_failure_changes_the_vm_instruction_error(lab: VmxLab) -> None:
    """The VM-instruction error field keeps the last VMfailValid's number through successes."""
    with lab.batch() as batch:
        batch.vmread(0x7FFE)
        batch.vmwrite(F.GUEST_RIP, 0)
        batch.vmptrld(lab.places.control)
        error = batch.vmread(F.VM_INSTRUCTION_ERROR)
    equal("the VM-instruction error", error.value.value, Error.ACCESS_TO_UNSUPPORTED_COMPONENT)
