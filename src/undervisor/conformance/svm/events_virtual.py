"""Virtual interrupts, the virtual GIF, and bits of V_INTR_CONTROL that are L0's business."""

from __future__ import annotations

from typing import Final

from undervisor.arch.svm.capabilities import SvmFeatures
from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.svm.vmcb import VirtualInterrupt
from undervisor.arch.svm.vmcb import VmcbField as F
from undervisor.conformance.expect import Lacking, each, equal
from undervisor.conformance.suite import guest_test
from undervisor.conformance.svm.lab import SvmLab
from undervisor.conformance.svm.needs import NPT, feature
from undervisor.conformance.svm.pending import (
    APIC,
    SELF_INTERRUPT,
    TO_APIC,
    VECTOR,
    enter,
    xapic,
)

V_IRQ: Final = int(VirtualInterrupt.v_irq)
V_GIF, V_GIF_ENABLE = int(VirtualInterrupt.v_gif), int(VirtualInterrupt.v_gif_enable)
MASKING: Final = int(VirtualInterrupt.v_intr_masking)
IGNORE: Final = int(VirtualInterrupt.v_ign_tpr)
VIRTUAL: Final = 0x66


def pending(
    priority: int, tpr: int = 0, *, rflags: int = 0x202, extra: int = MASKING
) -> dict[F, int]:
    """A virtual interrupt of a priority, with the guest's V_TPR and RFLAGS."""
    control = V_IRQ | priority << 16 | tpr | extra
    return {F.V_INTR_CONTROL: control, F.V_INTR_VECTOR: VIRTUAL, F.RFLAGS: rflags}


# Name, the changes, whether L2 gets the interrupt.
CASES: Final = {
    "priority 8, TPR 0": (pending(8), True),
    "priority 8, TPR 7": (pending(8, 7), True),
    "priority 8, TPR 8": (pending(8, 8), False),
    "priority 8, TPR 15": (pending(8, 15), False),
    "priority 0, TPR 0": (pending(0), False),
    "priority 0, TPR 15, ignored": (pending(0, 15, extra=MASKING | IGNORE), True),
    "IF clear": (pending(8, rflags=2), False),
    "IF clear, TPR ignored": (pending(8, rflags=2, extra=MASKING | IGNORE), False),
    "without V_INTR_MASKING": (pending(8, extra=0), True),
    "without V_INTR_MASKING, IF clear": (pending(8, rflags=2, extra=0), False),
    "without V_IRQ": (pending(8) | {F.V_INTR_CONTROL: MASKING | 8 << 16}, False),
}


@guest_test("APM: Virtual Interrupts", "APM: Injecting Virtual (INTR) Interrupts")
def a_virtual_interrupt_needs_if_and_priority(lab: SvmLab) -> None:
    """V_IRQ is taken when IF is 1 and its priority is above V_TPR, which V_IGN_TPR leaves out."""
    lab.code("nop; nop")
    runs = {name: lab.run(None, changes) for name, (changes, _) in CASES.items()}
    stub = lab.stub(VIRTUAL)
    got = {name: run.code == ExitCode.VMMCALL and run.rip == stub for name, run in runs.items()}
    each("L2 got the interrupt", got, lambda name: CASES[name][1])
    left = {name: bool(run[F.V_INTR_CONTROL] & V_IRQ) for name, run in runs.items()}
    asked = {name: changes[F.V_INTR_CONTROL] & V_IRQ for name, (changes, _) in CASES.items()}
    each("V_IRQ after the exit", left, lambda name: bool(asked[name]) and not CASES[name][1])


@guest_test("APM: Virtual Interrupts", "APM: V_TPR")
def without_v_irq_no_priority_makes_an_interrupt(lab: SvmLab) -> None:
    """While V_IRQ is 0 nothing is delivered, though L2 lowers its TPR below V_INTR_PRIO."""
    changes = CASES["without V_IRQ"][0]
    for extra in (0, IGNORE):
        changes |= {F.V_INTR_CONTROL: changes[F.V_INTR_CONTROL] | extra}
        lab.run("mov $15, %ebx; mov %rbx, %cr8; nop; xor %ebx, %ebx; mov %rbx, %cr8; nop",
                changes).ends()  # fmt: skip


@guest_test("APM: VINTR Intercept", "APM: Virtual Interrupts")
def a_virtual_interrupt_exits_before_it_is_taken(lab: SvmLab) -> None:
    """With the VINTR intercept the exit comes where L2 would take it, and V_IRQ stays."""
    lab.code("nop; nop")
    wants = [Intercept.VINTR]
    runs = {n: lab.run(None, changes, wants=wants) for n, (changes, _) in CASES.items()}
    got = {name: (run.code, run[F.V_INTR_CONTROL] & V_IRQ) for name, run in runs.items()}
    each("exit and V_IRQ", got, lambda name: (
        ExitCode.VINTR if CASES[name][1] else ExitCode.VMMCALL,
        CASES[name][0][F.V_INTR_CONTROL] & V_IRQ))  # fmt: skip
    rips = {name: run.rip for name, run in runs.items() if run.code == ExitCode.VINTR}
    each("RIP", rips, lab.places.code)


@guest_test("APM: VINTR Intercept", "APM: Interrupt Shadows")
def the_interrupt_window_opens_behind_stis_shadow(lab: SvmLab) -> None:
    """A virtual interrupt that waits for STI exits one instruction behind it."""
    changes = pending(8, rflags=2)
    run = lab.run("nop; sti; nop; nop", changes, wants=[Intercept.VINTR])
    run.exits_with(ExitCode.VINTR)
    equal("RIP behind STI and NOP", run.rip, lab.places.code + 3)
    run = lab.run("nop; sti; nop; nop", changes)
    run.delivers(VIRTUAL)
    equal("the RIP that is pushed", lab.read_u64(run[F.RSP]), lab.places.code + 3)


@guest_test("APM: Virtual Interrupts", "APM: V_TPR")
def lowering_cr8_lets_a_virtual_interrupt_in(lab: SvmLab) -> None:
    """L2 gets a virtual interrupt as soon as it writes a lower priority into CR8."""
    changes = pending(8, 10)
    run = lab.run("mov %cr8, %rbx; mov $8, %eax; mov %rax, %cr8; nop; mov $7, %eax;"
                  "mov %rax, %cr8; nop", changes)  # fmt: skip
    run.delivers(VIRTUAL)
    behind = lab.assemble("mov %cr8, %rbx; mov $8, %eax; mov %rax, %cr8; nop; mov $7, %eax;"
                          "mov %rax, %cr8")  # fmt: skip
    equal("the RIP that is pushed", lab.read_u64(run[F.RSP]), lab.places.code + len(behind))
    equal("CR8 as L2 found it", run.registers["rbx"], 10)
    equal("V_TPR after the exit", run[F.V_INTR_CONTROL] & 0xFF, 7)


@guest_test("APM: Virtual Interrupts", "APM: HLT Intercept", seconds=5)
def a_virtual_interrupt_ends_l2s_halt(lab: SvmLab) -> None:
    """A virtual interrupt that can be taken ends a HLT that is not intercepted."""
    changes = pending(8, rflags=2)
    run = lab.run("sti; hlt; nop", changes, without=[Intercept.HLT])
    run.delivers(VIRTUAL)
    pushed = lab.read_u64(run[F.RSP]) - lab.places.code
    equal("the RIP that is pushed is HLT's or behind it", pushed in (1, 2), True)


@guest_test("APM: Virtual Interrupts", "APM: Event Injection")
def an_injected_event_comes_before_a_virtual_interrupt(lab: SvmLab) -> None:
    """EVENTINJ is delivered first; its handler, IF clear, holds the virtual interrupt off."""
    run = lab.run("nop", pending(8) | {F.EVENTINJ: 1 << 31 | 0x80})
    run.delivers(0x80)
    equal("V_IRQ after the exit", run[F.V_INTR_CONTROL] & V_IRQ, V_IRQ)


@guest_test("APM: Virtual Interrupts, V_INTR_MASKING", "APM: INTR Intercept")
def a_physical_interrupt_comes_before_a_virtual_one(lab: SvmLab) -> None:
    """With both pending, INTR exits first and V_IRQ stays."""
    xapic(lab)
    lab.code("nop")
    wants = [Intercept.INTR, Intercept.VINTR]
    entered = enter(lab, SELF_INTERRUPT, pending(8), wants=wants)
    entered.run.exits_with(ExitCode.INTR)
    equal("V_IRQ after the exit", entered.run[F.V_INTR_CONTROL] & V_IRQ, V_IRQ)


@guest_test("APM: Virtual Interrupts", "APM: Interrupt Shadows", seconds=5)
def interrupts_nest_in_l2s_handlers(lab: SvmLab) -> None:
    """L1 injects again after each interrupt: L2 takes each in its turn and returns."""
    lab.write(lab.stub(VIRTUAL), lab.assemble("incl DATA; vmmcall; iretq"))
    lab.write_u32(lab.places.data, 0)
    run = lab.run("1: incl DATA + 4; nop; jmp 1b", pending(8))
    for number in range(1, 4):
        run.exits_with(ExitCode.VMMCALL)
        equal("interrupts that L2 took", lab.read_u32(lab.places.data), number)
        again = pending(8)
        del again[F.RFLAGS]
        run = lab.skip(run, 3, again)


# -- virtual GIF -------------------------------------------------------------------------------

VGIF: Final = feature("vgif")


@guest_test("APM: Virtual GIF", needs=[VGIF])
def virtual_gif_holds_virtual_interrupts(lab: SvmLab) -> None:
    """With V_GIF_ENABLE a virtual interrupt waits until V_GIF is 1."""
    lab.code("nop; nop")
    lab.run(None, pending(8, extra=MASKING | V_GIF_ENABLE)).ends()
    lab.run(None, pending(8, extra=MASKING | V_GIF_ENABLE | V_GIF)).delivers(VIRTUAL)
    run = lab.run("nop; stgi; nop", pending(8, extra=MASKING | V_GIF_ENABLE))
    run.delivers(VIRTUAL)
    equal("the RIP that is pushed", lab.read_u64(run[F.RSP]), lab.places.code + 4)


@guest_test("APM: Virtual GIF", needs=[VGIF])
def stgi_and_clgi_of_l2_change_v_gif(lab: SvmLab) -> None:
    """With V_GIF_ENABLE L2's STGI and CLGI set and clear V_GIF in the VMCB."""
    got = {}
    for text, start in (("stgi", 0), ("clgi", V_GIF), ("nop", V_GIF), ("clgi; stgi", 0)):
        run = lab.run(text, {F.V_INTR_CONTROL: V_GIF_ENABLE | start})
        run.ends()
        got[text] = bool(run[F.V_INTR_CONTROL] & V_GIF)
    each("V_GIF", got, lambda text: text != "clgi")


@guest_test("APM: Virtual GIF", "APM: INTR Intercept", needs=[VGIF])
def virtual_gif_does_not_hold_physical_interrupts(lab: SvmLab) -> None:
    """L2's CLGI with V_GIF_ENABLE does not keep an interrupt of L1 from exiting."""
    xapic(lab)
    control = V_GIF_ENABLE | V_GIF | MASKING
    # An interrupt that a processor sends itself takes a while.
    lab.code(f"clgi; {TO_APIC} {SELF_INTERRUPT} mov $1000, %ecx; 1: pause; loop 1b")
    entered = enter(lab, "", {F.V_INTR_CONTROL: control}, wants=[Intercept.INTR])
    entered.run.exits_with(ExitCode.INTR)
    equal("V_GIF after the exit", entered.run[F.V_INTR_CONTROL] & V_GIF, 0)


# -- bits that this L1 was not offered ---------------------------------------------------------


@guest_test("APM: VMCB Changes for AVIC", "APM: Function 8000_000Ah: SVM Features", needs=[NPT])
def avic_that_is_not_offered_gives_l2_no_apic_page(lab: SvmLab) -> None:
    """Where CPUID has no AVIC, its enable bit and pointers give L2 no other local APIC.

    An L0 that hands V_INTR_CONTROL to its own processor lets L2 write what the pointers name.
    """
    if lab.feature(int(SvmFeatures.avic)):
        raise Lacking("a processor without AVIC: this one has it")
    xapic(lab)
    free, pattern = lab.places.free, 0x5A5A5A5A
    lab.fill(free, 0x3000, 0x5A)
    version = lab.l1.peek(APIC + 0x30).value
    changes = lab.npt() | {
        F.V_INTR_CONTROL: int(VirtualInterrupt.avic_enable),
        F.AVIC_APIC_BAR: APIC, F.AVIC_BACKING_PAGE: free, F.AVIC_LOGICAL_TABLE: free + 0x1000,
        F.AVIC_PHYSICAL_TABLE: free + 0x2000,
    }  # fmt: skip
    run = lab.run(f"{TO_APIC} mov 0x30(%rdi), %ebx; movl $0x20, 0x80(%rdi)", changes)
    if run.code == ExitCode.VMMCALL:
        equal("the APIC version that L2 reads", run.registers["rbx"], version)
        lab.l1.poke(APIC + 0x80, 0)
    else:
        run.is_invalid()
    equal("the page that AVIC would have used", lab.read_u32(free + 0x80), pattern)


@guest_test("APM: Virtual Interrupts", "APM: VMCB Layout, Control Area")
def the_vector_of_another_l2_is_not_delivered(lab: SvmLab) -> None:
    """What one VMCB says of virtual interrupts does not reach the next one that L1 runs."""
    lab.code("sti; nop; nop; cli")
    lab.run(None, pending(8, 15, rflags=2)).ends()
    lab.run(None, {F.V_INTR_VECTOR: VECTOR}).ends()
