"""APIC virtualization: what L2's accesses read, change and cause."""

from __future__ import annotations

from typing import Final

from undervisor.arch.vmx.controls import PrimaryControls, SecondaryControls
from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.conformance.expect import each, equal
from undervisor.conformance.suite import guest_test
from undervisor.conformance.vmx.lab import Changes, VmxLab
from undervisor.conformance.vmx.needs import EPT, control

SHADOW: Final = control(PrimaryControls, "use_tpr_shadow")
ACCESSES: Final = control(SecondaryControls, "virtualize_apic_accesses")
REGISTERS: Final = control(SecondaryControls, "apic_register_virtualization")
X2APIC: Final = control(SecondaryControls, "virtualize_x2apic_mode")
DELIVERY: Final = control(SecondaryControls, "virtual_interrupt_delivery")
TPR, EOI, ICR, ICR_HIGH, SELF_IPI, PPR = 0x80, 0xB0, 0x300, 0x310, 0x3F0, 0xA0
READ, WRITE, FETCH, EVENT = (kind << 12 for kind in range(4))
APIC_ACCESS: Final = ExitReason.APIC_ACCESS
SIGNATURE: Final = 0x12345678
GP: Final = 13
WRITABLE: Final = {
    0x20, TPR, EOI, 0xD0, 0xE0, 0xF0, 0x280, ICR, ICR_HIGH,
    0x320, 0x330, 0x340, 0x350, 0x360, 0x370, 0x380, 0x3E0,
}  # fmt: skip
"""SDM, "Virtualizing Writes to the APIC-Access Page": with APIC-register virtualization."""
READABLE: Final = WRITABLE | {0x30} | set(range(0x100, 0x280, 0x10))
"""SDM, "Virtualizing Reads from the APIC-Access Page"."""
OFFSETS: Final = range(0, 0x400, 0x10)


class Apic:
    """Fields that virtualize L2's APIC; `page` is the virtual-APIC page, `access` L2's."""

    def __init__(
        self, lab: VmxLab, *, accesses: int = 1, status: int | None = None, **secondary: int
    ) -> None:
        self.lab, self.page, self.access = lab, lab.places.apic_page, lab.places.free + 0x2000
        base = lab.primary(use_tpr_shadow=1, cr8_load_exiting=0, cr8_store_exiting=0)
        if accesses or secondary:
            base = lab.secondary(base, virtualize_apic_accesses=accesses, **secondary)
        if status is not None:
            base = lab.pin(base, external_interrupt_exiting=1)
            base |= {F.GUEST_INTERRUPT_STATUS: status}
            base |= {F.EOI_EXIT_BITMAP_0 + 2 * n: 0 for n in range(4)}
        lab.fill(self.page, 0x1000)
        lab.fill(self.access, 0x1000, 0xEE)
        self.fields: Changes = base | {
            F.VIRTUAL_APIC_ADDRESS: self.page, F.APIC_ACCESS_ADDRESS: self.access,
            F.TPR_THRESHOLD: 0,
        }  # fmt: skip

    def __setitem__(self, offset: int, value: int) -> None:
        self.lab.write_u32(self.page + offset, value)

    def __getitem__(self, offset: int) -> int:
        return self.lab.read_u32(self.page + offset)


# -- the TPR shadow --------------------------------------------------------------------------------


@guest_test("SDM: Virtualizing CR8-Based TPR Accesses", needs=[SHADOW])
def cr8_is_bits_7_to_4_of_the_virtual_tpr(lab: VmxLab) -> None:
    """With a TPR shadow MOV CR8 reads and writes VTPR on the virtual-APIC page; L1's TPR stays.

    A reserved bit of CR8 is #GP(0).
    """
    apic = Apic(lab, accesses=0)
    lab.l1.write_cr(8, 2)
    apic[TPR] = SIGNATURE
    run = lab.run("mov %cr8, %rax; mov %rbx, %cr8", apic.fields, {"rbx": 0xA})
    run.ends()
    equal("CR8 as L2 reads it, VTPR and L1's CR8",
          (run.registers["rax"], apic[TPR], lab.l1.read_cr(8).value), (7, 0xA0, 2))  # fmt: skip
    lab.run("mov %rbx, %cr8", apic.fields, {"rbx": 0x10}).delivers(GP)


@guest_test("SDM: TPR Virtualization", needs=[SHADOW])
def a_tpr_below_the_threshold_exits_behind_the_write(lab: VmxLab) -> None:
    """MOV to CR8 that brings VTPR below the TPR threshold exits behind it, reason 43; else not."""
    apic = Apic(lab, accesses=0)
    fields = apic.fields | {F.TPR_THRESHOLD: 5}
    apic[TPR] = 0x90
    lab.run("mov %rax, %cr8; nop", fields, {"rax": 5}).exits_with(ExitReason.VMCALL)
    run = lab.run("mov %rax, %cr8; nop", fields, {"rax": 4})
    run.exits_with(ExitReason.TPR_BELOW_THRESHOLD)
    equal("RIP", run.rip, lab.places.code + len(lab.assemble("mov %rax, %cr8")))


@guest_test("SDM: VM Exits Induced by the TPR Threshold", needs=[SHADOW, ACCESSES])
def an_entry_below_the_threshold_exits_at_once(lab: VmxLab) -> None:
    """An entry with VTPR below the threshold exits before an instruction: reason 43."""
    apic = Apic(lab)
    for vtpr, reason in ((0x4F, ExitReason.TPR_BELOW_THRESHOLD), (0x50, ExitReason.VMCALL)):
        apic[TPR] = vtpr
        run = lab.run("", apic.fields | {F.TPR_THRESHOLD: 5})
        run.exits_with(reason)
        equal("RIP", run.rip, lab.places.code)


# -- the APIC-access page --------------------------------------------------------------------------


@guest_test("SDM: Virtualizing Reads from the APIC-Access Page", needs=[SHADOW, ACCESSES],
            cases={"TPR only": 0, "all registers": 1})  # fmt: skip
def a_read_is_virtualized_or_exits(lab: VmxLab, registers: int) -> None:
    """A read of VTPR, and with APIC-register virtualization of most registers, comes from the page.

    Any other is an APIC-access exit with the offset and access type 0.
    """
    if registers:
        lab.needs(SecondaryControls, "apic_register_virtualization")
    apic = Apic(lab, **({"apic_register_virtualization": 1} if registers else {}))
    lab.table(apic.page, len(OFFSETS), SIGNATURE, 0x10, 0x10)
    runs = lab.sweep([apic.fields] * len(OFFSETS), sources=[
        f"mov {apic.access + offset:#x}, %eax" for offset in OFFSETS])  # fmt: skip
    readable = READABLE if registers else {TPR}
    got = {offset: (run.reason, run.qualification if run.reason == APIC_ACCESS else
                    run.registers["rax"])
           for offset, run in zip(OFFSETS, runs, strict=True)}  # fmt: skip
    each("reason, and value or qualification, at", dict(got), lambda offset: (
        (ExitReason.VMCALL, SIGNATURE + offset) if offset in readable
        else (APIC_ACCESS, offset | READ)))  # fmt: skip


@guest_test("SDM: Virtualizing Writes to the APIC-Access Page", "SDM: APIC-Write Emulation",
            needs=[SHADOW, ACCESSES], cases={"TPR only": 0, "all registers": 1})  # fmt: skip
def a_write_is_virtualized_or_exits(lab: VmxLab, registers: int) -> None:
    """A write of VTPR is virtualized; of other registers it exits behind the write, reason 56.

    What is not virtualized is an APIC-access exit with the offset and access type 1.
    """
    if registers:
        lab.needs(SecondaryControls, "apic_register_virtualization")
    apic = Apic(lab, **({"apic_register_virtualization": 1} if registers else {}))
    lab.fill(apic.page, 0x400)
    runs = lab.sweep([apic.fields] * len(OFFSETS), sources=[
        f"mov %eax, {apic.access + offset:#x}" for offset in OFFSETS],
        registers={"rax": SIGNATURE})  # fmt: skip
    got = {offset: (run.reason, run.qualification, apic[offset]) for offset, run in
           zip(OFFSETS, runs, strict=True)}  # fmt: skip

    def want(offset: int) -> tuple[int, int, int]:
        if offset == TPR:
            return ExitReason.VMCALL, 0, SIGNATURE & 0xFF
        if offset not in WRITABLE or not registers:
            return APIC_ACCESS, offset | WRITE, 0
        if offset == ICR_HIGH:
            return ExitReason.VMCALL, 0, SIGNATURE & 0xFF000000
        return ExitReason.APIC_WRITE, offset, SIGNATURE

    each("reason, qualification and the register on the page, at", dict(got), want)


@guest_test("SDM: Virtualizing Memory-Mapped APIC Accesses", needs=[ACCESSES])
def without_a_tpr_shadow_every_access_exits(lab: VmxLab) -> None:
    """With "virtualize APIC accesses" alone each access exits: read, write, event delivery.

    The access type is in bits 15:12; an access of event delivery tells the event.
    """
    access = lab.places.free + 0x2000
    fields = lab.secondary(lab.primary(use_tpr_shadow=0), virtualize_apic_accesses=1)
    fields |= {F.APIC_ACCESS_ADDRESS: access}
    for source, qualification in (
        ("mov (%rbx), %eax", 0x80 | READ), ("mov %eax, (%rbx)", 0x80 | WRITE),
        ("mov 0x40(%rbx), %al", 0xC0 | READ),
    ):  # fmt: skip
        run = lab.run(source, fields, {"rbx": access + TPR})
        run.exits_with(APIC_ACCESS, qualification)
    run = lab.run("ud2", fields | {F.GUEST_RSP: access + 0x800})
    run.exits_with(APIC_ACCESS)
    equal("the access type of event delivery", run.qualification & 0xF000, EVENT)
    equal("the event", run[F.IDT_VECTORING_INFORMATION] & ~(1 << 12), 1 << 31 | 3 << 8 | 6)


@guest_test("SDM: Virtualizing Memory-Mapped APIC Accesses", needs=[ACCESSES])
def a_fetch_from_the_page_exits(lab: VmxLab) -> None:
    """An instruction fetch from the APIC-access page exits with access type 2."""
    access = lab.places.free + 0x2000
    fields = lab.secondary(virtualize_apic_accesses=1) | {F.APIC_ACCESS_ADDRESS: access}
    run = lab.run("jmp *%rbx", fields, {"rbx": access + TPR})
    run.exits_with(APIC_ACCESS, TPR | FETCH)


@guest_test("SDM: Virtualizing Memory-Mapped APIC Accesses", needs=[SHADOW, ACCESSES])
def an_access_beyond_one_register_exits(lab: VmxLab) -> None:
    """An access of more than 32 bits, or that is not within 4 aligned bytes, is not virtualized."""
    apic = Apic(lab)
    for source, qualification in (
        ("mov (%rbx), %rax", TPR | READ),
        ("mov %rax, (%rbx)", TPR | WRITE),
        ("mov 1(%rbx), %eax", TPR + 1 | READ),
        ("mov 3(%rbx), %ax", TPR + 3 | READ),
    ):
        run = lab.run(source, apic.fields, {"rbx": apic.access + TPR})
        run.exits_with(APIC_ACCESS, qualification)


@guest_test("SDM: Secondary Processor-Based VM-Execution Controls", needs=[ACCESSES])
def the_page_is_memory_without_the_control(lab: VmxLab) -> None:
    """With "virtualize APIC accesses" 0 the page is memory like any other, before and after."""
    on, off = Apic(lab), Apic(lab, accesses=0)
    for fields, reason in ((on.fields, APIC_ACCESS), (off.fields, ExitReason.VMCALL),
                           (on.fields, APIC_ACCESS)):  # fmt: skip
        run = lab.run("mov (%rbx), %eax", fields, {"rbx": on.access + 0x10})
        run.exits_with(reason)
        if reason == ExitReason.VMCALL:
            equal("what L2 reads", run.registers["rax"], 0xEEEEEEEE)


@guest_test("SDM: Virtualizing Memory-Mapped APIC Accesses", "SDM: EPT Violations",
            needs=[ACCESSES, EPT])  # fmt: skip
def an_ept_violation_comes_before_the_apic_access(lab: VmxLab) -> None:
    """With EPT the page is the one that the translation leads to, and violations come first."""
    apic = Apic(lab)
    fields = apic.fields | lab.ept(12)
    fields |= lab.secondary(apic.fields, enable_ept=1)
    run = lab.run("mov (%rbx), %eax", fields, {"rbx": apic.access + 0x10})
    run.exits_with(APIC_ACCESS, 0x10 | READ)
    lab.write_u64(lab.nested_entry(apic.access), 0)
    lab.l1.invept(1, fields[F.EPT_POINTER])
    run = lab.run("mov (%rbx), %eax", fields, {"rbx": apic.access + 0x10})
    run.exits_with(ExitReason.EPT_VIOLATION)
