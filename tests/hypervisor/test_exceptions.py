"""Exceptions of L1: delivered by the silicon, in all their kinds, up to the triple fault."""

import struct

import pytest
from small_guests import (
    IDT,
    IST_STACK,
    KERNEL_STACK,
    PDPT,
    RESUME,
    TASK,
    TO_USER,
    TSS,
    in_ring_3,
    run,
    run16,
    run32,
    set_gate,
)

from undervisor.hypervisor.verdict import Ending

ABSENT = "movabs rsi, 0x8000000000;"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("xor ecx, ecx; div ecx", (0, 0)),
        ("ud2", (6, 0)),
        ("mov rax, cr0; or eax, 8; mov cr0, rax; fld1", (7, 0)),
        ("mov eax, 0x58; mov ds, eax", (13, 0x58)),
        (f"mov eax, {TASK}; mov ds, eax", (13, TASK)),
        ("movabs rsi, 0x800000000000; mov eax, [rsi]", (13, 0)),
        (ABSENT + "mov eax, [rsi]", (14, 0)),
        (ABSENT + "mov [rsi], eax", (14, 2)),
        (ABSENT + "jmp rsi", (14, 0x10)),
        ("int 0x40", (0x40, 0)),
    ],
)
@pytest.mark.parametrize("cpu", ["intel", "amd"])
def test_a_fault_arrives_with_its_error_code(cpu, text, fault):
    assert run(text, cpu).faults == [fault]


def test_an_int3_is_a_trap():
    result = run("int3; after: nop")
    assert result.faults == [(3, 0)]
    assert result.events[0].rip == result.labels["after"]


def test_a_page_fault_of_ring_3_says_so_and_switches_the_stack():
    result = in_ring_3(ABSENT + "mov [rsi], eax", iopl=3)
    event = result.events[0]
    assert event.fault == (14, 6)
    assert event.cr2 == 0x8000000000
    assert event.cs & 3 == 3
    assert event.rsp == 0x78000


def test_an_interrupt_gate_of_ring_0_is_not_for_int_n_in_ring_3():
    def prepare(machine, labels):
        entry = bytearray(machine.memory.read(IDT + 16 * 0x40, 16))
        entry[5] &= ~0x60
        machine.memory.write(IDT + 16 * 0x40, bytes(entry))

    result = run(TO_USER % "0x3002" + "int 0x40", prepare=prepare)
    assert result.faults == [(13, 0x40 << 3 | 2)]


def test_a_gate_with_an_ist_uses_its_stack():
    def prepare(machine, labels):
        set_gate(machine, 6, labels["handler"], ist=1)

    assert run("ud2; handler: mov rbx, rsp", prepare=prepare).rbx == IST_STACK - 40


@pytest.mark.parametrize("vector", [13, 14])
def test_a_fault_in_the_delivery_of_a_fault_is_a_double_fault(vector):
    def prepare(machine, labels):
        set_gate(machine, vector, 0, present=False)  # delivery gives #NP, contributory

    text = "mov eax, 0x58; mov ds, eax" if vector == 13 else ABSENT + "mov eax, [rsi]"
    result = run(text, prepare=prepare)
    assert result.faults == [(8, 0)]


def test_a_fault_in_the_delivery_of_a_benign_one_is_delivered_itself():
    def prepare(machine, labels):
        set_gate(machine, 6, 0, present=False)

    assert run("ud2", prepare=prepare).faults == [(11, 6 << 3 | 3)]


def test_a_fault_in_the_delivery_of_a_double_fault_is_a_triple_fault():
    def prepare(machine, labels):
        set_gate(machine, 13, 0, present=False)
        set_gate(machine, 8, 0, present=False)

    outcome = run("mov eax, 0x58; here: mov ds, eax", prepare=prepare).outcome
    assert outcome.ending is Ending.TRIPLE_FAULT
    assert "L1 on vCPU 0" in outcome.text
    assert "rip" in outcome.text


def test_no_idt_at_all_is_a_triple_fault():
    assert run32("ud2").outcome.ending is Ending.TRIPLE_FAULT
    text = "lidt [none]; ud2; none: .word 0; .quad 0"
    assert run(text).outcome.ending is Ending.TRIPLE_FAULT


def test_a_fault_that_l0_injects_combines_as_well():
    """#GP of WRMSR is L0's; its gate is absent, and so is the double fault's."""

    def prepare(machine, labels):
        set_gate(machine, 13, 0, present=False)

    assert run("mov ecx, 0x12345; wrmsr", prepare=prepare).faults == [(8, 0)]

    def prepare_worse(machine, labels):
        prepare(machine, labels)
        set_gate(machine, 8, 0, present=False)

    outcome = run("mov ecx, 0x12345; wrmsr", prepare=prepare_worse).outcome
    assert outcome.ending is Ending.TRIPLE_FAULT


def test_a_page_fault_in_delivery_on_a_bad_stack_is_a_double_fault():
    def prepare(machine, labels):
        set_gate(machine, 8, labels["handler"], ist=1)

    text = "movabs rsp, 0x8000000100; mov eax, [rsp]; handler: mov ebx, 8"
    assert run(text, prepare=prepare).rbx == 8


def test_single_step_traps_after_each_instruction():
    text = "pushfq; or dword ptr [rsp], 0x100; popfq; nop; after: nop"
    result = run(text)
    assert result.faults == [(1, 0)]
    assert result.events[0].rip == result.labels["after"]
    assert result.vcpu.state.dr6 & 0x4000


@pytest.mark.parametrize(
    "text",
    [
        "cpuid",
        "rdtsc",
        "mov ecx, 0x10; nop",
        "in al, 0x61",
        "mov rax, cr8",
        "mov dr0, rax",
        "pause",
    ],
)
def test_single_step_over_an_instruction_that_exits(text):
    steps = text.split(";")
    body = ";".join(f"{step}; s{i}: nop" for i, step in enumerate(steps))
    result = run("mov eax, 1; pushfq; or dword ptr [rsp], 0x100; popfq;" + body)
    assert result.faults == [(1, 0)]
    assert result.events[0].rip == result.labels["s0"]


def test_single_step_over_an_instruction_that_faults_in_l0_has_the_fault_first():
    result = run("mov ecx, 0x12345; pushfq; or dword ptr [rsp], 0x100; popfq; here: rdmsr")
    assert result.faults == [(13, 0)]
    assert result.events[0].rip == result.labels["here"]
    assert result.events[0].rflags & 0x100


def test_a_handler_that_returns_lets_the_guest_go_on():
    text = f"mov rax, offset next; mov [{RESUME:#x}], rax; mov ebx, 5; ud2; next: inc ebx"
    result = run(text)
    assert result.faults == [(6, 0)]
    assert result.rbx == 6


def test_many_faults_in_a_row_stay_what_they_are():
    """The second page fault of a run is no double fault."""
    text = f"""
     mov rax, offset next
     mov [{RESUME:#x}], rax
     movabs rsi, 0x8000000000
     xor ebx, ebx
    again: mov eax, [rsi]
    next: inc ebx
     cmp ebx, 100
     jb again
    """
    result = run(text)
    assert result.faults == [(14, 0)] * 100


def test_the_accessed_and_dirty_flags_are_set():
    page = PDPT + 8 * 3
    text = f"mov esi, 0xfec00000; mov eax, [rsi]; mov r8, [{page:#x}]; mov [rsi], eax;"
    result = run(text + f"mov r9, [{page:#x}]")
    assert (result.r8 & 0x60, result.r9 & 0x60) == (0x20, 0x60)


def test_real_mode_interrupts_go_through_the_vector_table():
    text = (
        "mov word ptr [0x21*4], offset handler; mov word ptr [0x21*4+2], 0; mov bx, 1; int 0x21;"
        "inc bx; jmp over; handler: add bx, 10; iret; over:"
    )
    assert run16(text).rbx & 0xFFFF == 12


def test_a_division_error_in_real_mode_returns_to_the_division():
    text = (
        "mov word ptr [0], offset handler; mov word ptr [2], 0; xor cx, cx; mov ax, 7; cwd;"
        "here: div cx; jmp over; handler: pop bx; push bx; mov cx, 1; iret;"
        "over: mov si, offset here"
    )
    result = run16(text)
    assert result.rbx & 0xFFFF == result.rsi & 0xFFFF
    assert result.rax & 0xFFFF == 7


def test_a_ring_transition_with_a_busy_32_bit_tss_works():
    """TR as hardware holds it says busy; the emulator would abort the process over that."""
    text = """
     lgdt [gdtr]
     lidt [idtr]
     mov ax, 0x28
     ltr ax
     push 0x23
     push 0x78000
     push 0x2
     push 0x1b
     mov eax, offset user
     push eax
     iretd
    user: mov ebx, 3
     int 0x40
    handler: mov ecx, esp
     mov dx, cs
     mov esi, [esp + 12]
     jmp over
    gdtr: .word 47
     .long gdt
    idtr: .word 0x7ff
     .long 0x200000
    .balign 8
    gdt: .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
     .quad 0x00cffa000000ffff, 0x00cff2000000ffff, 0x0000890050000067
    over:
    """

    def prepare(machine, labels):
        target = labels["handler"]
        gate = target & 0xFFFF | 8 << 16 | 0xEE00 << 32 | (target >> 16) << 48
        machine.memory.set_u64(0x200000 + 8 * 0x40, gate)
        machine.memory.write(TSS + 4, struct.pack("<II", KERNEL_STACK - 0x1000, 0x10))

    result = run32(text, prepare=prepare)
    assert (result.rbx, result.rcx, result.rdx & 0xFFFF) == (3, KERNEL_STACK - 0x1000 - 20, 8)
    assert result.rsi == 0x78000
