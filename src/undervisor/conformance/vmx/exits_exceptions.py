"""L2's exceptions: the exception bitmap, the page-fault mask and match, what the exit tells."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Final

from undervisor.arch.vmx.controls import InterruptionType
from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.registers import Cr0, Cr4, Rflags
from undervisor.conformance.expect import each, equal, true
from undervisor.conformance.suite import guest_test
from undervisor.conformance.vmx.lab import Changes, VmxLab

VALID: Final = 1 << 31
HARDWARE: Final = InterruptionType.HARDWARE_EXCEPTION << 8
SOFTWARE: Final = InterruptionType.SOFTWARE_EXCEPTION << 8
ABSENT: Final = 1 << 33
"""A linear address that no page table maps."""
NOT_PRESENT: Final = 0x00CF13000000FFFF
"""A data segment that is not present, for the descriptor 48H."""
COMPATIBILITY: Final = "push $CS32; push $1f; lretq; 1: .code32; "


@dataclass(frozen=True, slots=True)
class Faulting:
    """Code whose last instruction causes an exception."""

    before: str
    instruction: str
    vector: int
    code: int | None = None
    changes: Changes = field(default_factory=dict)
    end: str = "vmcall"


def _faults(lab: VmxLab) -> list[Faulting]:
    lab.write_u64(lab.places.gdt + 0x48, NOT_PRESENT)
    ts: Changes = {F.GUEST_CR0: lab.fields[F.GUEST_CR0] | Cr0.ts}
    lab.write_u32(lab.places.data, 0x037B)  # x87: division by zero is not masked
    divide = f"mov ${lab.places.data}, %eax; fninit; fldcw (%rax); fld1; fldz; fdivrp"
    return [
        Faulting("xor %ecx, %ecx;", "div %ecx", 0),
        Faulting("", "ud2", 6),
        Faulting("", "fnop", 7, None, ts),
        Faulting("mov $0x48, %eax;", "mov %eax, %ds", 11, 0x48),
        Faulting("mov $0x48, %eax;", "mov %eax, %ss", 12, 0x48),
        Faulting("mov $0x58, %eax;", "mov %eax, %fs", 13, 0x58),
        Faulting("mov $0x4000000000000000, %rbx;", "mov (%rbx), %al", 13, 0),
        Faulting(f"movabs ${ABSENT}, %rbx;", "mov (%rbx), %al", 14, 0),
        Faulting(f"movabs ${ABSENT}, %rbx;", "movl $1, (%rbx)", 14, 2),
        Faulting(f"{divide};", "fwait", 16),
    ]


@guest_test("SDM: Exception Bitmap", "SDM: Information for VM Exits Due to Vectored Events")
def an_exception_whose_bit_is_1_exits_with_its_information(lab: VmxLab) -> None:
    """An exception exits if its bit is 1: vector, type, error code; RIP at the instruction.

    Nothing is delivered: the stack pointer is as it was, and RFLAGS.RF is saved as 1.
    """
    faults = _faults(lab)
    runs = lab.sweep([{**f.changes, F.EXCEPTION_BITMAP: 1 << f.vector} for f in faults],
                     sources=[f"{f.before} {f.instruction}" for f in faults])  # fmt: skip
    for fault, run in zip(faults, runs, strict=True):
        run.exits_with_exception(fault.vector, fault.code)
        begin = len(lab.assemble(fault.before, run.start)) if fault.before else 0
        what = f"{fault.instruction}: "
        equal(f"{what}the type", run[F.EXIT_INTERRUPTION_INFORMATION] & 0x700, HARDWARE)
        equal(f"{what}RIP and RSP", (run.rip, run[F.GUEST_RSP]),
              (run.start + begin, lab.places.stack))  # fmt: skip
        equal(f"{what}the IDT-vectoring valid bit", run[F.IDT_VECTORING_INFORMATION] & VALID, 0)
        true(f"{what}RF is saved as 1", run[F.GUEST_RFLAGS] & Rflags.rf)
        equal(f"{what}the qualification", run.qualification, ABSENT if fault.vector == 14 else 0)


@guest_test("SDM: Exception Bitmap")
def an_exception_whose_bit_is_0_is_delivered_to_l2(lab: VmxLab) -> None:
    """With only its own bit 0 an exception goes through L2's IDT, with its error code pushed."""
    faults = _faults(lab)
    masks: list[Changes] = [
        {**f.changes, F.EXCEPTION_BITMAP: 0xFFFF_FFFF & ~(1 << f.vector),
         F.PAGE_FAULT_ERROR_CODE_MASK: 0, F.PAGE_FAULT_ERROR_CODE_MATCH: 0} for f in faults
    ]  # fmt: skip
    for fault, changes in zip(faults, masks, strict=True):
        run = lab.run(f"{fault.before} {fault.instruction}", changes)
        run.delivers(fault.vector)
        if fault.code is not None:
            equal(f"the error code that {fault.instruction} pushed",
                  lab.read_u64(run[F.GUEST_RSP]), fault.code)  # fmt: skip


@guest_test("SDM: Exception Bitmap")
def int3_and_into_are_exceptions_and_int_n_is_none(lab: VmxLab) -> None:
    """INT3 exits by bit 3 as a software exception with its length; INT n never exits by the bitmap.

    Nor does INT 3 in two bytes.
    """
    everything: Changes = {F.EXCEPTION_BITMAP: 0xFFFF_FFFF}
    run = lab.run("int3", everything)
    run.exits_with(ExitReason.EXCEPTION_OR_NMI)
    equal("information and length of INT3",
          (run[F.EXIT_INTERRUPTION_INFORMATION], run.length, run.rip),
          (VALID | SOFTWARE | 3, 1, lab.places.code))  # fmt: skip
    lab.run("int3", {F.EXCEPTION_BITMAP: ~(1 << 3) & 0xFFFF_FFFF}).delivers(3)
    lab.run(".byte 0xcd, 3", everything).delivers(3)
    for vector in (0, 6, 13, 14, 31, 0x80):
        lab.run(f"int ${vector}", everything).delivers(vector)
    into = COMPATIBILITY + "xor %eax, %eax; mov $0x80, %al; add $0x80, %al; mov $0x7f, %al;"
    run = lab.run(f"{into} inc %al; into; .code64; nop", everything)
    run.exits_with(ExitReason.EXCEPTION_OR_NMI)
    equal("information and length of INTO",
          (run[F.EXIT_INTERRUPTION_INFORMATION], run.length),
          (VALID | SOFTWARE | 4, 1))  # fmt: skip


@guest_test("SDM: Exception Bitmap", "SDM: Instructions That Cause VM Exits Conditionally")
def page_faults_go_by_mask_and_match_too(lab: VmxLab) -> None:
    """A page fault exits if bit 14 is 1 and (code AND mask) = match, or bit 14 is 0 and it is not.

    The error code here is 2: a write at CPL 0 to a page that is not present.
    """
    masks = ((0, 0), (0, 1), (2, 2), (2, 0), (1, 0), (1, 1), (7, 2), (7, 6), (0xFFFF_FFFF, 2),
             (0, 0xFFFF_FFFF))  # fmt: skip
    cases = list(product((0, 1), masks))
    lab.code("movl $1, (%rbx)")
    runs = lab.sweep(
        [
            {F.EXCEPTION_BITMAP: bit << 14, F.PAGE_FAULT_ERROR_CODE_MASK: mask,
             F.PAGE_FAULT_ERROR_CODE_MATCH: match}
            for bit, (mask, match) in cases
        ],
        registers={"rbx": ABSENT},
    )  # fmt: skip
    got = {case: run.reason == ExitReason.EXCEPTION_OR_NMI
           for case, run in zip(cases, runs, strict=True)}  # fmt: skip
    each("(bit 14, (mask, match)): whether it exits", dict(got),
         lambda case: bool(case[0]) == (2 & case[1][0] == case[1][1]))  # fmt: skip


@guest_test("SDM: Exit Qualification for Page-Fault Exceptions", "SDM: Saving Control Registers,"
            " Debug Registers, and MSRs")  # fmt: skip
def a_page_fault_that_exits_leaves_cr2_alone(lab: VmxLab) -> None:
    """A page fault that exits gives its address as qualification; delivery alone sets CR2."""
    lab.l1.write_cr(2, 0x5555)
    run = lab.run("mov (%rbx), %al", {F.EXCEPTION_BITMAP: 1 << 14}, {"rbx": ABSENT + 3})
    run.exits_with(ExitReason.EXCEPTION_OR_NMI, qualification=ABSENT + 3)
    equal("CR2 after the exit", lab.l1.read_cr(2).value, 0x5555)
    lab.run("mov (%rbx), %al", None, {"rbx": ABSENT + 3}).delivers(14)
    equal("CR2 after a delivery", lab.l1.read_cr(2).value, ABSENT + 3)


@guest_test("SDM: Exit Qualification for Debug Exceptions")
def a_debug_exception_that_exits_leaves_dr6_alone(lab: VmxLab) -> None:
    """A single step that exits tells BS in the qualification; DR6 is written at delivery only."""
    step: Changes = {F.GUEST_RFLAGS: 0x2 | Rflags.tf}
    with lab.batch() as batch:
        batch.write_dr(6, 0xFFFF0FF0)
    run = lab.run("nop; nop", step | {F.EXCEPTION_BITMAP: 1 << 1})
    run.exits_with(ExitReason.EXCEPTION_OR_NMI, qualification=1 << 14)
    equal("information and RIP", (run[F.EXIT_INTERRUPTION_INFORMATION], run.rip),
          (VALID | HARDWARE | 1, lab.places.code + 1))  # fmt: skip
    equal("DR6 after the exit", lab.l1.read_dr(6).value, 0xFFFF0FF0)
    lab.run("nop; nop", step).delivers(1)
    equal("DR6 after a delivery", lab.l1.read_dr(6).value, 0xFFFF4FF0)


@guest_test("SDM: Information for VM Exits Due to Vectored Events")
def int1_is_a_privileged_software_exception(lab: VmxLab) -> None:
    """INT1 exits by bit 1 with type 5 and its length."""
    run = lab.run(".byte 0xf1", {F.EXCEPTION_BITMAP: 1 << 1})
    run.exits_with(ExitReason.EXCEPTION_OR_NMI)
    equal("information and length", (run[F.EXIT_INTERRUPTION_INFORMATION], run.length),
          (VALID | InterruptionType.PRIVILEGED_SOFTWARE_EXCEPTION << 8 | 1, 1))  # fmt: skip


@guest_test("SDM: Exception Bitmap")
def general_detect_exits_as_a_debug_exception(lab: VmxLab) -> None:
    """MOV DR with DR7.GD = 1 causes #DB, which exits with BD in the qualification."""
    changes = lab.on_entry(load_debug_controls=1)
    changes |= {F.GUEST_DR7: 0x2400, F.EXCEPTION_BITMAP: 1 << 1}
    run = lab.run("mov %db0, %rax", lab.primary(changes, mov_dr_exiting=0))
    run.exits_with(ExitReason.EXCEPTION_OR_NMI, qualification=1 << 13)
    equal("RIP", run.rip, lab.places.code)


@guest_test("SDM: Triple Fault", "SDM: Other Causes of VM Exits")
def a_triple_fault_exits_and_a_double_fault_by_its_bit(lab: VmxLab) -> None:
    """A fault that L2 can deliver no more is a triple fault, reason 2; #DF exits by bit 8."""
    no_table: Changes = {F.GUEST_IDTR_LIMIT: 0}
    run = lab.run("ud2", no_table)
    run.exits_with(ExitReason.TRIPLE_FAULT, qualification=0)
    equal("the IDT-vectoring valid bit of a triple fault",
          run[F.IDT_VECTORING_INFORMATION] & VALID, 0)  # fmt: skip
    run = lab.run("ud2", no_table | {F.EXCEPTION_BITMAP: 1 << 8})
    run.exits_with_exception(8, 0)
    equal("the IDT-vectoring valid bit of a double fault",
          run[F.IDT_VECTORING_INFORMATION] & VALID, 0)  # fmt: skip


@guest_test("SDM: Exception Bitmap", "SDM: Control Registers")
def l1s_cr4_does_not_decide_for_l2(lab: VmxLab) -> None:
    """L2's own CR4 decides whether its RDTSC at CPL 3 faults."""
    user: Changes = {F.GUEST_CR3: lab.pages()}
    source = "push $DS3; push $USER_STACK; push $2; push $CS3; push $1f; iretq; 1: rdtsc"
    cr4 = lab.fields[F.GUEST_CR4]
    free = lab.primary(user, rdtsc_exiting=0)
    lab.run(source, free | {F.GUEST_CR4: cr4 | Cr4.tsd}).delivers(13)
    lab.run(source, free | {F.GUEST_CR4: cr4 & ~Cr4.tsd}).ends()
