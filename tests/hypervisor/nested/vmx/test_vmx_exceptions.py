"""The exception bitmap, page-fault mask and match, software exceptions, debug exceptions, faults
in delivery, and injection of each type."""

import pytest
from vmx_lab import CODE, GDT, IDT, STACK, VALID, event

from undervisor.arch.vmx.exits import ExitReason as R
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.conformance.lab import gate
from undervisor.guest.asm import assemble

EXTERNAL, NMI, HARDWARE, SOFTWARE, PRIVILEGED, SOFTWARE_EXCEPTION, OTHER = 0, 2, 3, 4, 5, 6, 7
TS = 8
RF = 1 << 16

# source, vector, error code, and fields it needs
FAULTS = [
    ("xor %ecx, %ecx; div %ecx", 0, None, {}),
    ("ud2", 6, None, {}),
    ("fnop", 7, None, "ts"),
    ("mov $0x58, %eax; mov %eax, %fs", 13, 0x58, {}),
    ("mov $0x48, %eax; mov %eax, %ss", 13, 0x48, {}),
    ("movl $1, 0(%rbx)", 14, 2, "absent"),
    ("movb (%rbx), %al", 14, 0, "absent"),
    ("mov $0x48, %eax; mov %eax, %ds", 11, 0x48, "data"),
    ("mov $0x48, %eax; mov %eax, %ss", 12, 0x48, "data"),
]


def needs(lab, kind):
    if kind == "ts":
        return {F.GUEST_CR0: lab.fields[F.GUEST_CR0] | TS}, {}
    if kind == "absent":
        return {}, {"rbx": 1 << 40}
    absent = 0x00CF13000000FFFF if kind == "data" else 0
    lab.write_u64(GDT + 0x48, absent)
    return {}, {}


@pytest.mark.parametrize("row", FAULTS, ids=[r[0] for r in FAULTS])
def test_an_exception_exits_exactly_if_its_bit_is_set(lab, row):
    source, vector, code, kind = row
    changes, registers = needs(lab, kind)
    run = lab.run(source, changes | {F.EXCEPTION_BITMAP: 0xFFFFFFFF & ~(1 << vector)}, registers)
    assert run.vector == vector
    if code is not None:
        assert lab.read_u64(run[F.GUEST_RSP]) == code
    run = lab.run(source, changes | {F.EXCEPTION_BITMAP: 1 << vector}, registers)
    assert run.intercepted == vector
    assert run[F.EXIT_INTERRUPTION_INFORMATION] == event(
        vector, HARDWARE, error_code=code is not None
    )
    assert run[F.EXIT_INTERRUPTION_ERROR_CODE] == (code or 0)
    assert run.rip == CODE + source_length(source)
    assert run[F.GUEST_RFLAGS] & RF
    assert run[F.IDT_VECTORING_INFORMATION] & VALID == 0
    assert run[F.GUEST_RSP] == STACK
    assert run.qualification == (registers["rbx"] if vector == 14 else 0)


def source_length(source):
    """Where the last instruction of a source begins."""
    before = source.rsplit(";", 1)
    return len(assemble(before[0]).bytes) if len(before) == 2 else 0


def test_a_page_fault_that_exits_leaves_cr2_alone(lab):
    lab.l1.write_cr(2, 0x5555)
    lab.run("mov (%rbx), %al", {F.EXCEPTION_BITMAP: 1 << 14}, {"rbx": 1 << 40})
    assert lab.l1.read_cr(2).value == 0x5555
    lab.run("mov (%rbx), %al", None, {"rbx": 1 << 40})
    assert lab.l1.read_cr(2).value == 1 << 40


@pytest.mark.parametrize("bit", [0, 1])
@pytest.mark.parametrize(
    ("mask", "match", "equal"),
    [
        (0, 0, True),
        (0, 1, False),
        (2, 2, True),
        (2, 0, False),
        (0xFFFFFFFF, 2, True),
        (1, 1, False),
    ],
)
def test_the_page_fault_mask_and_match_invert_the_bitmap(lab, bit, mask, match, equal):
    """A write to an absent page: error code 2."""
    changes = {
        F.EXCEPTION_BITMAP: bit << 14,
        F.PAGE_FAULT_ERROR_CODE_MASK: mask,
        F.PAGE_FAULT_ERROR_CODE_MATCH: match,
    }
    run = lab.run("movb $1, (%rbx)", changes, {"rbx": 1 << 40})
    if equal == bool(bit):
        assert (run.intercepted, run.qualification) == (14, 1 << 40)
    else:
        assert run.vector == 14


def test_a_general_protection_fault_of_an_instruction_that_l0_emulates_can_exit(lab):
    changes = {F.EXCEPTION_BITMAP: 1 << 13} | lab.primary(use_msr_bitmaps=1)
    for source in ("mov $0x1ff0, %ecx; rdmsr", "mov $1, %eax; mov %rax, %cr0", "mov %rbx, %cr8"):
        run = lab.run(source, changes, {"rbx": 16})
        assert run.intercepted == 13, source
        assert run[F.EXIT_INTERRUPTION_ERROR_CODE] == 0
        assert run.rip == CODE + source_length(source)


# -- software exceptions and interrupts ------------------------------------------------------------


def test_int3_is_a_software_exception(lab):
    run = lab.run("nop; int3", {F.EXCEPTION_BITMAP: 1 << 3})
    assert run[F.EXIT_INTERRUPTION_INFORMATION] == event(3, SOFTWARE_EXCEPTION)
    assert (run.rip, run.length) == (CODE + 1, 1)
    assert not run[F.GUEST_RFLAGS] & RF
    run = lab.run("nop; int3", {F.EXCEPTION_BITMAP: 0xFFFFFFF7})
    assert run.vector == 3
    assert lab.read_u64(run[F.GUEST_RSP]) == CODE + 2


@pytest.mark.parametrize("number", [3, 4, 1, 13, 14, 0x30])
def test_int_n_is_no_exception(lab, number):
    run = lab.run(f".byte 0xcd, {number}", {F.EXCEPTION_BITMAP: 0xFFFFFFFF})
    assert run.vector == number
    assert lab.read_u64(run[F.GUEST_RSP]) == CODE + 2


def test_icebp_is_a_privileged_software_exception(lab):
    run = lab.run(".byte 0xf1", {F.EXCEPTION_BITMAP: 2})
    assert run[F.EXIT_INTERRUPTION_INFORMATION] == event(1, PRIVILEGED)
    assert (run.rip, run.length) == (CODE, 1)
    run = lab.run(".byte 0xf1", {F.EXCEPTION_BITMAP: 0xFFFFFFFD})
    assert run.vector == 1
    assert lab.read_u64(run[F.GUEST_RSP]) == CODE + 1


def test_int_n_of_ring_3_needs_the_gates_privilege(lab):
    lab.write(IDT + 16 * 0x31, gate(lab.stub(0x31), dpl=0))
    source = "push $DS3; push $USER_STACK + 0xff0; pushfq; push $CS3; push $1f; iretq; 1: int $0x31"
    run = lab.run(source, {F.GUEST_CR3: lab.pages()})
    assert run.vector == 13
    assert lab.read_u64(run[F.GUEST_RSP]) == 0x31 << 3 | 2


# -- debug exceptions ------------------------------------------------------------------------------


def test_a_single_step_is_told_in_the_qualification_and_not_in_dr6(lab):
    lab.l1.write_dr(6, 0)
    source = "pushfq; orl $0x100, (%rsp); popfq; nop; nop"
    run = lab.run(source, {F.EXCEPTION_BITMAP: 2})
    assert run.intercepted == 1
    assert run.qualification == 1 << 14
    assert lab.l1.read_dr(6).value == 0xFFFF0FF0
    at = len(assemble("pushfq; orl $0x100, (%rsp); popfq; nop").bytes)
    assert run.rip == CODE + at
    run = lab.run(source)
    assert run.vector == 1
    assert lab.l1.read_dr(6).value >> 14 & 1
    lab.l1.write_dr(6, 0)


def test_a_single_step_over_an_instruction_that_l0_emulates(lab):
    source = "pushfq; orl $0x100, (%rsp); popfq; mov %cr0, %rax; nop"
    for changes in ({}, {F.CR0_GUEST_HOST_MASK: 1}):
        run = lab.run(source, changes | {F.EXCEPTION_BITMAP: 2})
        assert (run.intercepted, run.qualification) == (1, 1 << 14)
        at = len(assemble("pushfq; orl $0x100, (%rsp); popfq; mov %cr0, %rax").bytes)
        assert run.rip == CODE + at


def test_general_detect_is_told_too(lab):
    changes = lab.on_entry(load_debug_controls=1) | {F.GUEST_DR7: 0x2400, F.EXCEPTION_BITMAP: 2}
    run = lab.run("mov %db0, %rax", changes)
    assert (run.intercepted, run.qualification) == (1, 1 << 13)
    assert run.rip == CODE


# -- faults in delivery ----------------------------------------------------------------------------


def broken_gate(lab, *vectors):
    for vector in vectors:
        lab.write(IDT + 16 * vector, bytes(16))


@pytest.fixture(autouse=True)
def _whole(lab):
    yield
    for vector in range(256):
        lab.write(IDT + 16 * vector, gate(lab.stub(vector), dpl=3))


def test_a_fault_in_delivery_tells_the_first_event(lab):
    broken_gate(lab, 6)
    run = lab.run("ud2", {F.EXCEPTION_BITMAP: 1 << 13})
    assert run.intercepted == 13
    assert run[F.EXIT_INTERRUPTION_ERROR_CODE] == 6 << 3 | 3
    assert run[F.IDT_VECTORING_INFORMATION] == event(6, HARDWARE)
    assert run.rip == CODE


def test_a_double_fault_exits_if_its_bit_is_set(lab):
    broken_gate(lab, 0, 13)
    run = lab.run("xor %ecx, %ecx; div %ecx", {F.EXCEPTION_BITMAP: 1 << 8})
    assert run.intercepted == 8
    assert run[F.EXIT_INTERRUPTION_INFORMATION] == event(8, HARDWARE, error_code=True)
    assert run[F.EXIT_INTERRUPTION_ERROR_CODE] == 0
    assert not run[F.IDT_VECTORING_INFORMATION] & VALID
    run = lab.run("xor %ecx, %ecx; div %ecx")
    assert run.vector == 8


def test_the_second_exception_may_exit_before_it_is_a_double_fault(lab):
    broken_gate(lab, 0, 13)
    run = lab.run("xor %ecx, %ecx; div %ecx", {F.EXCEPTION_BITMAP: 1 << 13 | 1 << 8})
    assert run.intercepted == 13
    assert run[F.IDT_VECTORING_INFORMATION] == event(0, HARDWARE)


def test_a_triple_fault_exits(lab):
    broken_gate(lab, 0, 13, 8)
    run = lab.run("xor %ecx, %ecx; div %ecx")
    assert run.reason is R.TRIPLE_FAULT
    assert run.qualification == 0
    assert lab.run("cpuid").reason is R.CPUID


def test_a_page_fault_in_delivery_of_a_software_interrupt(lab):
    """The stack is not there: the vectoring information has INT n, and its length."""
    changes = {F.EXCEPTION_BITMAP: 1 << 14, F.GUEST_RSP: 1 << 40}
    run = lab.run("int $0x40", changes)
    assert run.intercepted == 14
    assert run[F.IDT_VECTORING_INFORMATION] == event(0x40, SOFTWARE)
    assert (run.rip, run.length) == (CODE, 2)
    again = {
        F.ENTRY_INTERRUPTION_INFORMATION: run[F.IDT_VECTORING_INFORMATION],
        F.ENTRY_INSTRUCTION_LENGTH: run.length,
        F.GUEST_RSP: STACK,
    }
    run = lab.resume(again)
    assert run.vector == 0x40
    assert lab.read_u64(run[F.GUEST_RSP]) == CODE + 2


# -- injection -------------------------------------------------------------------------------------

INJECTED = [
    (0x30, EXTERNAL, 0),
    (2, NMI, 0),
    *((v, HARDWARE, 0) for v in (0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16, 17, 18, 19)),
    (0x80, SOFTWARE, 2),
    (0x80, SOFTWARE, 0),
    (1, PRIVILEGED, 1),
    (3, SOFTWARE_EXCEPTION, 1),
    (4, SOFTWARE_EXCEPTION, 1),
]
CODES = (8, 10, 11, 12, 13, 14, 17)


@pytest.mark.parametrize(("vector", "kind", "length"), INJECTED)
def test_an_injected_event_is_delivered(lab, vector, kind, length):
    has_code = kind == HARDWARE and vector in CODES
    changes = {
        F.ENTRY_INTERRUPTION_INFORMATION: event(vector, kind, error_code=has_code),
        F.ENTRY_EXCEPTION_ERROR_CODE: 0x38,
        F.ENTRY_INSTRUCTION_LENGTH: length,
        F.EXCEPTION_BITMAP: 0xFFFFFFFF,
        F.GUEST_RFLAGS: 0x202,
    }
    run = lab.run("nop; nop; hlt", changes)
    assert run.vector == vector
    assert run[F.ENTRY_INTERRUPTION_INFORMATION] & VALID == 0
    frame = run[F.GUEST_RSP]
    if has_code:
        assert lab.read_u64(frame) == 0x38
        frame += 8
    assert lab.read_u64(frame) == CODE + length
    assert lab.read_u64(frame + 24) == STACK
    if kind != HARDWARE or vector in (1, 2):
        assert not lab.read_u64(frame + 16) & RF
    run = lab.resume({F.GUEST_RIP: run.rip + 3, F.GUEST_RSP: frame})
    assert run.reason is R.HLT
    assert run.rip == CODE + 2


def test_cr2_is_l1s_to_set_when_it_injects_a_page_fault(lab):
    lab.l1.write_cr(2, 0x123000)
    changes = {
        F.ENTRY_INTERRUPTION_INFORMATION: event(14, HARDWARE, error_code=True),
        F.ENTRY_EXCEPTION_ERROR_CODE: 2,
    }
    run = lab.run("nop", changes)
    assert run.vector == 14
    assert lab.l1.read_cr(2).value == 0x123000


def test_an_injected_event_ends_the_halt_state(lab):
    changes = {F.GUEST_ACTIVITY_STATE: 1, F.ENTRY_INTERRUPTION_INFORMATION: event(0x30, EXTERNAL)}
    run = lab.run("nop", changes | {F.GUEST_RFLAGS: 0x202})
    assert run.vector == 0x30
    assert run[F.GUEST_ACTIVITY_STATE] == 0


def test_an_injected_exception_whose_delivery_faults_becomes_a_double_fault(lab):
    broken_gate(lab, 13, 10)
    changes = {
        F.ENTRY_INTERRUPTION_INFORMATION: event(13, HARDWARE, error_code=True),
        F.EXCEPTION_BITMAP: 1 << 8,
    }
    run = lab.run("nop", changes)
    assert run.intercepted == 8
    changes[F.EXCEPTION_BITMAP] = 1 << 13
    run = lab.run("nop", changes)
    assert run.intercepted == 13
    assert run[F.IDT_VECTORING_INFORMATION] == event(13, HARDWARE, error_code=True)


def test_a_pending_debug_exception_is_delivered_after_entry(lab):
    pending = {F.GUEST_PENDING_DEBUG_EXCEPTIONS: 1 << 14 | 1 << 12, F.GUEST_RFLAGS: 0x102}
    run = lab.run("nop; nop", pending | {F.EXCEPTION_BITMAP: 2})
    assert (run.intercepted, run.rip) == (1, CODE)
    assert run.qualification & 1 << 14
