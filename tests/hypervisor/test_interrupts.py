"""Interrupts of L1: the local APIC, shadows, NMI, INIT and SIPI, on one to eight processors."""

import threading

import pytest
from small_guests import DATA, KERNEL_STACK, build, run, set_gate

from undervisor.hypervisor.verdict import Ending, Outcome

SVR, EOI, ICR, ICR_HIGH, LVT_TIMER, INITIAL, DIVIDE = (
    0xFEE00000 + offset for offset in (0xF0, 0xB0, 0x300, 0x310, 0x320, 0x380, 0x3E0)
)
TIMER, OTHER = 0x50, 0x60
SELF = 0x40000


def write(register, value):
    return f"mov esi, {register:#x}; mov dword ptr [rsi], {value:#x};"


ON = write(SVR, 0x1FF) + write(DIVIDE, 0xB)
HANDLER = f"""
 jmp over
handler:
 push rsi
 inc r15
 mov r14, [rsp + 8]
 {write(EOI, 0)}
 pop rsi
 iretq
over:
"""


def arm(count, mode=0):
    return write(LVT_TIMER, mode << 17 | TIMER) + write(INITIAL, count)


def timed(text, **options):
    vectors = {TIMER: "handler", OTHER: "handler"}
    return run(HANDLER + "xor r15d, r15d;" + ON + text, vectors=vectors, **options)


@pytest.mark.parametrize("cpu", ["intel", "amd"])
def test_hlt_waits_for_the_timer(cpu):
    result = timed("rdtsc; mov r8, rax;" + arm(5_000_000) + "sti; hlt; rdtsc; mov r9, rax", cpu=cpu)
    assert result.r15 == 1
    assert 5_000_000 <= result.r9 - result.r8 < 5_100_000


def test_the_timer_interrupts_a_loop():
    result = timed(arm(100_000) + "sti; 1: test r15d, r15d; jz 1b")
    assert result.r15 == 1


def test_a_timer_without_if_waits_for_sti_and_the_shadow_of_sti():
    result = timed(
        arm(10_000) + "mov ecx, 10000; 1: loop 1b; mov r13, r15; sti; nop; here: nop; cli"
    )
    assert (result.r13, result.r15) == (0, 1)
    assert result.r14 == result.labels["here"]


def test_cli_right_after_sti_lets_no_interrupt_in():
    result = timed(arm(10_000) + "mov ecx, 10000; 1: loop 1b; sti; cli; mov ecx, 1000; 2: loop 2b")
    assert result.r15 == 0


def test_mov_ss_delays_an_interrupt_by_one_instruction():
    result = timed(
        "mov eax, ss;"
        + arm(10_000)
        + "mov ecx, 10000; 1: loop 1b; pushfq; or dword ptr [rsp], 0x200;"
        "popfq; here: nop"
    )
    assert result.r14 == result.labels["here"]


def test_hlt_without_if_and_without_nmi_ends_the_run_as_idle():
    assert run("cli; hlt").outcome.ending is Ending.IDLE


def test_a_periodic_timer_ticks_on():
    result = timed(arm(50_000, mode=1) + "sti; 1: hlt; cmp r15d, 10; jb 1b")
    assert result.r15 == 10


def test_the_tsc_deadline_interrupts():
    deadline = "rdtsc; shl rdx, 32; or rax, rdx; add rax, 3000000; mov r8, rax; mov rdx, rax;"
    text = (
        write(LVT_TIMER, 2 << 17 | TIMER)
        + deadline
        + "shr rdx, 32; mov ecx, 0x6e0; wrmsr; sti; hlt;"
    )
    result = timed(text + "rdtsc; shl rdx, 32; or rax, rdx; mov r9, rax")
    assert result.r15 == 1
    assert result.r8 <= result.r9 < result.r8 + 100_000


def test_a_self_ipi_arrives_after_the_instruction_that_sends_it():
    result = timed("sti; nop;" + write(ICR, SELF | OTHER) + "here: nop; nop")
    assert result.r15 == 1
    assert result.r14 == result.labels["here"]


def test_the_task_priority_holds_an_interrupt_back():
    result = timed("mov eax, 7; mov cr8, rax; sti;" + write(ICR, SELF | OTHER)
                   + "nop; mov r8, r15; xor eax, eax; mov cr8, rax; nop; nop")  # fmt: skip
    assert (result.r8, result.r15) == (0, 1)


def test_the_higher_vector_is_served_first():
    text = (
        "jmp skip; low: mov r13, r12; inc r12;" + write(EOI, 0) + "iretq;"
        "high: mov r11, r12; inc r12;" + write(EOI, 0) + "iretq; skip: xor r12d, r12d;"
        + ON + write(ICR, SELF | 0x50) + write(ICR, SELF | 0x90) + "sti; nop; nop"
    )  # fmt: skip
    result = run(text, vectors={0x50: "low", 0x90: "high"})
    assert (result.r11, result.r13, result.r12) == (0, 1, 2)


NMI = SELF | 0x400


def test_an_nmi_ignores_if_and_wakes_hlt():
    handler = "jmp over; handler: inc r15; iretq; over: xor r15d, r15d;"
    result = run(
        handler + ON + "cli;" + write(ICR, NMI) + "nop; mov r8, r15", vectors={2: "handler"}
    )
    assert result.r8 == 1


def test_an_nmi_is_blocked_until_iret():
    handler = (
        "jmp over; handler: inc r15; cmp r15, 1; jne out;" + write(ICR, NMI)
        + "nop; mov r13, r15; mov ecx, 1000; 1: loop 1b; mov r12, r15; out: iretq;"
        + "over: xor r15d, r15d;"
    )  # fmt: skip
    result = run(handler + ON + write(ICR, NMI) + "nop; nop; mov r8, r15", vectors={2: "handler"})
    assert (result.r13, result.r12, result.r8) == (1, 1, 2)


def test_only_one_nmi_is_kept_while_one_is_handled():
    handler = (
        "jmp over; handler: inc r15; cmp r15, 1; jne out;" + write(ICR, NMI) * 3
        + "out: iretq; over: xor r15d, r15d;"
    )  # fmt: skip
    result = run(handler + ON + write(ICR, NMI) + "nop; nop; mov r8, r15", vectors={2: "handler"})
    assert result.r8 == 2


def test_an_iret_that_faults_unblocks_nmis_and_can_be_run_again():
    handler = (
        "jmp over; handler: inc r15; cmp r15, 1; jne out; mov qword ptr [rsp + 8], 0x58;"
        "out: iretq; general: add rsp, 8; mov r14, [rsp + 24]; mov qword ptr [r14 + 8], 8;"
        + write(ICR, NMI) + "nop; mov r13, r15; iretq; over: xor r15d, r15d;"
    )  # fmt: skip
    vectors = {2: "handler", 13: "general"}
    result = run(handler + ON + write(ICR, NMI) + "nop; mov r8, r15", vectors=vectors)
    assert result.outcome.ending is Ending.GUEST
    assert (result.r13, result.r8) == (2, 2)


# -- several processors ------------------------------------------------------------------------

# Each AP enters long mode through the tables of the first processor, counts itself, and waits.
TRAMPOLINE = f"""
.code16
ap: cli
 xor ax, ax
 mov ds, ax
 lgdt [0x9100]
 mov eax, 0x1000
 mov cr3, eax
 mov eax, 0x620
 mov cr4, eax
 mov ecx, 0xc0000080
 mov eax, 0x901
 xor edx, edx
 wrmsr
 mov eax, 0x80010033
 mov cr0, eax
 .byte 0x66, 0xea
 .long entry
 .word 8
ap_end:
.code64
entry:
 mov eax, 0x10
 mov ss, eax
 mov ds, eax
 mov esi, 0xfee00020
 mov eax, [rsi]
 shr eax, 24
 mov ecx, eax
 shl ecx, 12
 mov esp, {KERNEL_STACK - 0x10000}
 sub esp, ecx
 lidt [0x9120]
 mov edi, {DATA + 0x100:#x}
 mov dword ptr [rdi + 4*rax], 0x1234
 lock inc qword ptr [{DATA:#x}]
"""


def with_aps(text, count, ap_body, **options):
    """`text` after `count` processors run `ap_body`, which must not return."""
    copy = "mov esi, offset ap; mov edi, 0x8000; mov ecx, 128; rep movsb;"
    source = (
        f"sgdt [0x9100]; sidt [0x9120]; {copy} mov qword ptr [{DATA:#x}], 0;" + ON
        + write(ICR, 0xC4500) + write(ICR, 0xC4608)
        + f"wait: pause; cmp qword ptr [{DATA:#x}], {count - 1}; jne wait;" + text
        + "\n out 0xf4, al\n hlt\n" + TRAMPOLINE + ap_body
    )  # fmt: skip
    return run(source, cpus=count, **options)


@pytest.mark.parametrize("cpu", ["intel", "amd"])
def test_eight_processors_start(cpu):
    result = with_aps("nop", 8, "1: hlt; jmp 1b", cpu=cpu)
    assert result.outcome.ending is Ending.GUEST
    assert [result.u32(DATA + 0x100 + 4 * i) for i in range(8)] == [0] + [0x1234] * 7


def test_processors_share_memory_with_atomic_instructions():
    body = f"mov ecx, 10000; 2: lock inc qword ptr [{DATA + 8:#x}]; loop 2b;"
    body += f"lock inc qword ptr [{DATA + 16:#x}]; 1: hlt; jmp 1b"
    text = f"3: pause; cmp qword ptr [{DATA + 16:#x}], 3; jne 3b"
    assert with_aps(text, 4, body).u64(DATA + 8) == 30000


def test_an_ipi_wakes_the_processor_that_it_names():
    body = ON + "sti; 1: hlt; jmp 1b; handler: " + f"lock inc qword ptr [{DATA + 24:#x}];"
    body += "mov r15, 0x77;" + write(EOI, 0) + "iretq"
    text = write(ICR_HIGH, 2 << 24) + write(ICR, 0x4000 | OTHER)
    text += f"3: pause; cmp qword ptr [{DATA + 24:#x}], 1; jne 3b"
    result = with_aps(text, 4, body, vectors={OTHER: "handler"})
    assert [result.register(cpu, 15) for cpu in range(4)] == [0, 0, 0x77, 0]


def test_init_stops_a_processor_and_sipi_starts_it_again():
    body = f"1: lock inc qword ptr [{DATA + 32:#x}]; pause; jmp 1b"
    text = (
        write(ICR_HIGH, 1 << 24) + write(ICR, 0x4500) + "mov ecx, 100; 4: pause; loop 4b;"
        + f"mov r8, [{DATA + 32:#x}]; mov ecx, 200; 5: pause; loop 5b; mov r9, [{DATA + 32:#x}];"
        + write(ICR, 0x4608) + f"6: pause; cmp qword ptr [{DATA:#x}], 2; jne 6b"
    )  # fmt: skip
    result = with_aps(text, 2, body)
    assert result.r8 == result.r9
    assert result.u64(DATA) == 2


def test_code_that_another_processor_writes_is_executed():
    body = f"1: call patched; mov [{DATA + 40:#x}], eax; pause; jmp 1b; patched: mov eax, 1; ret"
    text = (
        f"3: pause; cmp dword ptr [{DATA + 40:#x}], 1; jne 3b; mov byte ptr [patched + 1], 2;"
        f"4: pause; cmp dword ptr [{DATA + 40:#x}], 2; jne 4b"
    )
    assert with_aps(text, 2, body).outcome.ending is Ending.GUEST


def registers(result, cpus):
    return [[result.register(cpu, i) for i in range(16)] for cpu in range(cpus)]


def test_two_runs_are_the_same_to_the_last_exit():
    body = ON + "sti;" + f"2: lock inc qword ptr [{DATA + 8:#x}]; rdtsc; mov r13, rax; jmp 2b"
    text = (
        arm(200_000) + "xor r15d, r15d; sti; 3: pause; test r15d, r15d; jz 3b; rdtsc; mov r12, rax;"
    )
    text += "jmp over; handler: inc r15;" + write(EOI, 0) + "iretq; over:"

    def once():
        result = with_aps(text, 4, body, vectors={TIMER: "handler"})
        machine = result.machine
        return registers(result, 4), machine.exits, machine.now(), result.u64(DATA + 8)

    assert once() == once()


# -- time limits -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "1: jmp 1b",
        "1: cpuid; jmp 1b",
        "1: pause; jmp 1b",
        "mov rcx, -1; mov edi, 0x200000; 1: rep stosb; jmp 1b",
        "1: mov ecx, 100000; mov esi, 0x200000; rep lodsb; jmp 1b",
        arm(1000, mode=1) + "1: hlt; jmp 1b",
        ON + arm(1000, mode=1) + "cli; 1: hlt; jmp 1b",
    ],
)
def test_a_run_ends_in_time_whatever_the_guest_does(text):
    if "stosb" in text:
        text = "mov ecx, 0x400000; mov edi, 0x400000; 1: rep stosb; mov ecx, 0x400000;"
        text += "mov edi, 0x400000; jmp 1b"
    result = run(text, timeout=0.3)
    assert result.outcome.ending in (Ending.TIMEOUT, Ending.IDLE)


def test_an_exception_whose_handler_cannot_be_fetched_ends_in_time():
    def prepare(machine, labels):
        set_gate(machine, 14, 0x8000000000, ist=1)

    outcome = run("movabs rsi, 0x8000000000; mov eax, [rsi]", prepare=prepare, timeout=0.3).outcome
    assert outcome.ending is Ending.TIMEOUT


def test_a_machine_goes_on_after_a_stop_of_its_callers():
    machine = build()

    class Stopper:
        wants = True

        def before(self, vcpu, exit):
            if exit.name == "CPUID":
                machine.request_stop()

        def after(self, vcpu, exit, before, verdict):
            pass

    machine.tracer = Stopper()
    result = run("mov r8d, 1; cpuid; mov r8d, 2", machine=machine)
    assert result.outcome.ending is Ending.STOPPED
    assert result.r8 == 1
    outcome = machine.run(10)
    assert outcome.ending is Ending.GUEST
    assert result.r8 == 2


def test_another_thread_stops_a_guest_that_never_exits():
    machine = build()
    stop = Outcome(Ending.STOPPED, "enough")
    timer = threading.Timer(0.1, machine.request_stop, [stop])
    timer.start()
    try:
        assert run("1: jmp 1b", machine=machine, timeout=10).outcome is stop
    finally:
        timer.join()
