"""APIC virtualization by MSRs, and virtual interrupts."""

from __future__ import annotations

from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.msr import Msr
from undervisor.conformance.expect import each, equal, true
from undervisor.conformance.lab import gate
from undervisor.conformance.suite import guest_test
from undervisor.conformance.vmx.apic import (
    ACCESSES,
    DELIVERY,
    EOI,
    GP,
    ICR,
    PPR,
    REGISTERS,
    SELF_IPI,
    SHADOW,
    TPR,
    X2APIC,
    Apic,
)
from undervisor.conformance.vmx.lab import VmxLab
from undervisor.conformance.vmx.needs import misc

# -- x2APIC mode -----------------------------------------------------------------------------------


def _x2apic(lab: VmxLab, **more: int) -> Apic:
    apic = Apic(lab, accesses=0, virtualize_x2apic_mode=1, **more)
    apic.fields |= lab.primary(apic.fields, use_msr_bitmaps=1)
    lab.fill(lab.places.msr, 0x1000)
    return apic


@guest_test("SDM: Virtualizing MSR-Based APIC Accesses", needs=[SHADOW, X2APIC])
def the_virtual_tpr_is_an_msr(lab: VmxLab) -> None:
    """With "virtualize x2APIC mode" MSR 808H is VTPR: 64 bits read, 8 written, others #GP(0)."""
    apic = _x2apic(lab)
    lab.write_u64(apic.page + TPR, 0x1122334400000030)
    run = lab.run("rdmsr; mov %eax, %esi; mov %edx, %edi; mov $0x77, %eax; xor %edx, %edx; wrmsr",
                  apic.fields, {"rcx": 0x808})  # fmt: skip
    run.ends()
    got = run.registers["rsi"], run.registers["rdi"], apic[TPR]
    equal("VTPR as read and as written", got, (0x30, 0x11223344, 0x77))
    lab.run("wrmsr", apic.fields, {"rcx": 0x808, "rax": 0x177, "rdx": 0}).delivers(GP)


@guest_test("SDM: Virtualizing MSR-Based APIC Accesses", needs=[SHADOW, X2APIC, REGISTERS])
def every_x2apic_msr_reads_from_the_page(lab: VmxLab) -> None:
    """With APIC-register virtualization RDMSR of 800H to 8FFH reads the virtual-APIC page."""
    apic = _x2apic(lab, apic_register_virtualization=1)
    numbers = (0x800, 0x802, 0x80B, 0x830, 0x83F, 0x840, 0x8FF)
    for number in numbers:
        lab.write_u64(apic.page + (number & 0xFF) * 16, 0x55 << 32 | number)
    runs = lab.sweep([apic.fields] * len(numbers),
                     sources=[f"mov ${number:#x}, %ecx; rdmsr" for number in numbers])  # fmt: skip
    each("EDX and EAX of", {n: (run.registers["rdx"], run.registers["rax"]) for n, run in
                            zip(numbers, runs, strict=True)}, lambda n: (0x55, n))  # fmt: skip


@guest_test("SDM: Virtualizing MSR-Based APIC Accesses", needs=[SHADOW, X2APIC])
def l2_does_not_reach_l1s_apic_where_x2apic_mode_is_virtualized(lab: VmxLab) -> None:
    """What "virtualize x2APIC mode" does not virtualize and L1's bitmap withholds exits.

    L1's own APIC in x2APIC mode is neither read nor written by L2.
    """
    base = lab.l1.rdmsr(Msr.APIC_BASE).value
    if not lab.l1.cpuid(1).value["rcx"] >> 21 & 1:
        base = 0
    apic = _x2apic(lab)
    lab.write(lab.places.msr + 0x100, b"\xff" * 0x20)
    lab.write(lab.places.msr + 0x900, b"\xff" * 0x20)
    if base:
        lab.l1.wrmsr(Msr.APIC_BASE, base | 1 << 10)
    for text, reason in (("rdmsr", ExitReason.RDMSR), ("wrmsr", ExitReason.WRMSR)):
        for msr in (0x802, 0x80D, 0x80F, 0x830):
            lab.run(text, apic.fields, {"rcx": msr}).exits_with(reason)


@guest_test("SDM: Virtualizing MSR-Based APIC Accesses", "SDM: Self-IPI Virtualization",
            "SDM: EOI Virtualization", needs=[SHADOW, X2APIC, DELIVERY])  # fmt: skip
def self_ipis_and_eois_are_msrs(lab: VmxLab) -> None:
    """WRMSR of 83FH is a self-IPI, of 80BH an EOI: no exit, but for a vector below 16.

    Bits 31:8 of the one and any bit of the other are #GP(0).
    """
    apic = _x2apic(lab, virtual_interrupt_delivery=1)
    apic.fields |= lab.pin(apic.fields, external_interrupt_exiting=1)
    apic.fields |= {F.EOI_EXIT_BITMAP_0 + 2 * n: 0 for n in range(4)}
    apic.fields |= {F.GUEST_INTERRUPT_STATUS: 0}
    handler = lab.places.code + 0x8000
    lab.code("incl DATA; mov $0x80b, %ecx; xor %eax, %eax; wrmsr; iretq", handler, end="")
    for vector in (0x51, 0x52):
        lab.write(lab.places.idt + 16 * vector, gate(handler))
    lab.fill(lab.places.data, 8)
    code = "mov $0x83f, %ecx; xor %edx, %edx; mov $0x51, %eax; wrmsr; inc %eax; wrmsr; sti; nop"
    run = lab.run(f"{code}; nop; nop", apic.fields, reads=[F.GUEST_INTERRUPT_STATUS])
    run.ends()
    equal("the interrupts that L2 took", lab.read_u32(lab.places.data), 2)
    equal("the guest interrupt status", run[F.GUEST_INTERRUPT_STATUS], 0)
    for msr, value in ((0x83F, 0x151), (0x80B, 1)):
        lab.run("wrmsr", apic.fields, {"rcx": msr, "rax": value, "rdx": 0}).delivers(GP)
    run = lab.run("wrmsr", apic.fields, {"rcx": 0x83F, "rax": 0xF, "rdx": 0})
    run.exits_with(ExitReason.APIC_WRITE, SELF_IPI)
    equal("VICR", apic[SELF_IPI], 0xF)


# -- virtual interrupts ----------------------------------------------------------------------------


def delivering(lab: VmxLab, status: int = 0) -> Apic:
    """APIC virtualization with virtual-interrupt delivery, and its guest interrupt status."""
    registers = {"apic_register_virtualization": 1} if REGISTERS.present(lab) else {}
    return Apic(lab, status=status, virtual_interrupt_delivery=1, **registers)


@guest_test("SDM: Virtual-Interrupt Delivery", needs=[SHADOW, ACCESSES, DELIVERY])
def a_pending_virtual_interrupt_is_delivered(lab: VmxLab) -> None:
    """What RVI names is delivered when the window opens: VISR, SVI and VPPR follow, VIRR forgets.

    A virtual task priority of its class, and RFLAGS.IF = 0, hold it back.
    """
    apic = delivering(lab, 0x41)
    apic[0x220] = 2
    fields = apic.fields | {F.GUEST_RFLAGS: 0x202}
    run = lab.run("nop", fields, reads=[F.GUEST_INTERRUPT_STATUS])
    run.delivers(0x41)
    equal("the guest interrupt status", run[F.GUEST_INTERRUPT_STATUS], 0x4100)
    equal("VIRR, VISR and VPPR", (apic[0x220], apic[0x120], apic[PPR]), (0, 2, 0x40))
    apic = delivering(lab, 0x41)
    apic[0x220], apic[TPR] = 2, 0x4F
    lab.run("nop", fields).ends()
    apic[TPR] = 0x3F
    run = lab.run("nop; sti; nop; nop", apic.fields)
    run.delivers(0x41)
    equal("the RIP that was pushed, behind the shadow of STI",
          lab.read_u64(run[F.GUEST_RSP]), lab.places.code + 3)  # fmt: skip


@guest_test("SDM: Virtual-Interrupt Delivery", "SDM: Activity State",
            needs=[SHADOW, ACCESSES, DELIVERY, misc("activity_hlt")], seconds=5)  # fmt: skip
def a_virtual_interrupt_ends_hlt(lab: VmxLab) -> None:
    """A virtual interrupt that is pending at an entry into HLT is delivered, and L2 is active."""
    apic = delivering(lab, 0x41)
    apic[0x220] = 2
    fields = apic.fields | {F.GUEST_RFLAGS: 0x202, F.GUEST_ACTIVITY_STATE: 1}
    lab.write(lab.stub(0x41), lab.assemble("incl DATA; vmcall"))
    lab.fill(lab.places.data, 8)
    run = lab.run("nop", lab.primary(fields, hlt_exiting=0))
    run.exits_with(ExitReason.VMCALL)
    equal("the handler's work", lab.read_u32(lab.places.data), 1)
    equal("the activity state", run[F.GUEST_ACTIVITY_STATE], 0)


@guest_test("SDM: Self-IPI Virtualization", "SDM: EOI Virtualization",
            needs=[SHADOW, ACCESSES, DELIVERY])  # fmt: skip
def self_ipis_and_eois_need_no_exit(lab: VmxLab) -> None:
    """A self-IPI by ICR is delivered in L2, and its EOI delivers the next: no exit in between."""
    apic = delivering(lab)
    handler = lab.places.code + 0x8000
    lab.code(f"incl {lab.places.data:#x}; movl $0, {apic.access + EOI:#x}; iretq", handler, end="")
    for vector in (0x51, 0x52):
        lab.write(lab.places.idt + 16 * vector, gate(handler))
    lab.fill(lab.places.data, 8)
    icr = apic.access + ICR
    run = lab.run(f"movl $0x40051, {icr:#x}; movl $0x40052, {icr:#x}; sti; nop; nop; nop",
                  apic.fields, reads=[F.GUEST_INTERRUPT_STATUS])  # fmt: skip
    run.ends()
    equal("the interrupts that L2 took", lab.read_u32(lab.places.data), 2)
    equal("the guest interrupt status", run[F.GUEST_INTERRUPT_STATUS], 0)
    run = lab.run("mov %eax, (%rbx)", apic.fields, {"rbx": icr, "rax": 0x51})
    run.exits_with(ExitReason.APIC_WRITE, ICR)


@guest_test("SDM: Virtual-Interrupt Delivery", needs=[SHADOW, ACCESSES, DELIVERY])
def a_virtual_interrupt_is_delivered_once(lab: VmxLab) -> None:
    """A handler that returns without EOI is not called again, and no other vector is."""
    apic = delivering(lab, 0x41)
    apic[0x220] = 2
    lab.write(lab.stub(0x41), lab.assemble("incl DATA; iretq"))
    lab.fill(lab.places.data, 8)
    run = lab.run("nop; nop; nop", apic.fields | {F.GUEST_RFLAGS: 0x202},
                  reads=[F.GUEST_INTERRUPT_STATUS])  # fmt: skip
    run.ends()
    equal("how often it was called", lab.read_u32(lab.places.data), 1)
    equal("the guest interrupt status", run[F.GUEST_INTERRUPT_STATUS], 0x4100)


@guest_test("SDM: EOI Virtualization", needs=[SHADOW, ACCESSES, DELIVERY])
def an_eoi_in_the_exit_bitmap_exits(lab: VmxLab) -> None:
    """An EOI of a vector whose EOI-exit bit is 1 exits behind the write with the vector."""
    apic = delivering(lab, 0x4100)
    apic[0x120] = 2
    run = lab.run(f"movl $7, {apic.access + EOI:#x}; nop", apic.fields | {F.EOI_EXIT_BITMAP_1: 2},
                  reads=[F.GUEST_INTERRUPT_STATUS])  # fmt: skip
    run.exits_with(ExitReason.VIRTUALIZED_EOI, 0x41)
    true("RIP is behind the write", run.rip > lab.places.code)
    equal("the guest interrupt status", run[F.GUEST_INTERRUPT_STATUS], 0)
    equal("VISR", apic[0x120], 0)
