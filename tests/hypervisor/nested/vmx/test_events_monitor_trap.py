"""The monitor trap flag: an exit behind one instruction, or behind what came in its place.

SDM 3C "Monitor Trap Flag".
"""

import pytest
from vmx_lab import CODE, DATA, event

from undervisor.arch.vmx.controls import InterruptionType
from undervisor.arch.vmx.exits import ExitReason as R
from undervisor.arch.vmx.fields import VmcsField as F

BS, TF = 1 << 14, 1 << 8


@pytest.fixture
def traps(lab):
    return lab.primary(lab.ept(), monitor_trap_flag=1, hlt_exiting=0)


def places(lab, source, changes, count, registers=None):
    """RIP, relative to the code, at each of the first exits."""
    run = lab.run(source, changes, registers)
    found = []
    for _ in range(count):
        assert run.reason is R.MONITOR_TRAP_FLAG, run.reason
        found.append(run.rip - CODE)
        run = lab.resume({}, run.registers)
    return found


def test_an_exit_follows_each_instruction(lab, traps):
    source = "nop; mov $5, %ecx; 1: dec %ecx; jnz 1b; nop; nop"
    loop = [offset for _ in range(4) for offset in (8, 6)]
    assert places(lab, source, traps, 13, {}) == [1, 6, *loop, 8, 10, 11]


def test_an_instruction_that_jumps_to_itself_is_one(lab, traps):
    assert places(lab, "1: jmp 1b", traps, 3) == [0, 0, 0]


def test_a_loop_of_one_instruction_exits_each_time(lab, traps):
    assert places(lab, "1: loop 1b", traps, 3, {"rcx": 3}) == [0, 0, 2]


def test_each_iteration_of_a_repeated_string_instruction_is_one(lab, traps):
    registers = {"rcx": 3, "rdi": DATA, "rax": 0x11}
    assert places(lab, "rep stosb; nop", traps, 4, registers) == [0, 0, 2, 3]


def test_a_first_touch_of_a_page_makes_no_difference(lab, traps):
    """The nested page fault that only L0 sees is no instruction boundary."""
    assert places(lab, "mov %rax, FREE; mov FREE + 0x1000, %rax; nop", traps, 3) == [8, 16, 17]


@pytest.mark.parametrize(
    ("source", "length"),
    [("rdtsc", 2), ("mov %rdx, %db3", 3), ("mov %cr8, %rax", 4), ("pause", 2), ("hlt", 1)],
)
def test_an_instruction_that_l0_carries_out_is_one(lab, traps, source, length):
    run = lab.run(source, traps, {"rdx": 0})
    assert (run.reason, run.rip) == (R.MONITOR_TRAP_FLAG, CODE + length)
    assert run[F.GUEST_ACTIVITY_STATE] == (1 if source == "hlt" else 0)


def test_an_instruction_that_exits_ends_the_step(lab, traps):
    assert lab.run("cpuid", traps).reason is R.CPUID
    off = lab.primary(monitor_trap_flag=0)
    run = lab.skip(lab.run("cpuid; nop; nop", traps), off)
    assert run.reason is R.VMCALL


@pytest.mark.parametrize(
    ("source", "vector"),
    [("ud2", 6), ("int3", 3), ("int $0x55", 0x55), ("mov 0x7f00000000, %rax", 14), ("div %rdx", 0)],
)
def test_an_exception_is_followed_by_an_exit_before_its_handler(lab, traps, source, vector):
    run = lab.run(source, traps | {F.GUEST_CR3: lab.pages()}, {"rdx": 0})
    assert run.reason is R.MONITOR_TRAP_FLAG
    assert run.rip == lab.stub(vector)


@pytest.mark.parametrize(
    ("vector", "kind"),
    [
        (0x40, InterruptionType.EXTERNAL_INTERRUPT),
        (2, InterruptionType.NMI),
        (6, InterruptionType.HARDWARE_EXCEPTION),
        (0x41, InterruptionType.SOFTWARE_INTERRUPT),
    ],
)
def test_an_injected_event_is_followed_by_an_exit_before_its_handler(lab, traps, vector, kind):
    injected = {F.ENTRY_INTERRUPTION_INFORMATION: event(vector, kind)}
    injected |= {F.ENTRY_INSTRUCTION_LENGTH: 2, F.GUEST_RFLAGS: 0x202}
    run = lab.run("nop", traps | injected)
    assert run.reason is R.MONITOR_TRAP_FLAG
    assert run.rip == lab.stub(vector)


def test_an_injected_monitor_trap_exits_before_any_instruction(lab):
    injected = {F.ENTRY_INTERRUPTION_INFORMATION: event(0, InterruptionType.OTHER_EVENT)}
    run = lab.run("nop", lab.primary(monitor_trap_flag=0) | injected)
    assert (run.reason, run.rip) == (R.MONITOR_TRAP_FLAG, CODE)
    assert lab.resume({}, run.registers).reason is R.VMCALL


def test_a_single_step_trap_stays_pending(lab, traps):
    """The exit has priority over the #DB, which goes to L2 when L1 lets it run on."""
    run = lab.run("nop; nop", traps | {F.GUEST_RFLAGS: 2 | TF})
    assert (run.reason, run.rip) == (R.MONITOR_TRAP_FLAG, CODE + 1)
    assert run[F.GUEST_PENDING_DEBUG_EXCEPTIONS] == BS
    run = lab.resume(lab.primary(monitor_trap_flag=0), run.registers)
    assert run.vector == 1


def test_the_guest_does_not_see_the_step_in_its_flags(lab, traps):
    run = lab.run("pushfq; pop %rbx; vmcall", traps)
    run = lab.resume({}, run.registers)
    assert run.registers["rbx"] & TF == 0
    assert run[F.GUEST_RFLAGS] & TF == 0


def test_without_the_control_nothing_exits(lab):
    run = lab.run("nop; ud2", lab.primary(monitor_trap_flag=0))
    assert (run.reason, run.vector) == (R.VMCALL, 6)


def test_an_exception_that_exits_ends_the_step(lab, traps):
    run = lab.run("ud2", traps | {F.EXCEPTION_BITMAP: 1 << 6})
    assert (run.reason, run.intercepted) == (R.EXCEPTION_OR_NMI, 6)


def test_a_shadow_does_not_stretch_the_step(lab, traps):
    assert places(lab, "sti; nop; cli", traps, 3) == [1, 2, 3]
