"""Interrupts and NMIs of L2, their windows and shadows, activity states, debug exceptions."""

from __future__ import annotations

from typing import Final

from undervisor.arch.vmx.controls import InterruptionType as Type
from undervisor.arch.vmx.controls import PinBasedControls
from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.registers import Rflags
from undervisor.conformance.expect import each, equal
from undervisor.conformance.suite import guest_test
from undervisor.conformance.vmx.lab import Changes, VmxLab
from undervisor.conformance.vmx.needs import control, misc

VALID: Final = 1 << 31
VECTOR: Final = 0x81
STI, MOV_SS, NMI = 1, 2, 8
HLT, SHUTDOWN = 1, 2
IF: Final[Changes] = {F.GUEST_RFLAGS: 0x2 | Rflags.if_}
APIC: Final = "mov $0xfee00000, %r8d; "
ARRIVE: Final = "mov $0x400, %ecx; 8: pause; loop 8b; "
"""What is sent to oneself need not arrive at once."""
SEND_INTERRUPT: Final = f"{APIC} movl $0x40000 | {VECTOR}, 0x300(%r8); {ARRIVE}"
SEND_NMI: Final = f"{APIC} movl $0, 0x310(%r8); movl $0x4400, 0x300(%r8); {ARRIVE}"
IRET: Final = "mov %rsp, %rax; push $DS; push %rax; pushfq; push $CS64; push $1f; iretq; 1: "
SPURIOUS, EOI = 0xF0, 0xB0
VIRTUAL_NMIS: Final = control(PinBasedControls, "virtual_nmis")


def _pin(lab: VmxLab, **bits: int) -> Changes:
    """Pin-based controls; HLT does not exit."""
    lab.l1.apic_write(SPURIOUS, 0x1FF)
    return lab.primary(lab.pin(None, **bits), hlt_exiting=0)


def _virtual(lab: VmxLab, **primary: int) -> Changes:
    return lab.primary(_pin(lab, nmi_exiting=1, virtual_nmis=1), **primary)


# -- external interrupts ---------------------------------------------------------------------------


@guest_test("SDM: External-Interrupt Exiting", "SDM: Information for VM Exits Due to Vectored"
            " Events", cases={"IF = 0": 0x2, "IF = 1": 0x202})  # fmt: skip
def an_interrupt_exits_whatever_if_is(lab: VmxLab, flags: int) -> None:
    """With "external-interrupt exiting" an interrupt exits even if RFLAGS.IF is 0.

    With "acknowledge interrupt on exit" the exit tells the vector; without, it stays pending.
    """
    changes = _pin(lab, external_interrupt_exiting=1) | {F.GUEST_RFLAGS: flags}
    run = lab.run(SEND_INTERRUPT + "nop; nop", lab.on_exit(changes, acknowledge_interrupt=1))
    run.exits_with(ExitReason.EXTERNAL_INTERRUPT)
    equal("the interruption information", run[F.EXIT_INTERRUPTION_INFORMATION], VALID | VECTOR)
    lab.l1.apic_write(EOI, 0)
    before = lab.count(VECTOR)
    run = lab.run(None, lab.on_exit(changes, acknowledge_interrupt=0))
    run.exits_with(ExitReason.EXTERNAL_INTERRUPT)
    equal("the valid bit without acknowledgement",
          run[F.EXIT_INTERRUPTION_INFORMATION] & VALID, 0)  # fmt: skip
    lab.l1.call("window")
    equal("the interrupts that L1 takes afterwards", lab.count(VECTOR) - before, 1)


@guest_test("SDM: External-Interrupt Exiting", "SDM: Asynchronous Events")
def an_interrupt_that_does_not_exit_is_l2s(lab: VmxLab) -> None:
    """Without "external-interrupt exiting" an interrupt is delivered through L2's IDT, if IF is 1.

    It wakes L2 from HLT.
    """
    changes = _pin(lab, external_interrupt_exiting=0)
    lab.run(SEND_INTERRUPT + "nop; nop", changes | IF).delivers(VECTOR)
    lab.l1.apic_write(EOI, 0)
    lab.run(SEND_INTERRUPT + "nop; nop", changes).ends()
    lab.l1.call("window")
    lab.run(SEND_INTERRUPT + "sti; hlt; nop", changes).delivers(VECTOR)
    lab.l1.apic_write(EOI, 0)


@guest_test("SDM: Activity State", "SDM: Saving Non-Register State", seconds=5)
def an_interrupt_exits_from_hlt_and_the_state_is_saved(lab: VmxLab) -> None:
    """An interrupt that ends L2's HLT by an exit leaves the activity state HLT in the VMCS."""
    changes = lab.on_exit(_pin(lab, external_interrupt_exiting=1), acknowledge_interrupt=1)
    timer = f"movl $0xb, 0x3e0(%r8); movl ${VECTOR}, 0x320(%r8); movl $0x100000, 0x380(%r8); "
    run = lab.run(APIC + timer + "hlt; nop", changes)
    run.exits_with(ExitReason.EXTERNAL_INTERRUPT)
    lab.l1.apic_write(EOI, 0)
    equal("activity state and information", (run[F.GUEST_ACTIVITY_STATE],
          run[F.EXIT_INTERRUPTION_INFORMATION]), (HLT, VALID | VECTOR))  # fmt: skip
    equal("RIP behind HLT", run.rip, lab.places.code + len(lab.assemble(APIC + timer + "hlt")))


# -- the interrupt window and shadows --------------------------------------------------------------


@guest_test("SDM: Primary Processor-Based VM-Execution Controls", "SDM: Other Causes of VM Exits",
            seconds=5)  # fmt: skip
def the_interrupt_window_opens_when_nothing_blocks(lab: VmxLab) -> None:
    """Interrupt-window exiting: before any instruction with IF = 1 and no blocking by STI, MOV SS.

    Else as soon as that is so.
    """
    window = lab.primary(_pin(lab), interrupt_window_exiting=1)
    code = lab.places.code
    cases: dict[str, tuple[str, Changes, int]] = {
        "at once": ("nop; nop", IF, 0),
        "behind blocking by STI": ("nop; nop", IF | {F.GUEST_INTERRUPTIBILITY_STATE: STI}, 1),
        "behind blocking by MOV SS": ("nop; nop", IF | {F.GUEST_INTERRUPTIBILITY_STATE: MOV_SS}, 1),
        "behind the shadow of STI": ("nop; sti; nop; nop", {}, 3),
        "behind the first of two STI's shadow": ("nop; sti; sti; nop; nop", {}, 3),
        "from HLT": ("nop", IF | {F.GUEST_ACTIVITY_STATE: HLT}, 0),
    }  # fmt: skip
    got = {}
    for name, (source, changes, _) in cases.items():
        run = lab.run(source, window | changes)
        got[name] = (run.reason, run.rip - code)
    each("reason and distance of RIP", dict(got),
         lambda name: (ExitReason.INTERRUPT_WINDOW, cases[name][2]))  # fmt: skip
    lab.run("nop; nop", window).ends()


@guest_test("SDM: Saving Non-Register State", "SDM: Interruptibility State")
def the_shadow_of_sti_and_mov_ss_is_saved(lab: VmxLab) -> None:
    """An exit of the instruction behind STI or MOV SS saves the blocking, by its cause."""
    for source, blocking in (("sti; cpuid", STI), ("mov %ss, %eax; mov %eax, %ss; cpuid", MOV_SS),
                             ("nop; cpuid", 0)):  # fmt: skip
        run = lab.run(source)
        run.exits_with(ExitReason.CPUID)
        equal(f"the interruptibility state of {source}", run[F.GUEST_INTERRUPTIBILITY_STATE],
              blocking)  # fmt: skip
    for state in (STI, MOV_SS):
        run = lab.run("cpuid", IF | {F.GUEST_INTERRUPTIBILITY_STATE: state})
        equal("the interruptibility state as entered", run[F.GUEST_INTERRUPTIBILITY_STATE], state)
    run = lab.run("nop; cpuid", IF | {F.GUEST_INTERRUPTIBILITY_STATE: STI})
    equal("the state behind one instruction", run[F.GUEST_INTERRUPTIBILITY_STATE], 0)


@guest_test("SDM: Interruptibility State", "SDM: Asynchronous Events")
def an_interrupt_waits_for_the_end_of_the_shadow(lab: VmxLab) -> None:
    """An interrupt that is pending behind STI is delivered behind the next instruction, not before.

    So it is with blocking by STI or MOV SS that entry loads.
    """
    changes = _pin(lab, external_interrupt_exiting=0)
    run = lab.run(SEND_INTERRUPT + "sti; inc %rbx; inc %rbx", changes, {"rbx": 0})
    run.delivers(VECTOR)
    equal("the instructions behind STI before the interrupt", run.registers["rbx"], 1)
    lab.l1.apic_write(EOI, 0)
    for blocking in (STI, MOV_SS):
        lab.call("mov $0xfee00000, %r8d; movl $0x40081, 0x300(%r8)")
        state = changes | IF | {F.GUEST_INTERRUPTIBILITY_STATE: blocking}
        run = lab.run("inc %rbx; inc %rbx", state, {"rbx": 0})
        run.delivers(VECTOR)
        equal("the instructions in the shadow", run.registers["rbx"], 1)
        lab.l1.apic_write(EOI, 0)


# -- NMIs ------------------------------------------------------------------------------------------


@guest_test("SDM: Pin-Based VM-Execution Controls", "SDM: Information for VM Exits Due to Vectored"
            " Events")  # fmt: skip
def an_nmi_exits_by_its_control(lab: VmxLab) -> None:
    """With "NMI exiting" an NMI exits as vector 2, type 2; without, it is delivered to L2."""
    run = lab.run(SEND_NMI + "nop; nop", _pin(lab, nmi_exiting=1))
    run.exits_with(ExitReason.EXCEPTION_OR_NMI)
    equal("the interruption information", run[F.EXIT_INTERRUPTION_INFORMATION],
          VALID | Type.NMI << 8 | 2)  # fmt: skip
    lab.call("mov %rsp, %rax; push $0x10; push %rax; pushfq; push $8; lea 1f(%rip), %rax;"
             " push %rax; iretq; 1:")  # fmt: skip
    run = lab.run(SEND_NMI + "nop; nop", _pin(lab, nmi_exiting=0))
    run.delivers(2)
    equal("blocking by NMI in the handler", run[F.GUEST_INTERRUPTIBILITY_STATE], NMI)


@guest_test("SDM: Primary Processor-Based VM-Execution Controls", "SDM: Other Causes of VM Exits",
            needs=[VIRTUAL_NMIS])  # fmt: skip
def the_nmi_window_opens_when_virtual_nmis_are_not_blocked(lab: VmxLab) -> None:
    """NMI-window exiting: before any instruction without virtual-NMI blocking and MOV SS blocking.

    IRET ends the virtual-NMI blocking.
    """
    window = _virtual(lab, nmi_window_exiting=1)
    code = lab.places.code
    blocked: Changes = {F.GUEST_INTERRUPTIBILITY_STATE: NMI}
    cases: dict[str, tuple[str, Changes, int]] = {
        "at once": ("nop; nop", {}, 0),
        "behind blocking by MOV SS": ("nop; nop", {F.GUEST_INTERRUPTIBILITY_STATE: MOV_SS}, 1),
        "behind IRET": (IRET + "nop", blocked, len(lab.assemble(IRET, code))),
        "from HLT": ("nop", {F.GUEST_ACTIVITY_STATE: HLT}, 0),
    }
    got = {}
    for name, (source, changes, _) in cases.items():
        run = lab.run(source, window | changes)
        got[name] = (run.reason, run.rip - code)
    each("reason and distance of RIP", dict(got),
         lambda name: (ExitReason.NMI_WINDOW, cases[name][2]))  # fmt: skip
    lab.run("nop; nop", window | blocked).ends()


@guest_test("SDM: Changes to Instruction Behavior in VMX Non-Root Operation",
            needs=[VIRTUAL_NMIS])  # fmt: skip
def what_iret_unblocks_goes_by_the_nmi_controls(lab: VmxLab) -> None:
    """IRET ends blocking unless "NMI exiting" is 1 without "virtual NMIs"."""
    blocked: Changes = {F.GUEST_INTERRUPTIBILITY_STATE: NMI}
    for name, pins, after in (
        ("no NMI exiting", _pin(lab, nmi_exiting=0), 0),
        ("NMI exiting", _pin(lab, nmi_exiting=1, virtual_nmis=0), NMI),
        ("virtual NMIs", _virtual(lab), 0),
    ):
        run = lab.run(IRET + "nop", pins | blocked)
        run.ends()
        equal(f"blocking behind IRET with {name}", run[F.GUEST_INTERRUPTIBILITY_STATE], after)


@guest_test("SDM: Information for VM Exits Due to Vectored Events", needs=[VIRTUAL_NMIS])
def a_fault_of_iret_tells_that_it_unblocked_nmis(lab: VmxLab) -> None:
    """An exception exit of an IRET that ended NMI blocking has bit 12 in its information."""
    source = "mov %rsp, %rax; push $DS; push %rax; pushfq; push $0x7770; push $0; iretq"
    blocked: Changes = {F.GUEST_INTERRUPTIBILITY_STATE: NMI, F.EXCEPTION_BITMAP: 1 << 13}
    run = lab.run(source, _virtual(lab) | blocked)
    run.exits_with_exception(13, 0x7770)
    equal("NMI unblocking due to IRET", run[F.EXIT_INTERRUPTION_INFORMATION] >> 12 & 1, 1)
    equal("the interruptibility state", run[F.GUEST_INTERRUPTIBILITY_STATE], 0)


# -- activity states -------------------------------------------------------------------------------


@guest_test("SDM: Activity State", needs=[misc("activity_hlt"), VIRTUAL_NMIS])
def hlt_is_an_activity_state_that_entry_loads(lab: VmxLab) -> None:
    """HLT that does not exit, and entry into HLT, stop L2 until an event: here an NMI window."""
    window = _virtual(lab, nmi_window_exiting=1)
    run = lab.run("nop", window | {F.GUEST_ACTIVITY_STATE: HLT})
    run.exits_with(ExitReason.NMI_WINDOW)
    equal("activity state and RIP", (run[F.GUEST_ACTIVITY_STATE], run.rip),
          (HLT, lab.places.code))  # fmt: skip


@guest_test("SDM: Activity State", needs=[misc("activity_shutdown"), VIRTUAL_NMIS])
def shutdown_is_an_activity_state_that_entry_loads(lab: VmxLab) -> None:
    """In the shutdown state an NMI window exits, and the state is saved."""
    run = lab.run("nop", _virtual(lab, nmi_window_exiting=1) | {F.GUEST_ACTIVITY_STATE: SHUTDOWN})
    run.exits_with(ExitReason.NMI_WINDOW)
    equal("the activity state", run[F.GUEST_ACTIVITY_STATE], SHUTDOWN)


# -- debug exceptions ------------------------------------------------------------------------------


@guest_test("SDM: Pending Debug Exceptions", "SDM: Delivery of Pending Debug Exceptions after"
            " VM Entry")  # fmt: skip
def pending_debug_exceptions_come_before_the_first_instruction(lab: VmxLab) -> None:
    """A pending BS is delivered behind the entry; with blocking by MOV SS, one instruction later.

    As an exit it has BS in the qualification.
    """
    single: Changes = {F.GUEST_RFLAGS: 0x2 | Rflags.tf, F.GUEST_PENDING_DEBUG_EXCEPTIONS: 1 << 14}
    run = lab.run("nop; nop", single | {F.EXCEPTION_BITMAP: 1 << 1})
    run.exits_with(ExitReason.EXCEPTION_OR_NMI, qualification=1 << 14)
    equal("RIP", run.rip, lab.places.code)
    run = lab.run("nop; nop", single)
    run.delivers(1)
    equal("the RIP that was pushed", lab.read_u64(run[F.GUEST_RSP]), lab.places.code)
    shadow = single | {F.EXCEPTION_BITMAP: 2, F.GUEST_INTERRUPTIBILITY_STATE: MOV_SS}
    run = lab.run("nop; nop; nop", shadow)
    run.exits_with(ExitReason.EXCEPTION_OR_NMI, qualification=1 << 14)
    equal("RIP behind blocking by MOV SS", run.rip, lab.places.code + 1)


@guest_test("SDM: Pending Debug Exceptions", "SDM: Saving Non-Register State")
def a_step_behind_mov_ss_is_pending_at_the_exit(lab: VmxLab) -> None:
    """Of an exit behind MOV SS with TF = 1 the pending debug exceptions have BS."""
    source = "mov %ss, %eax; pushfq; orl $0x100, (%rsp); popfq; mov %eax, %ss; cpuid"
    run = lab.run(source)
    run.exits_with(ExitReason.CPUID)
    equal("the pending debug exceptions", run[F.GUEST_PENDING_DEBUG_EXCEPTIONS], 1 << 14)
