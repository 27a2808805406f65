"""Intercepts of exceptions: every vector that L2 can raise, both ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from undervisor.arch.svm.exits import ExitCode, exception_exit
from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.svm.vmcb import VmcbField as F
from undervisor.arch.x86.events import Vector
from undervisor.conformance.expect import each, equal
from undervisor.conformance.suite import guest_test
from undervisor.conformance.svm import modes
from undervisor.conformance.svm.lab import SvmLab
from undervisor.conformance.svm.needs import feature
from undervisor.conformance.svm.run import Run

FAR: Final = 0x123456789000
"""An address that L2's page tables do not map."""


@dataclass(frozen=True, slots=True)
class Case:
    """Code that raises `vector` at its last instruction; `behind`: a trap, RIP is behind it."""

    vector: Vector
    text: str
    setup: str = ""
    error_code: int | None = None
    address: int = 0


CASES: Final = (
    Case(Vector.DE, "div %ecx", "xor %ecx, %ecx; xor %edx, %edx"),
    Case(Vector.BP, "int3"),
    Case(Vector.UD, "ud2"),
    Case(Vector.NM, "fninit", "mov %cr0, %rax; or $8, %eax; mov %rax, %cr0"),
    Case(Vector.NP, "mov %eax, %ds",
         "movb $0x13, GDT + 0x2d; mov $DS16, %eax", error_code=0x28),
    Case(Vector.SS, "mov %eax, %ss", "movb $0x13, GDT + 0x2d; mov $DS16, %eax", error_code=0x28),
    Case(Vector.GP, "mov %eax, %ds", "mov $0x1238, %eax", error_code=0x1238),
    Case(Vector.GP, "mov (%rbx), %eax", "mov $1 << 63, %rbx", error_code=0),
    Case(Vector.PF, "mov 8(%rbx), %eax", f"mov ${FAR}, %rbx", error_code=0, address=FAR + 8),
    Case(Vector.PF, "mov %eax, 8(%rbx)", f"mov ${FAR}, %rbx", error_code=2, address=FAR + 8),
    Case(Vector.MF, "fwait", "fninit; push $0x340; fldcw (%rsp); fldz; fld1; fdivp"),
)  # fmt: skip


def _place(lab: SvmLab, case: Case) -> int:
    """Put the code in place and mend what an earlier case broke; where the last instruction is."""
    lab.write_u64(lab.places.gdt + 0x28, 0x000093000000FFFF)
    at = lab.places.code
    if case.setup:
        at += len(lab.assemble(case.setup + "\n7:", at))
    lab.code(f"{case.setup}\n{case.text}")
    return at


def _name(case: Case) -> str:
    return f"#{case.vector.name} of {case.text}"


@guest_test("APM: Exception Intercepts", "APM: State Saved on Exit")
def an_intercepted_exception_exits_at_its_instruction(lab: SvmLab) -> None:
    """Each exception exits by its bit, RIP at the instruction, EXITINFO1 its error code."""
    got, wanted = {}, {}
    for case in CASES:
        at = _place(lab, case)
        run = lab.run(None, wants=[Intercept(Intercept.EXCP_DE + case.vector)])
        got[_name(case)] = (run.code, run.rip, run.info1 if case.error_code is not None else None)
        wanted[_name(case)] = (exception_exit(case.vector), at, case.error_code)
        equal(f"EXITINTINFO.V at {_name(case)}", run[F.EXITINTINFO] >> 31 & 1, 0)
    each("exit, RIP and error code", got, lambda name: wanted[name])


@guest_test("APM: Exception Intercepts", "APM: #PF (Page Fault)")
def an_intercepted_page_fault_leaves_cr2(lab: SvmLab) -> None:
    """EXITINFO2 of an intercepted #PF is the faulting address; CR2 does not change."""
    for case in CASES:
        if case.vector is Vector.PF:
            _place(lab, case)
            run = lab.run(None, {F.CR2: 0x5555}, wants=[Intercept.EXCP_PF])
            run.exits_with(ExitCode.EXCP_PF, case.error_code, case.address)
            equal("CR2", run[F.CR2], 0x5555)


def _frame(lab: SvmLab, run: Run) -> tuple[int, ...]:
    """What the delivery pushed: RIP, CS, RFLAGS, RSP and SS above RSP, an error code below."""
    data = lab.read(run[F.RSP], 48)
    return tuple(int.from_bytes(data[at : at + 8], "little") for at in range(0, 48, 8))


@guest_test("APM: Exception Intercepts", "APM: Exceptions and Interrupts")
def an_exception_that_is_not_intercepted_is_l2s(lab: SvmLab) -> None:
    """With every other exception intercepted, L2's own handler gets this one, its frame right."""
    got, wanted = {}, {}
    for case in CASES:
        at = _place(lab, case)
        others = [Intercept.EXCP_DE + v for v in range(32) if v not in (case.vector, 2)]
        run = lab.run(None, wants=[Intercept(other) for other in others])
        run.delivers(case.vector)
        frame = _frame(lab, run)
        error = frame[0] if case.error_code is not None else None
        frame = frame[1:] if case.error_code is not None else frame
        behind = 1 if case.vector is Vector.BP else 0
        got[_name(case)] = (error, frame[0], frame[1])
        wanted[_name(case)] = (case.error_code, at + behind, lab.vmcb.cs_selector)
        if case.vector is Vector.PF:
            equal("CR2 in L2's handler", run[F.CR2], case.address)
    each("error code, RIP and CS of the frame", got, lambda name: wanted[name])


@guest_test("APM: State Saved on Exit", needs=[feature("nrips")])
def a_fault_has_no_next_rip(lab: SvmLab) -> None:
    """nRIP is that of the instruction for #BP by INT3, and 0 for exceptions that are faults."""
    got = {}
    for case in CASES:
        if case.vector in (Vector.BP, Vector.UD, Vector.GP):
            at = _place(lab, case)
            run = lab.run(None, wants=[Intercept(Intercept.EXCP_DE + case.vector)])
            got[_name(case)] = run[F.NRIP] - (at if case.vector is Vector.BP else 0)
    each("nRIP", got, lambda name: 1 if "#BP" in name else 0)


@guest_test("APM: Exception Intercepts")
def legacy_exceptions_exit_too(lab: SvmLab) -> None:
    """INTO and BOUND in 32-bit code exit as #OF and #BR."""
    begin = modes.compatibility()
    lab.write_u32(lab.places.data, 5, 9)
    lab.code(".code32\nmov $0x7fffffff, %eax; inc %eax; into")
    run = lab.run(None, begin, wants=[Intercept.EXCP_OF])
    run.exits_with(ExitCode.EXCP_OF)
    lab.code(f".code32\nmov $1, %eax; bound %eax, {lab.places.data}")
    lab.run(None, begin, wants=[Intercept.EXCP_BR]).exits_with(ExitCode.EXCP_BR)


@guest_test("APM: Exception Intercepts", "APM: Debug Exception")
def a_single_step_exits_behind_its_instruction(lab: SvmLab) -> None:
    """With RFLAGS.TF L2 exits with #DB behind its first instruction, and DR6.BS is set."""
    for name, code in (("NOP", "nop"), ("CPUID", "cpuid"), ("RDMSR", "rdmsr")):
        length = len(lab.assemble(code))
        registers = {"rcx": 0xC0000080}
        run = lab.run(f"{code}; nop", {F.RFLAGS: 0x102}, registers, wants=[Intercept.EXCP_DB])
        run.exits_with(ExitCode.EXCP_DB)
        equal(f"RIP behind {name}", run.rip, lab.places.code + length)
        equal(f"DR6.BS behind {name}", run[F.DR6] >> 14 & 1, 1)


@guest_test("APM: Exception Intercepts", "APM: Debug Exception")
def a_single_step_that_is_not_intercepted_is_l2s(lab: SvmLab) -> None:
    """Without the intercept L2's handler of #DB runs, TF clear, and L1 sees no step."""
    run = lab.run("nop; nop", {F.RFLAGS: 0x102})
    run.delivers(Vector.DB)
    equal("RFLAGS.TF in the handler", run[F.RFLAGS] >> 8 & 1, 0)
    equal("the RIP that is pushed", _frame(lab, run)[0], lab.places.code + 1)
    lab.run("nop; nop; nop").ends()


@guest_test("APM: Exception Intercepts", "APM: Instruction Intercepts")
def an_instructions_exceptions_come_before_most_intercepts(lab: SvmLab) -> None:
    """The exceptions that need no memory come before an intercept, those of memory behind it."""
    run = lab.run(f"mov ${FAR}, %rbx; lidt (%rbx)", wants=[Intercept.IDTR_WRITE, Intercept.EXCP_PF])
    run.exits_with(ExitCode.IDTR_WRITE)
    lab.run(f"mov ${FAR}, %rbx; lidt (%rbx)", wants=[Intercept.EXCP_PF]).exits_with(
        ExitCode.EXCP_PF
    )


@guest_test("APM: Instruction Intercepts", "APM: Exception Intercepts")
def icebp_is_not_the_debug_exception_to_the_intercepts(lab: SvmLab) -> None:
    """ICEBP exits by its own intercept only: that of #DB does not see its #DB, which L2 gets."""
    code = ".byte 0xf1"
    wants = [Intercept.ICEBP, Intercept.EXCP_DB]
    lab.run(code, wants=wants).exits_with(ExitCode.ICEBP)
    for others in ([Intercept.EXCP_DB], []):
        run = lab.run(code, wants=others)
        run.delivers(Vector.DB)
        equal("the RIP that is pushed", lab.read_u64(run[F.RSP]), lab.places.code + 1)


@guest_test("APM: Exception Intercepts")
def l1_can_reflect_an_exception(lab: SvmLab) -> None:
    """L1 takes an exception and injects it again: L2's handler runs as if nothing had been."""
    run = lab.run("ud2", wants=[Intercept.EXCP_UD])
    run.exits_with(ExitCode.EXCP_UD)
    run = lab.resume({F.EVENTINJ: 1 << 31 | 3 << 8 | Vector.UD})
    run.delivers(Vector.UD)
    equal("the RIP that is pushed", _frame(lab, run)[0], lab.places.code)
