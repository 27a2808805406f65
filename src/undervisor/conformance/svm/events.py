"""Interrupts and NMIs while L2 runs: who gets them, and when."""

from __future__ import annotations

from itertools import product
from typing import Final

from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.svm.vmcb import EventInfo, VirtualInterrupt
from undervisor.arch.svm.vmcb import VmcbField as F
from undervisor.arch.x86.events import EventType, Vector
from undervisor.conformance.expect import each, equal, true
from undervisor.conformance.suite import guest_test
from undervisor.conformance.svm.lab import SvmLab
from undervisor.conformance.svm.pending import (
    NMI,
    SELF_INTERRUPT,
    SELF_NMI,
    TO_APIC,
    VECTOR,
    enter,
    timer,
    xapic,
)

MASKING: Final = {F.V_INTR_CONTROL: int(VirtualInterrupt.v_intr_masking)}
INTR: Final = [Intercept.INTR]
MOMENTS: Final = (20000, 2_000_000, 200_000_000)
"""Counts of a timer: a machine in a hurry may need more of them to get into L2 before the end."""


@guest_test("APM: INTR Intercept", "APM: Virtual Interrupts, V_INTR_MASKING")
def the_interrupt_flag_that_masking_names_decides(lab: SvmLab) -> None:
    """A pending interrupt exits if IF is set: the host's with V_INTR_MASKING, else the guest's."""
    xapic(lab)
    lab.code("nop; nop")
    got, wanted = {}, {}
    for masking, host, guest in product((False, True), repeat=3):
        changes = (MASKING if masking else {}) | {F.RFLAGS: 0x202 if guest else 2}
        entered = enter(lab, SELF_INTERRUPT, changes, wants=INTR, interrupts=host)
        case = f"masking {masking}, host IF {host}, guest IF {guest}"
        got[case] = (entered.run.code, entered.held, entered.taken)
        exits = host if masking else guest
        wanted[case] = (ExitCode.INTR if exits else ExitCode.VMMCALL, 0, int(host))
    each("the exit, and deliveries before and after STGI", got, lambda case: wanted[case])


@guest_test("APM: INTR Intercept", "APM: #VMEXIT")
def an_interrupt_exits_before_l2s_first_instruction(lab: SvmLab) -> None:
    """An interrupt that waits at VMRUN exits at once, and stays pending for L1."""
    xapic(lab)
    lab.code("movl $1, DATA")
    lab.write_u32(lab.places.data, 0)
    entered = enter(lab, SELF_INTERRUPT, MASKING, wants=INTR)
    entered.run.exits_with(ExitCode.INTR)
    equal("RIP", entered.run.rip, lab.places.code)
    equal("what L2 would have written", lab.read_u32(lab.places.data), 0)
    equal("deliveries to L1 after STGI", entered.taken, 1)


@guest_test("APM: INTR Intercept", "APM: Intercept Operation")
def an_interrupt_that_is_not_intercepted_is_l2s(lab: SvmLab) -> None:
    """Without the INTR intercept L2's own IDT gets the interrupt, and L1 nothing."""
    xapic(lab)
    lab.code("nop; nop")
    entered = enter(lab, SELF_INTERRUPT, {F.RFLAGS: 0x202})
    entered.run.delivers(VECTOR)
    equal("deliveries to L1", entered.taken, 0)


@guest_test("APM: INTR Intercept")
def sti_in_l2_opens_the_window(lab: SvmLab) -> None:
    """Without V_INTR_MASKING a pending interrupt exits when L2 sets IF, behind STI's shadow."""
    xapic(lab)
    lab.code("nop; sti; nop; nop; nop")
    entered = enter(lab, SELF_INTERRUPT, wants=INTR)
    entered.run.exits_with(ExitCode.INTR)
    equal("RFLAGS.IF", entered.run[F.RFLAGS] >> 9 & 1, 1)
    true("the exit must come behind STI or the instruction after it, RIP in L2's code",
         entered.run.rip - lab.places.code in (2, 3), entered.run.rip)  # fmt: skip


@guest_test("APM: INTR Intercept", seconds=5)
def an_interrupt_stops_a_busy_l2(lab: SvmLab) -> None:
    """An interrupt that arrives while L2 computes exits, and L1 takes it when it sets GIF."""
    xapic(lab)
    lab.code("1: inc %rbx; jmp 1b")
    entered = enter(lab, timer(), MASKING, wants=INTR)
    entered.run.exits_with(ExitCode.INTR)
    equal("deliveries before and after STGI", (entered.held, entered.taken), (0, 1))


@guest_test("APM: INTR Intercept", "APM: HLT Intercept", seconds=5)
def an_interrupt_ends_l2s_halt(lab: SvmLab) -> None:
    """An L2 that halts, HLT not intercepted, is woken by an interrupt: the exit is behind HLT."""
    xapic(lab)
    lab.code("hlt; nop")
    for counts in MOMENTS:
        entered = enter(lab, timer(counts), MASKING, wants=INTR, without=[Intercept.HLT])
        entered.run.exits_with(ExitCode.INTR)
        if entered.run.rip != lab.places.code:  # or else it came before L2 halted
            break
    equal("RIP behind HLT", entered.run.rip, lab.places.code + 1)


@guest_test("APM: HLT Intercept", "APM: INTR Intercept", seconds=5)
def an_interrupt_that_is_l2s_ends_its_halt(lab: SvmLab) -> None:
    """HLT in L2, neither HLT nor INTR intercepted, waits for the interrupt and goes on in L2."""
    xapic(lab)
    lab.code("sti; hlt; nop")
    entered = enter(lab, timer(), without=[Intercept.HLT])
    entered.run.delivers(VECTOR)
    equal("deliveries to L1", entered.taken, 0)


@guest_test("APM: NMI Intercept", "APM: Global Interrupt Flag")
def an_nmi_exits_by_its_intercept(lab: SvmLab) -> None:
    """A pending NMI waits for GIF, exits from L2 with NMI, and is L1's when it sets GIF again."""
    xapic(lab)
    lab.code("nop")
    entered = enter(lab, SELF_NMI, wants=[Intercept.NMI], vector=NMI)
    entered.run.exits_with(ExitCode.NMI)
    equal("RIP", entered.run.rip, lab.places.code)
    equal("deliveries before and after STGI", (entered.held, entered.taken), (0, 1))


@guest_test("APM: NMI Intercept")
def an_nmi_that_is_not_intercepted_is_l2s(lab: SvmLab) -> None:
    """Without the intercept L2's own handler of vector 2 gets the NMI, and L1 nothing."""
    xapic(lab)
    lab.code("nop")
    entered = enter(lab, SELF_NMI, vector=NMI)
    entered.run.delivers(Vector.NMI)
    equal("deliveries to L1", entered.taken, 0)


@guest_test("APM: NMI Intercept", "APM: INTR Intercept")
def an_nmi_comes_before_an_interrupt(lab: SvmLab) -> None:
    """With an NMI and an interrupt pending the exit is NMI."""
    xapic(lab)
    lab.code("nop")
    wants = [Intercept.NMI, Intercept.INTR]
    enter(lab, SELF_INTERRUPT + SELF_NMI, MASKING, wants=wants).run.exits_with(ExitCode.NMI)


@guest_test("APM: Global Interrupt Flag", "APM: CLGI", "APM: STGI")
def clear_gif_holds_interrupts_and_nmis(lab: SvmLab) -> None:
    """While GIF is 0 neither an interrupt, though IF is 1, nor an NMI is taken; STGI lets both."""
    xapic(lab)
    counts = [f"{lab.block.counts + 4 * vector:#x}" for vector in (VECTOR, NMI)]
    code = f"""
        clgi; {TO_APIC} {SELF_INTERRUPT} {SELF_NMI} sti; nop; nop
        mov {counts[0]}, %r12d; mov {counts[1]}, %r13d
        stgi; nop; nop; cli
        mov {counts[0]}, %r14d; mov {counts[1]}, %r15d
    """
    answer = lab.call(code, {}, ["r12", "r13", "r14", "r15"]).value
    equal("deliveries while GIF is 0", (answer["r12"], answer["r13"]), (0, 0))
    equal("deliveries after STGI", (answer["r14"], answer["r15"]), (1, 1))


@guest_test("APM: Global Interrupt Flag", "APM: VMRUN Instruction")
def vmrun_sets_gif(lab: SvmLab) -> None:
    """VMRUN sets GIF, whatever it was: an interrupt that GIF held reaches L2."""
    xapic(lab)
    lab.code("nop; nop")
    entered = enter(lab, SELF_INTERRUPT, {F.RFLAGS: 0x202}, interrupts=False)
    entered.run.delivers(VECTOR)


def _gif_after(lab: SvmLab, code: ExitCode) -> None:
    """VMRUN with GIF and IF set; an interrupt that L1 sends itself afterwards waits for STGI."""
    count = f"{lab.block.counts + 4 * VECTOR:#x}"
    lab.write_u32(lab.block.counts + 4 * VECTOR, 0)
    text = f"""
        stgi; sti; vmrun %rax; {TO_APIC} {SELF_INTERRUPT} nop; nop
        mov {count}, %r12d; stgi; nop; nop; cli; mov {count}, %r13d
    """
    with lab.batch() as batch:
        batch.vmsave(lab.places.scratch)
        ran = batch.call(lab.assemble(text), {"rax": lab.places.control}, ["r12", "r13"])
        run = lab.plan_reading(batch)
    run.exits_with(code)
    equal("deliveries before and after STGI", (ran.value["r12"], ran.value["r13"]), (0, 1))


@guest_test("APM: #VMEXIT", "APM: Global Interrupt Flag")
def gif_is_clear_after_an_exit(lab: SvmLab) -> None:
    """#VMEXIT clears GIF, though it was set before VMRUN."""
    xapic(lab)
    lab.code("nop")
    lab.run().ends()
    lab.write_u64(lab.places.control + F.RIP, lab.places.code)
    _gif_after(lab, ExitCode.VMMCALL)


@guest_test("APM: VMRUN Instruction", "APM: #VMEXIT", "APM: Global Interrupt Flag")
def gif_is_clear_after_a_failed_vmrun(lab: SvmLab) -> None:
    """VMEXIT_INVALID leaves GIF clear like every #VMEXIT, though it was set before VMRUN."""
    xapic(lab)
    lab.code("nop")
    lab.run(None, {F.GUEST_ASID: 0}).is_invalid()
    _gif_after(lab, ExitCode.INVALID)


@guest_test("APM: Global Interrupt Flag", "APM: CLGI")
def clgi_in_l2_holds_interrupts_off(lab: SvmLab) -> None:
    """CLGI that is not intercepted clears L2's GIF: an interrupt exits only behind its STGI."""
    xapic(lab)
    lab.write_u32(lab.places.data, 0)
    lab.code(f"clgi; {TO_APIC} {SELF_INTERRUPT} sti; nop; nop; incl DATA; stgi; nop; incl DATA")
    entered = enter(lab, "", wants=INTR)
    entered.run.exits_with(ExitCode.INTR)
    equal("how far L2 came", lab.read_u32(lab.places.data), 1)


@guest_test("APM: Event Injection", "APM: INTR Intercept")
def an_injected_event_comes_before_a_pending_interrupt(lab: SvmLab) -> None:
    """The injected event is delivered first; the exit is at its handler, EXITINTINFO empty."""
    xapic(lab)
    lab.code("nop")
    inject = int(EventInfo.v) | EventType.EXTERNAL_INTERRUPT << 8 | 0x80
    entered = enter(lab, SELF_INTERRUPT, MASKING | {F.EVENTINJ: inject}, wants=INTR)
    entered.run.exits_with(ExitCode.INTR)
    equal("the vector at whose handler L2 stopped", lab.vector_of(entered.run.rip), 0x80)
    equal("EXITINTINFO.V", entered.run[F.EXITINTINFO] >> 31 & 1, 0)


@guest_test("APM: VMRUN Instruction", "APM: Interrupt Shadows")
def the_hosts_shadow_of_sti_ends_with_vmrun(lab: SvmLab) -> None:
    """STI directly before VMRUN: no interrupt comes between, and it exits from L2."""
    xapic(lab)
    lab.code("nop")
    count = f"{lab.block.counts + 4 * VECTOR:#x}"
    code = f"""
        {TO_APIC} {SELF_INTERRUPT} sti; vmrun %rax; mov {count}, %r13d; stgi; nop; cli
        mov {count}, %r14d
    """
    with lab.batch() as batch:
        lab.plan_launch(batch, bytes(lab.area(MASKING, INTR)))
        batch.vmsave(lab.places.scratch)
        ran = batch.call(lab.assemble(code), {"rax": lab.places.control}, ["r13", "r14"])
        run = lab.plan_reading(batch)
    run.exits_with(ExitCode.INTR)
    equal("deliveries before and after STGI", (ran.value["r13"], ran.value["r14"]), (0, 1))


@guest_test("APM: INTR Intercept", "APM: NMI Intercept", "APM: SMI Intercept")
def what_does_not_arrive_does_not_exit(lab: SvmLab) -> None:
    """With every intercept of an event from outside, an L2 to which none comes runs undisturbed."""
    xapic(lab)
    wants = [Intercept.INTR, Intercept.NMI, Intercept.SMI, Intercept.INIT, Intercept.VINTR]
    for masking in ({}, MASKING):
        lab.code("sti; nop; mov %cr8, %rbx; mov %rbx, %cr8; nop; cli; mov %rbx, %cr8; nop")
        entered = enter(lab, "", masking, wants=wants)
        entered.run.ends()
