"""The VMX instructions where they fault or exit: outside VMX operation, by mode, CPL, operand."""

from __future__ import annotations

from typing import Final

from undervisor.arch.vmx.controls import SecondaryControls
from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.events import Vector
from undervisor.arch.x86.registers import Cr0, Cr4
from undervisor.conformance.expect import each, equal, true
from undervisor.conformance.suite import guest_test
from undervisor.conformance.vmx.lab import VmxLab
from undervisor.guest.probe.answers import Answer, Returned
from undervisor.guest.probe.program import CODE32, USER, USER_CODE64, USER_DATA

ALL: Final = {
    "vmxon (%rbx)": ExitReason.VMXON, "vmclear (%rbx)": ExitReason.VMCLEAR,
    "vmptrld (%rbx)": ExitReason.VMPTRLD, "vmptrst (%rbx)": ExitReason.VMPTRST,
    "vmread %rax, %rcx": ExitReason.VMREAD, "vmwrite %rcx, %rax": ExitReason.VMWRITE,
    "vmlaunch": ExitReason.VMLAUNCH, "vmresume": ExitReason.VMRESUME,
    "vmcall": ExitReason.VMCALL, "vmxoff": ExitReason.VMXOFF,
}  # fmt: skip
"""Every VMX instruction that each processor has, and the reason with which it exits from L2."""
INVALIDATIONS: Final = {
    "invept (%rbx), %rax": (ExitReason.INVEPT, "enable_ept"),
    "invvpid (%rbx), %rax": (ExitReason.INVVPID, "enable_vpid"),
}
MEMORY: Final = ("vmclear (%rbx)", "vmptrld (%rbx)", "vmptrst (%rbx)", "vmread %rax, (%rbx)",
                 "vmwrite (%rbx), %rax")  # fmt: skip
NOT_CANONICAL: Final = 1 << 62
ALL_CONTEXTS: Final = 2
"""The type of INVEPT and INVVPID that concerns everything."""
UNMAPPED: Final = 1 << 33
"""Beyond the 4 GiB that the probe maps."""
USER_CODE: Final = USER + 0x100000
USER_STACK: Final = USER + 0x110000
EXECUTED: Final = "\nud2\n"
"""What stands behind an instruction that must fault: it was executed if this faults instead."""


def _instructions(lab: VmxLab) -> dict[str, ExitReason]:
    """All that the processor has."""
    more = {text: reason for text, (reason, control) in INVALIDATIONS.items()
            if lab.supports(SecondaryControls, control)}  # fmt: skip
    return ALL | more


def _vectors(answers: dict[str, Answer[Returned]]) -> dict[str, object]:
    return {text: answer.fault and answer.fault.vector for text, answer in answers.items()}


@guest_test("SDM: VMX Instruction Reference")
def every_instruction_is_undefined_outside_vmx_operation(lab: VmxLab) -> None:
    """Outside VMX operation each VMX instruction but VMXON causes #UD."""
    lab.l1.vmxoff()
    texts = [text for text in (*ALL, *INVALIDATIONS) if not text.startswith("vmxon")]
    with lab.batch() as batch:
        answers = {t: batch.call(lab.assemble(t), {"rbx": lab.places.data}) for t in texts}
    each("the exception outside VMX operation", _vectors(answers), Vector.UD)


@guest_test("SDM: VMXON—Enter VMX Operation")
def vmxon_is_undefined_without_cr4_vmxe(lab: VmxLab) -> None:
    """VMXON causes #UD while CR4.VMXE is 0."""
    lab.l1.vmxoff()
    lab.l1.write_cr(4, lab.facts.l1.cr4 & ~Cr4.vmxe)
    fault = lab.l1.vmxon(lab.places.region).fault
    equal("the exception of VMXON", fault and fault.vector, Vector.UD)


@guest_test("SDM: VMXON—Enter VMX Operation", "SDM: Enabling and Entering VMX Operation")
def vmxon_demands_the_fixed_bits_of_cr0(lab: VmxLab) -> None:
    """VMXON causes #GP(0) while CR0.NE, which VMX operation fixes to 1, is 0."""
    with lab.batch() as batch:
        batch.vmxoff()
        batch.write_cr(0, lab.facts.l1.cr0 & ~Cr0.ne)
        refused = batch.vmxon(lab.places.region)
        batch.write_cr(0, lab.facts.l1.cr0)
        taken = batch.vmxon(lab.places.region)
    equal("the exception of VMXON", refused.fault and refused.fault.vector, Vector.GP)
    true("VMXON succeeds with CR0.NE", taken.value.succeeded)


@guest_test("SDM: Restrictions on VMX Operation")
def vmx_operation_fixes_bits_of_cr0_and_cr4(lab: VmxLab) -> None:
    """In VMX operation a load of CR0 or CR4 that changes a fixed bit causes #GP(0)."""
    cr0, cr4 = lab.facts.l1.cr0, lab.facts.l1.cr4
    with lab.batch() as batch:
        answers = {
            "CR0.NE": batch.write_cr(0, cr0 & ~Cr0.ne),
            "CR0.PG": batch.write_cr(0, cr0 & ~Cr0.pg),
            "CR4.VMXE": batch.write_cr(4, cr4 & ~Cr4.vmxe),
        }
        same = batch.write_cr(4, cr4)
    each("the exception of clearing",
         {name: a.fault and a.fault.vector for name, a in answers.items()}, Vector.GP)  # fmt: skip
    equal("the fault of loading CR4 as it is", same.fault, None)


@guest_test("SDM: VMX Instruction Reference")
def every_instruction_faults_above_cpl_0_in_root_operation(lab: VmxLab) -> None:
    """In VMX root operation at CPL 3 every VMX instruction causes #GP(0)."""
    enter = lab.assemble(
        f"push ${USER_DATA}; push ${USER_STACK}; push $2; push ${USER_CODE64}; push $USER_CODE;"
        " iretq".replace("USER_CODE;", f"{USER_CODE};")
    )
    faults = {}
    for text in _instructions(lab):
        lab.write(USER_CODE, lab.assemble(text + EXECUTED, USER_CODE))
        lab.write_u64(USER_STACK, lab.places.control, 0)
        fault = lab.l1.call(enter, {"rbx": USER_STACK, "rax": F.GUEST_RIP}).fault
        faults[text] = fault and (fault.vector, fault.error_code, fault.rip, fault.cs)
    each("the fault at CPL 3", dict(faults), (Vector.GP, 0, USER_CODE, USER_CODE64))
    current = lab.l1.vmptrst().value.value
    equal("the current VMCS afterwards", current, lab.places.control)


@guest_test("SDM: VMX Instruction Reference")
def every_instruction_is_undefined_in_compatibility_mode(lab: VmxLab) -> None:
    """With IA32_EFER.LMA = 1 and CS.L = 0 every VMX instruction causes #UD."""
    code = lab.places.code
    enter = lab.assemble(f"push ${CODE32}; push $CODE; lretq")
    faults = {}
    for text in _instructions(lab):
        narrow = text.replace("%r", "%e")
        lab.write(code, lab.assemble(f".code32; {narrow}; nop; {EXECUTED}", code))
        fault = lab.l1.call(enter, {"rbx": lab.places.data, "rax": 0}).fault
        faults[narrow] = fault and (fault.vector, fault.rip, fault.cs)
    each("the fault in compatibility mode", dict(faults), (Vector.UD, code, CODE32))


@guest_test("SDM: VMX Instruction Reference")
def a_memory_operand_faults_like_any_other(lab: VmxLab) -> None:
    """A memory operand that is not canonical causes #GP(0), one that is not mapped #PF.

    Neither changes what is current.  The type of INVEPT and INVVPID is looked at first, and is one
    that the processor has.
    """
    texts = [*MEMORY, *(t for t in _instructions(lab) if t.startswith("inv"))]
    operands = {t: ALL_CONTEXTS if t.startswith("inv") else F.GUEST_RSP for t in texts}
    with lab.batch() as batch:
        wild = {t: batch.call(lab.assemble(t), {"rbx": NOT_CANONICAL, "rax": operands[t]})
                for t in texts}  # fmt: skip
        absent = {t: batch.call(lab.assemble(t), {"rbx": UNMAPPED, "rax": operands[t]})
                  for t in texts}  # fmt: skip
        pointer = batch.vmptrst()
    each("the exception of a non-canonical operand", _vectors(wild), Vector.GP)
    writes = {"vmptrst (%rbx)", "vmread %rax, (%rbx)"}
    each(
        "the page fault's error code and CR2",
        {t: a.fault and (a.fault.vector, a.fault.error_code, a.fault.cr2)
         for t, a in absent.items()},
        lambda text: (Vector.PF, 2 if text in writes else 0, UNMAPPED),
    )  # fmt: skip
    equal("the current VMCS afterwards", pointer.value.value, lab.places.control)


@guest_test("SDM: VMPTRLD—Load Pointer to Virtual-Machine Control Structure",
            "SDM: INVEPT—Invalidate Translations Derived from EPT")  # fmt: skip
def a_register_operand_where_memory_must_be_is_undefined(lab: VmxLab) -> None:
    """VMPTRLD, VMPTRST, VMCLEAR, INVEPT and INVVPID with a register operand cause #UD."""
    codes = {
        "vmptrst": "0x0f, 0xc7, 0xf8", "vmclear": "0x66, 0x0f, 0xc7, 0xf0",
        "invept": "0x66, 0x0f, 0x38, 0x80, 0xc0", "invvpid": "0x66, 0x0f, 0x38, 0x81, 0xc0",
    }  # fmt: skip
    # 0F C7 F0 and 66 0F C7 F0 without memory are RDRAND where the processor has it.
    if lab.l1.cpuid(1).value["rcx"] >> 30 & 1:
        del codes["vmclear"]
    if lab.l1.cpuid(7).value["rbx"] >> 18 & 1:
        del codes["vmptrst"]  # RDSEED
    with lab.batch() as batch:
        answers = {n: batch.call(lab.assemble(f".byte {c}")) for n, c in codes.items()}
    each("the exception of a register operand", _vectors(answers), Vector.UD)


# -- in L2 -----------------------------------------------------------------------------------------


@guest_test("SDM: Instructions That Cause VM Exits Unconditionally")
def every_instruction_of_l2_exits(lab: VmxLab) -> None:
    """In L2 each VMX instruction exits with its own reason, before anything of it is done."""
    for text, reason in _instructions(lab).items():
        run = lab.run(f"{text}; 1:", None, {"rbx": lab.places.data, "rax": 7, "rcx": 9})
        run.exits_with(reason)
        equal(f"RIP at the exit of {text}", run.rip, lab.places.code)
        equal(f"the length of {text}", run.length, len(lab.assemble(text)))
        equal("RAX and RCX", (run.registers["rax"], run.registers["rcx"]), (7, 9))


@guest_test("SDM: Relative Priority of Faults and VM Exits")
def every_instruction_of_l2_exits_at_cpl_3_too(lab: VmxLab) -> None:
    """In L2 the VM exit of a VMX instruction comes before the check of the CPL."""
    user: dict[int, int] = {F.GUEST_CR3: lab.pages()}
    code = lab.places.code
    for text, reason in _instructions(lab).items():
        source = f"push $DS3; push $USER_STACK; push $2; push $CS3; push $1f; iretq; 1: {text}"
        run = lab.run(source, user, {"rbx": lab.places.data})
        run.exits_with(reason)
        equal("CPL at the exit", run[F.GUEST_SS_ACCESS_RIGHTS] >> 5 & 3, 3)
        equal(f"RIP of {text}", run.rip, code + len(lab.assemble(source, code)) - run.length)


@guest_test("SDM: Relative Priority of Faults and VM Exits", "SDM: VMX Instruction Reference")
def in_compatibility_mode_l2s_instructions_are_undefined(lab: VmxLab) -> None:
    """In L2's compatibility mode #UD of a VMX instruction comes before its exit.

    VMCALL alone exits, whatever the mode.
    """
    code, got = lab.places.code, {}
    narrow_code: dict[int, int] = {
        F.GUEST_CS_SELECTOR: 0x18, F.GUEST_CS_ACCESS_RIGHTS: 0xC09B,
        F.GUEST_CS_LIMIT: 0xFFFFFFFF,
    }  # fmt: skip
    for text in _instructions(lab):
        narrow = text.replace("%r", "%e")
        lab.write(code, lab.assemble(f".code32; {narrow}; nop; nop; .code64; vmcall", code))
        run = lab.run(None, narrow_code, {"rbx": lab.places.data})
        got[narrow] = (run.reason, run.vector_of(run.rip))
    each("the exit, or the vector that L2 got", dict(got),
         lambda t: (ExitReason.VMCALL, None if t == "vmcall" else Vector.UD))  # fmt: skip


# SDM, tables "Format of the VM-Exit Instruction-Information Field": scaling 1:0, register 6:3,
# address size 9:7, memory or register 10, segment 17:15, index 21:18 and 22, base 26:23 and 27.
_MEMORY64: Final = 2 << 7
_DS, _SS, _GS = 3 << 15, 2 << 15, 5 << 15
_NO_INDEX, _NO_BASE = 1 << 22, 1 << 27
OPERANDS: Final = {
    "vmclear (%rbx)": (_MEMORY64 | _DS | _NO_INDEX | 3 << 23, 0),
    "vmclear 0x40(%rbx)": (_MEMORY64 | _DS | _NO_INDEX | 3 << 23, 0x40),
    "vmclear -8(%rbx)": (_MEMORY64 | _DS | _NO_INDEX | 3 << 23, (1 << 64) - 8),
    "vmptrld 8(%r12, %r9, 8)": (3 | _MEMORY64 | _DS | 9 << 18 | 12 << 23, 8),
    "vmptrld %gs:(%rax)": (_MEMORY64 | _GS | _NO_INDEX, 0),
    "vmptrst (%esp)": (1 << 7 | _SS | _NO_INDEX | 4 << 23, 0),
    "vmptrst (%rbp, %rdx)": (_MEMORY64 | _SS | 2 << 18 | 5 << 23, 0),
    "vmxon 0x1234": (_MEMORY64 | _DS | _NO_INDEX | _NO_BASE, 0x1234),
    "vmread %rdx, %r9": (9 << 3 | 1 << 10 | 2 << 28, None),
    "vmread %rdx, 4(%rbp)": (_MEMORY64 | _SS | _NO_INDEX | 5 << 23 | 2 << 28, 4),
    "vmwrite %rdx, %r9": (2 << 3 | 1 << 10 | 9 << 28, None),
    "vmwrite (%rsi), %rdi": (_MEMORY64 | _DS | _NO_INDEX | 6 << 23 | 7 << 28, 0),
    "invept (%rbx), %rcx": (_MEMORY64 | _DS | _NO_INDEX | 3 << 23 | 1 << 28, 0),
    "invvpid 16(%rdi), %r10": (_MEMORY64 | _DS | _NO_INDEX | 7 << 23 | 10 << 28, 16),
}
"""Instruction -> information, displacement in the qualification (None: no memory operand)."""
SCALE, INDEX, BASE = 3, 0xF << 18, 0xF << 23
REGISTER_FORM: Final = 1 << 10


def _defined(text: str, information: int) -> int:
    """The information without the bits that the manual leaves undefined for it."""
    if text.startswith(("vmread", "vmwrite")) and information & REGISTER_FORM:
        return information & (0xF << 3 | REGISTER_FORM | 0xF << 28)
    defined = _MEMORY64 | 1 << 9 | 7 << 7 | 7 << 15 | _NO_INDEX | _NO_BASE
    defined |= 0 if information & _NO_INDEX else INDEX | SCALE
    defined |= 0 if information & _NO_BASE else BASE
    if text.startswith(("vmread", "vmwrite")):
        defined |= REGISTER_FORM
    if text.startswith(("vmread", "vmwrite", "inv")):
        defined |= 0xF << 28
    return information & defined


@guest_test("SDM: Information for VM Exits Due to Instruction Execution",
            "SDM: Exit Qualification for Some Instruction Execution")  # fmt: skip
def an_instruction_of_l2_tells_its_operand(lab: VmxLab) -> None:
    """The instruction information has registers, scale, segment; the qualification displacement."""
    have = tuple(text.split()[0] for text in _instructions(lab))
    informations, displacements = {}, {}
    for text, (_, displacement) in OPERANDS.items():
        if text.split()[0] in have:
            run = lab.run(text, None, {"rbx": lab.places.data, "rdx": 0})
            informations[text] = _defined(text, run[F.EXIT_INSTRUCTION_INFORMATION])
            if displacement is not None:
                displacements[text] = run.qualification
    each("the instruction information of", dict(informations),
         lambda text: _defined(text, OPERANDS[text][0]))  # fmt: skip
    each("the displacement of", dict(displacements), lambda text: OPERANDS[text][1])


@guest_test("SDM: Exit Qualification for Some Instruction Execution")
def a_rip_relative_displacement_is_the_whole_address(lab: VmxLab) -> None:
    """For RIP-relative addressing the qualification is the sum of displacement and next RIP."""
    run = lab.run("vmclear 0x100(%rip)")
    run.exits_with(ExitReason.VMCLEAR, lab.places.code + run.length + 0x100)
    true("there is no base register", run[F.EXIT_INSTRUCTION_INFORMATION] & _NO_BASE)
