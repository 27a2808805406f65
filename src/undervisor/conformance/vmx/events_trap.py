"""The monitor trap flag: an exit behind each instruction, whoever carries it out."""

from __future__ import annotations

from typing import Final

from undervisor.arch.vmx.controls import InterruptionType as Type
from undervisor.arch.vmx.controls import PrimaryControls
from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.conformance.expect import each, equal
from undervisor.conformance.suite import guest_test
from undervisor.conformance.vmx.lab import Changes, VmxLab
from undervisor.conformance.vmx.needs import control

MTF: Final = control(PrimaryControls, "monitor_trap_flag")
TRAP: Final = ExitReason.MONITOR_TRAP_FLAG
VALID: Final = 1 << 31
EMULATED: Final = (
    "nop", "mov (%rbx), %rax", "push %rax", "in $0x80, %al", "out %al, $0x80", "rdmsr", "wrmsr",
    "mov %cr0, %rax", "mov %cr4, %rax", "mov %rsi, %cr4", "mov %cr2, %rax", "mov %db0, %rax",
    "rdtsc", "pause", "wbinvd", "invlpg (%rbx)", "clts", "smsw %rax", "sgdt (%rbx)", "sldt %eax",
    "pushfq", "jmp 2f; 2:",
)  # fmt: skip
"""Instructions that do not exit here, many of which an L0 carries out itself."""


@guest_test("SDM: Monitor Trap Flag", needs=[MTF])
def each_instruction_is_followed_by_an_exit(lab: VmxLab) -> None:
    """With the monitor trap flag an exit is pending behind the first instruction, of any kind."""
    free = lab.primary(
        monitor_trap_flag=1, use_msr_bitmaps=1, use_io_bitmaps=0, unconditional_io_exiting=0,
        rdtsc_exiting=0, pause_exiting=0, invlpg_exiting=0, mov_dr_exiting=0,
    )  # fmt: skip
    lab.fill(lab.places.msr, 0x1000)
    registers = {"rbx": lab.places.data, "rcx": 0x174, "rsi": lab.fields[F.GUEST_CR4]}
    runs = lab.sweep([free] * len(EMULATED), sources=list(EMULATED), registers=registers)
    got = {text: (run.reason, run.rip - run.start, run.qualification)
           for text, run in zip(EMULATED, runs, strict=True)}  # fmt: skip
    each("reason, distance of RIP and qualification behind", dict(got),
         lambda text: (TRAP, len(lab.assemble(text)), 0))  # fmt: skip


@guest_test("SDM: Monitor Trap Flag", needs=[MTF])
def a_resumed_l2_goes_on_instruction_by_instruction(lab: VmxLab) -> None:
    """Each VMRESUME runs one instruction more, and no time is lost between them."""
    run = lab.run("inc %rbx; inc %rbx; inc %rbx", lab.primary(monitor_trap_flag=1), {"rbx": 0})
    for count in (1, 2, 3):
        run.exits_with(TRAP)
        equal("RBX", run.registers["rbx"], count)
        run = lab.resume(None, run.registers)
    run.exits_with(ExitReason.VMCALL)


@guest_test("SDM: Monitor Trap Flag", needs=[MTF])
def an_event_that_is_delivered_is_followed_by_the_exit(lab: VmxLab) -> None:
    """Behind an injected event, or a fault, the exit comes before the handler begins."""
    trap = lab.primary(monitor_trap_flag=1)
    injected: Changes = {F.ENTRY_INTERRUPTION_INFORMATION: VALID | Type.HARDWARE_EXCEPTION << 8 | 6}
    run = lab.run("nop; nop", trap | injected)
    run.exits_with(TRAP)
    equal("RIP behind the injection", run.rip, lab.stub(6))
    run = lab.run("ud2", trap)
    run.exits_with(TRAP)
    equal("RIP behind the fault", run.rip, lab.stub(6))


@guest_test("SDM: Monitor Trap Flag", needs=[MTF])
def a_repeated_string_is_followed_by_the_exit_at_each_iteration(lab: VmxLab) -> None:
    """With REP each iteration is followed by an exit: RCX counts, RIP stays until the last."""
    data = lab.places.data
    registers = {"rcx": 3, "rdi": data, "rax": 0x55}
    run = lab.run("rep stosb; nop", lab.primary(monitor_trap_flag=1), registers)
    for left in (2, 1, 0):
        run.exits_with(TRAP)
        equal("RCX and RIP", (run.registers["rcx"], run.rip - lab.places.code),
              (left, 0 if left else 2))  # fmt: skip
        run = lab.resume(None, run.registers)


@guest_test("SDM: Injection of Pending MTF VM Exits", needs=[MTF])
def an_injected_pending_mtf_exits_before_any_instruction(lab: VmxLab) -> None:
    """Injection of type 7, vector 0 makes an MTF exit pending, whatever the control is."""
    pending: Changes = {F.ENTRY_INTERRUPTION_INFORMATION: VALID | Type.OTHER_EVENT << 8}
    for on in (0, 1):
        run = lab.run("nop; nop", lab.primary(monitor_trap_flag=on) | pending)
        run.exits_with(TRAP)
        equal("RIP", run.rip, lab.places.code)
        equal("the valid bit for the next entry",
              run[F.ENTRY_INTERRUPTION_INFORMATION] & VALID, 0)  # fmt: skip


@guest_test("SDM: Monitor Trap Flag", needs=[MTF])
def an_instruction_that_exits_does_so_instead(lab: VmxLab) -> None:
    """An instruction that itself exits gives its own exit, and no trap is left behind."""
    run = lab.run("cpuid; nop; nop", lab.primary(monitor_trap_flag=1))
    run.exits_with(ExitReason.CPUID)
    run = lab.skip(run, lab.primary(monitor_trap_flag=0))
    run.exits_with(ExitReason.VMCALL)
