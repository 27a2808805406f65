"""Single numbers that people paste: errors, exit reasons, exit codes, suberrors, fields' values."""

from __future__ import annotations

from dataclasses import dataclass, field

from undervisor.arch.bits import Register
from undervisor.arch.kvm import SUBERRORS
from undervisor.arch.rules import Outcome
from undervisor.arch.svm import vmcb as svm_vmcb
from undervisor.arch.svm.exits import EXIT_INFO, ExitCode, exit_code_of
from undervisor.arch.svm.intercepts import INTERCEPT_OF, UNCONDITIONAL
from undervisor.arch.svm.vmcb import VmcbField
from undervisor.arch.vmx import controls as c
from undervisor.arch.vmx.checks import RULES as VMX_RULES
from undervisor.arch.vmx.controls import CONTROL_WORDS
from undervisor.arch.vmx.errors import VmInstructionError
from undervisor.arch.vmx.exit_information import MEANINGS, describe_qualification
from undervisor.arch.vmx.exits import ENTRY_FAILURES, EntryFailureQualification, ExitReason
from undervisor.arch.vmx.fields import SEGMENTS, guest_segment
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.registers import Cr0, Cr4, Efer
from undervisor.arch.x86.segments import Attributes
from undervisor.errors import BadInput
from undervisor.explain.dump import SVM, field_name
from undervisor.explain.names import svm_field, vmx_field


@dataclass(frozen=True, slots=True)
class Meaning:
    """A number's meaning: a title, sentences, and named bits (name, value, what it is)."""

    title: str
    sentences: list[str] = field(default_factory=list)
    bits: list[tuple[str, str, str]] = field(default_factory=list)
    remedy: str = ""


_ERROR_REMEDIES: dict[int, str] = {
    4: "execute VMCLEAR on the VMCS before VMLAUNCH, or use VMRESUME",
    5: "use VMLAUNCH the first time after VMCLEAR, VMRESUME after that",
    6: "VMXOFF and VMXON clear the launch state: use VMLAUNCH",
    7: "dump the VMCS and give it to `undervisor explain`; most often a reserved bit of a control "
    "word: `undervisor caps adjust CONTROL VALUE`",
    8: "dump the VMCS and give it to `undervisor explain`; most often a host selector with RPL or "
    "TI bits, a zero TR, or a missing CR4.VMXE",
    11: "write IA32_VMX_BASIC bits 30:0 to the first 4 bytes of the region before VMPTRLD",
    12: "the processor does not have this field: check its capability first",
    13: "IA32_VMX_MISC bit 29 says whether exit-information fields can be written",
    26: "do not execute MOV SS or POP SS right before VMLAUNCH or VMRESUME",
    28: "check the type and the reserved bits of the descriptor against IA32_VMX_EPT_VPID_CAP",
}


def vm_instruction_error(number: int) -> Meaning:
    """A VM-instruction error number."""
    if number == 0:
        return Meaning(
            "VM-instruction error 0",
            [
                "No error number. An instruction that failed with CF = 1 (VMfailInvalid) writes "
                "none, because there is no current VMCS; with ZF = 1 the number is never 0."
            ],
            remedy="execute VMPTRLD before; look at CF and ZF after the instruction",
        )
    try:
        error = VmInstructionError(number)
    except ValueError:
        raise BadInput(f"no VM-instruction error {number} is defined", hint="1 to 28") from None
    sentences = [error.sentence]
    outcome = {7: Outcome.FAIL_CONTROL, 8: Outcome.FAIL_HOST}.get(number)
    if outcome is not None:
        count = sum(rule.outcome is outcome for rule in VMX_RULES)
        sentences.append(f"{count} rules end this way; `undervisor rules` lists them.")
    return Meaning(
        f"VM-instruction error {number}: {error.name}",
        sentences,
        remedy=_ERROR_REMEDIES.get(number, ""),
    )


def exit_reason(number: int, qualification: int | None) -> Meaning:
    """An exit-reason field, or a basic exit reason, with its qualification if there is one."""
    if number >> 32:
        raise BadInput("an exit reason has 32 bits")
    value = c.ExitReasonField(number)
    try:
        reason = ExitReason(value.basic)
    except ValueError:
        raise BadInput(f"no basic exit reason {value.basic} is defined") from None
    sentences = [MEANINGS[reason][0].upper() + MEANINGS[reason][1:] + "."]
    if value.entry_failure:
        sentences.append("Bit 31: the VM entry failed; the guest did not run.")
    elif reason in ENTRY_FAILURES and number > 0xFFFF:
        sentences.append("Bit 31 is 0, which this reason never comes with.")
    bits = [
        (bit.about or name, hex((number & bit.mask) >> bit.lsb), "")
        for name, bit in c.ExitReasonField.FIELDS.items()
        if number & bit.mask and name not in ("basic", "entry_failure")
    ]
    if qualification is not None:
        sentences.append(_qualification(reason, qualification))
    return Meaning(f"exit reason {value.basic}: {reason.name}", sentences, bits)


def _qualification(reason: ExitReason, qualification: int) -> str:
    text = f"Qualification {qualification:#x}: "
    if reason is ExitReason.ENTRY_FAILURE_INVALID_GUEST_STATE:
        try:
            return text + EntryFailureQualification(qualification).name + "."
        except ValueError:
            return text + "no value that is defined."
    return text + describe_qualification(reason, qualification) + "."


def exit_code(number: int) -> Meaning:
    """An SVM exit code."""
    if number >> 64 not in (0, -1):
        raise BadInput("an exit code has 64 bits")
    code = exit_code_of(number & (1 << 64) - 1)
    if not isinstance(code, ExitCode):
        raise BadInput(f"no exit code {number:#x} is defined")
    sentences = []
    intercept = INTERCEPT_OF.get(code)
    if intercept is not None:
        sentences.append(
            f"Asked for by bit {intercept & 31} of the intercept word at "
            f"{(intercept >> 5) * 4:03X}h."
        )
    elif code in UNCONDITIONAL:
        sentences.append(f"Caused by: {UNCONDITIONAL[code]}.")
    for name, text in zip(("EXITINFO1", "EXITINFO2"), EXIT_INFO.get(code, ("", "")), strict=True):
        if text:
            sentences.append(f"{name}: {text}.")
    remedy = ""
    if code is ExitCode.INVALID:
        remedy = "dump the VMCB and give it to `undervisor explain`"
    return Meaning(f"exit code {int(code):#x}: VMEXIT_{code.name}", sentences, remedy=remedy)


def suberror(number: int) -> Meaning:
    """A KVM internal error's suberror."""
    known = SUBERRORS.get(number)
    if known is None:
        raise BadInput(f"no suberror {number} is defined", hint="1 to 4")
    return Meaning(f"suberror {number}: {known.name}", [known.meaning + "."], remedy=known.remedy)


VMX_LAYOUTS: dict[int, type[Register]] = {
    **{int(name): word.layout for name, word in CONTROL_WORDS.items()},
    **{int(guest_segment(r, "ACCESS_RIGHTS")): c.AccessRights for r in SEGMENTS},
    F.GUEST_INTERRUPTIBILITY_STATE: c.InterruptibilityState,
    F.GUEST_PENDING_DEBUG_EXCEPTIONS: c.PendingDebugExceptions,
    F.ENTRY_INTERRUPTION_INFORMATION: c.EntryInterruptionInformation,
    F.EXIT_INTERRUPTION_INFORMATION: c.ExitInterruptionInformation,
    F.IDT_VECTORING_INFORMATION: c.IdtVectoringInformation,
    F.GUEST_INTERRUPT_STATUS: c.GuestInterruptStatus,
    F.EXIT_REASON: c.ExitReasonField,
    **{int(field): Cr0 for field in (F.GUEST_CR0, F.HOST_CR0)},
    **{int(field): Cr4 for field in (F.GUEST_CR4, F.HOST_CR4)},
    **{int(field): Efer for field in (F.GUEST_EFER, F.HOST_EFER)},
}
SVM_LAYOUTS: dict[int, type[Register]] = {
    VmcbField.V_INTR_CONTROL: svm_vmcb.VirtualInterrupt,
    VmcbField.INTERRUPT_SHADOW: svm_vmcb.InterruptShadow,
    VmcbField.NESTED_CONTROL: svm_vmcb.NestedControl,
    VmcbField.LBR_CONTROL: svm_vmcb.LbrControl,
    VmcbField.EVENTINJ: svm_vmcb.EventInfo,
    VmcbField.EXITINTINFO: svm_vmcb.EventInfo,
    VmcbField.CLEAN_BITS: svm_vmcb.CleanBits,
    **{
        int(VmcbField[f"{r}_ATTRIBUTES"]): Attributes
        for r in ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR")
    },
}


def control(name: str, value: int) -> Meaning:
    """The named bits of a control word, or of another field that has bits."""
    field_number = vmx_field(name)
    if field_number in VMX_LAYOUTS:
        layout, title = VMX_LAYOUTS[field_number], F(field_number).name
    else:
        field_number = svm_field(name)
        if field_number not in SVM_LAYOUTS:
            raise BadInput(
                f"{name} is not a field with named bits",
                hint="pin, primary, secondary, tertiary, exit, entry, ...; see docs/explain.md",
            )
        layout, title = SVM_LAYOUTS[field_number], field_name(field_number, SVM)
    if value < 0 or value >> layout.WIDTH:
        raise BadInput(f"{title} has {layout.WIDTH} bits: {value:#x} does not fit")
    default1 = next((w.default1 for w in CONTROL_WORDS.values() if w.layout is layout), 0)
    return Meaning(f"{title} = {value:#x}", bits=named_bits(layout, value, default1))


def named_bits(layout: type[Register], value: int, default1: int = 0) -> list[tuple[str, str, str]]:
    """(bits, value, name) of all fields that are not 0, and of bits that have no name."""
    rows = []
    for name, bits in layout.FIELDS.items():
        if value & bits.mask:
            place = str(bits.lsb) if bits.lsb == bits.msb else f"{bits.msb}:{bits.lsb}"
            rows.append((place, hex((value & bits.mask) >> bits.lsb), bits.about or name.upper()))
    unnamed = value & ~layout.DECLARED
    for bit in range(layout.WIDTH):
        if unnamed >> bit & 1:
            known = default1 >> bit & 1
            text = "reserved, 1 on every processor" if known else "reserved, or newer than we know"
            rows.append((str(bit), "0x1", f"({text})"))
    return rows
