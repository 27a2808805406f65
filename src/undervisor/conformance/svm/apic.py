"""The local APIC: L2's task priority, and an APIC that L1 keeps from L2 by nested paging."""

from __future__ import annotations

from typing import Final

from undervisor.arch.svm.exits import ExitCode, NestedPageFaultInfo
from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.svm.permissions import msr_bit
from undervisor.arch.svm.vmcb import VirtualInterrupt
from undervisor.arch.svm.vmcb import VmcbField as F
from undervisor.conformance.expect import each, equal
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

Info = NestedPageFaultInfo
P, W, U, FINAL = int(Info.p), int(Info.rw), int(Info.us), int(Info.final_address)
MASKING: Final = int(VirtualInterrupt.v_intr_masking)
TPR, ICR_LOW, VERSION = 0x80, 0x300, 0x30
X2APIC_ICR: Final = 0x830


def apic_page(lab: SvmLab, flags: int) -> dict[F, int]:
    """Nested tables whose 4-KiB entry for the local APIC's page has these bits; identity else."""
    changes, places = lab.npt(21), lab.places
    directory, table = places.nested2, places.nested2 + 0x1000
    lab.table(directory, 512, 3 << 30 | 0x87, 1 << 21)
    lab.write_u64(places.nested + 0x1000 + 8 * 3, directory | 7)
    lab.table(table, 512, APIC & -(1 << 21) | 7, 0x1000)
    lab.write_u64(directory + 8 * (APIC >> 21 & 511), table | 7)
    lab.write_u64(table + 8 * (APIC >> 12 & 511), APIC | flags if flags else 0)
    return changes | {F.TLB_CONTROL: 1}


@guest_test("APM: Nested Paging", "APM: Local APIC", needs=[NPT])
def l2_uses_the_apic_that_l1_gives_it(lab: SvmLab) -> None:
    """An L2 whose nested tables lead to the local APIC reads and writes L1's own."""
    xapic(lab)
    version = lab.l1.peek(APIC + VERSION).value
    run = lab.run(f"{TO_APIC} mov {VERSION}(%rdi), %ebx; movl $0x30, {TPR}(%rdi)",
                  apic_page(lab, 7))  # fmt: skip
    run.ends()
    equal("the version that L2 reads", run.registers["rbx"], version)
    equal("the TPR that L1 reads", lab.l1.peek(APIC + TPR).value, 0x30)
    lab.l1.poke(APIC + TPR, 0)


@guest_test("APM: Nested Paging", "APM: Nested versus Guest Page Faults", needs=[NPT])
def an_apic_that_is_mapped_away_exits_with_its_register(lab: SvmLab) -> None:
    """Where the APIC's page is absent, each access is an NPF with the register's address."""
    xapic(lab)
    begin, got = apic_page(lab, 0), {}
    cases = {
        f"mov {VERSION}(%rdi), %ebx": (U, VERSION), f"mov %ebx, {ICR_LOW}(%rdi)": (U | W, ICR_LOW),
        f"movl $0x4500, {ICR_LOW}(%rdi)": (U | W, ICR_LOW),
    }  # fmt: skip
    for text in cases:
        run = lab.run(text, begin, {"rdi": APIC, "rbx": 0x4500})
        got[text] = (run.code, run.info1, run.info2, run.rip)
    each("exit, EXITINFO1, EXITINFO2, RIP", got, lambda text: (
        ExitCode.NPF, cases[text][0] | FINAL, APIC + cases[text][1], lab.places.code))  # fmt: skip


@guest_test("APM: Nested Paging", "APM: Local APIC", needs=[NPT])
def l1_emulates_l2s_write_of_icr(lab: SvmLab) -> None:
    """With the APIC's page read-only L2 reads it, and L1 sees the ICR write, makes it and goes on.

    The fault has the address, L2's registers have the value: enough to send the interrupt.
    """
    xapic(lab)
    lab.write_u32(lab.block.counts + 4 * VECTOR, 0)
    command = 0x40000 | VECTOR
    run = lab.run(f"mov {VERSION}(%rdi), %esi; mov %ebx, {ICR_LOW}(%rdi); mov $7, %edx",
                  apic_page(lab, 5), {"rdi": APIC, "rbx": command})  # fmt: skip
    run.exits_with(ExitCode.NPF, P | W | U | FINAL, APIC + ICR_LOW)
    equal("the version that L2 read", run.registers["rsi"], lab.l1.peek(APIC + VERSION).value)
    lab.l1.poke(run.info2, run.registers["rbx"])
    lab.l1.call("window", {}, [])
    equal("deliveries to L1", lab.count(VECTOR), 1)
    length = len(lab.assemble(f"mov %ebx, {ICR_LOW}(%rdi)"))
    run = lab.skip(run, length)
    run.ends()
    equal("how far L2 came", run.registers["rdx"], 7)


@guest_test("APM: Decode Assists", "APM: Nested Paging", needs=[NPT, feature("decode_assists")])
def an_apic_fault_brings_the_instruction(lab: SvmLab) -> None:
    """With decode assists the NPF of an ICR write has the bytes of the instruction."""
    xapic(lab)
    text = f"movl $0x4500, {ICR_LOW}(%rdi)"
    code = lab.assemble(text)
    run = lab.run(text, apic_page(lab, 5), {"rdi": APIC})
    run.exits_with(ExitCode.NPF)
    fetched = run[F.GUEST_INSTRUCTION_BYTES].to_bytes(15, "little")
    equal("the bytes that were fetched", fetched[: len(code)], code)


@guest_test("APM: MSR Intercepts", "APM: x2APIC")
def an_x2apic_command_exits_by_the_msr_map(lab: SvmLab) -> None:
    """A WRMSR to the x2APIC's ICR exits by its bit of the map, the command in EDX:EAX."""
    bit = msr_bit(X2APIC_ICR)
    assert bit is not None, "the map covers it"
    lab.set_bit(lab.places.msr, bit + 1)
    run = lab.run("wrmsr", {F.RAX: 0x4500}, {"rcx": X2APIC_ICR, "rdx": 1},
                  wants=[Intercept.MSR_PROT])  # fmt: skip
    run.exits_with(ExitCode.MSR, 1)
    equal("the command", (run.registers["rdx"], run.registers["rax"]), (1, 0x4500))


@guest_test("APM: V_TPR", "APM: Virtual Interrupts, V_INTR_MASKING")
def l2s_v_tpr_is_not_the_apics(lab: SvmLab) -> None:
    """With V_INTR_MASKING a write of CR8 in L2 leaves the APIC's TPR alone; without, it sets it."""
    xapic(lab)
    got = {}
    lab.code("mov $9, %eax; mov %rax, %cr8")
    for name, control in (("with masking", MASKING), ("without", 0)):
        lab.l1.poke(APIC + TPR, 0x20)
        lab.run(None, {F.V_INTR_CONTROL: control}).ends()
        got[name] = lab.l1.peek(APIC + TPR).value
        lab.l1.poke(APIC + TPR, 0)
    each("the APIC's TPR", got, lambda name: 0x20 if name == "with masking" else 0x90)


@guest_test("APM: V_TPR", "APM: INTR Intercept")
def the_apics_priority_decides_about_interrupts_of_l1(lab: SvmLab) -> None:
    """While L2 runs, L1's TPR holds off interrupts of its class and below, whatever V_TPR says."""
    xapic(lab)
    lab.code("nop")
    got = {}
    for cr8, v_tpr in ((6, 0), (5, 0), (4, 15), (0, 15)):
        lab.l1.write_cr(8, cr8)
        changes = {F.V_INTR_CONTROL: MASKING | v_tpr}
        entered = enter(lab, SELF_INTERRUPT, changes, wants=[Intercept.INTR])
        lab.l1.write_cr(8, 0)
        lab.l1.call("window", {}, [])
        got[f"CR8 {cr8}, V_TPR {v_tpr}"] = entered.run.code
    each("the exit with an interrupt of class 5 pending", got, lambda case: (
        ExitCode.INTR if case[4] in "40" else ExitCode.VMMCALL))  # fmt: skip


@guest_test("APM: Interrupt and Local APIC Support", "APM: INTR Intercept")
def an_interrupt_that_exits_is_not_acknowledged(lab: SvmLab) -> None:
    """#VMEXIT(INTR) leaves the interrupt in IRR; ISR gets it when L1 takes it."""
    xapic(lab)
    lab.code("nop")
    irr, isr = APIC + 0x200 + 0x10 * (VECTOR // 32), APIC + 0x100 + 0x10 * (VECTOR // 32)
    with lab.batch() as batch:
        lab.plan_launch(batch, bytes(lab.area({F.RFLAGS: 0x202}, [Intercept.INTR])))
        batch.apic_write(ICR_LOW, 0x40000 | VECTOR)
        run = lab.plan_entry(batch, None)
        pending, served = batch.peek(irr), batch.peek(isr)
        batch.call("window", {}, [])
        later = batch.peek(irr)
    run.exits_with(ExitCode.INTR)
    bit = 1 << VECTOR % 32
    equal("IRR after the exit", pending.value & bit, bit)
    equal("ISR after the exit", served.value & bit, 0)
    equal("IRR after L1 has taken it", later.value & bit, 0)
