"""APIC virtualization: what L2's accesses read, change and cause, by the controls of L1.

SDM 3C "APIC Virtualization and Virtual Interrupts".
"""

import pytest
from vmx_lab import CODE, DATA, FREE, IDT, PD, VALID, Lab

from undervisor.arch.vmx.exits import ExitReason as R
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.conformance.lab import gate
from undervisor.guest.asm import assemble

VAPIC, ACCESS, DESCRIPTOR = FREE, FREE + 0x1000, FREE + 0x2000
TPR, EOI, ICR, ICR_HIGH, SELF_IPI = 0x80, 0xB0, 0x300, 0x310, 0x3F0
READ, WRITE, FETCH, DELIVERY, WALK = (kind << 12 for kind in (0, 1, 2, 3, 15))
READABLE_ALWAYS = {TPR}
WRITABLE = {
    0x20, TPR, EOI, 0xD0, 0xE0, 0xF0, 0x280, ICR, ICR_HIGH,
    0x320, 0x330, 0x340, 0x350, 0x360, 0x370, 0x380, 0x3E0,
}  # fmt: skip
READABLE = WRITABLE | {0x30} | set(range(0x100, 0x280, 0x10))
REGISTERS = range(0, 0x400, 0x10)
SIGNATURE = 0x12345678
ENABLE_ALL = {"virtual_interrupt_delivery": 1, "apic_register_virtualization": 1}


def apic(lab, *, ept=True, shadow=1, accesses=1, primary=None, status=0, **secondary):
    """Fields that virtualize the APIC; `secondary` says how much of it."""
    fields = lab.ept(12) if ept else {}
    fields = lab.secondary(
        fields, enable_ept=int(ept), virtualize_apic_accesses=accesses, **secondary
    )
    cr8 = {"cr8_load_exiting": 0, "cr8_store_exiting": 0} if shadow else {}
    fields = lab.primary(fields, use_tpr_shadow=shadow, **cr8, **(primary or {}))
    if secondary.get("virtual_interrupt_delivery"):
        fields = lab.pin(fields, external_interrupt_exiting=1)
        fields |= {F.GUEST_INTERRUPT_STATUS: status}
        fields |= dict.fromkeys(range(F.EOI_EXIT_BITMAP_0, F.EOI_EXIT_BITMAP_3 + 2, 2), 0)
    lab.fill(VAPIC, 0x1000)
    lab.fill(ACCESS, 0x1000, 0xEE)
    fields |= {F.VIRTUAL_APIC_ADDRESS: VAPIC, F.APIC_ACCESS_ADDRESS: ACCESS, F.TPR_THRESHOLD: 0}
    return fields


def handlers(lab, vector, source):
    """L2's handler of a vector: counts at DATA, then does `source`, then returns."""
    where = CODE + 0x8000
    text = f"incl {DATA:#x}; {source}; iretq"
    lab.write(where, assemble(text, where).bytes)
    lab.write(IDT + 16 * vector, gate(where))
    lab.write(DATA, bytes(64))


@pytest.fixture
def gates(lab):
    """IDT entries that a test changed go back to the stubs."""
    before = lab.read(IDT, 4096)
    yield
    lab.write(IDT, before)


# -- reads of the APIC-access page ----------------------------------------------------------------


@pytest.mark.parametrize("ept", [True, False], ids=["EPT", "no EPT"])
@pytest.mark.parametrize("registers", [0, 1], ids=["TPR only", "all registers"])
def test_reads_are_virtualized_or_exit(lab, ept, registers):
    fields = apic(lab, ept=ept, apic_register_virtualization=registers)
    readable = READABLE if registers else READABLE_ALWAYS
    for offset in REGISTERS if ept else REGISTERS[::4]:
        lab.write_u32(VAPIC + offset, SIGNATURE + offset)
        run = lab.run("mov (%rbx), %eax", fields, {"rbx": ACCESS + offset})
        if offset in readable:
            assert run.reason is R.VMCALL, hex(offset)
            assert run.registers["rax"] == SIGNATURE + offset
        else:
            assert (run.reason, run.qualification) == (R.APIC_ACCESS, offset | READ)
            assert (run.length, run.rip) == (2, CODE)


def test_without_a_tpr_shadow_every_access_exits(lab):
    fields = apic(lab, shadow=0)
    run = lab.run("mov (%rbx), %eax", fields, {"rbx": ACCESS + TPR})
    assert (run.reason, run.qualification) == (R.APIC_ACCESS, TPR | READ)
    run = lab.run("mov %eax, (%rbx)", fields, {"rbx": ACCESS + TPR})
    assert (run.reason, run.qualification) == (R.APIC_ACCESS, TPR | WRITE)


@pytest.mark.parametrize(
    ("source", "offset", "kind"),
    [
        ("mov (%rbx), %rax", TPR, READ),
        ("mov %rax, (%rbx)", TPR, WRITE),
        ("mov (%rbx), %eax", TPR + 1, READ),
        ("mov 2(%rbx), %ax", TPR + 1, READ),
        ("movups (%rbx), %xmm0", TPR, READ),
        ("movups %xmm0, (%rbx)", TPR, WRITE),
    ],
)
def test_an_access_beyond_the_register_exits(lab, source, offset, kind):
    run = lab.run(source, apic(lab), {"rbx": ACCESS + offset})
    at = offset + (2 if source.startswith("mov 2") else 0)
    assert (run.reason, run.qualification) == (R.APIC_ACCESS, at | kind)


def test_an_instruction_that_is_not_virtualized_exits(lab):
    run = lab.run("pushq (%rbx)", apic(lab), {"rbx": ACCESS + TPR})
    assert (run.reason, run.qualification) == (R.APIC_ACCESS, TPR | READ)
    run = lab.run("cmpl $5, (%rbx); incl (%rbx)", apic(lab), {"rbx": ACCESS + TPR})
    assert (run.reason, run.qualification & 0xFFF) == (R.APIC_ACCESS, TPR)
    assert run.rip == CODE + 3


def test_arithmetic_on_the_tpr_is_virtualized(lab):
    fields = apic(lab)
    lab.write_u32(VAPIC + TPR, 0x30)
    run = lab.run("orl $0x41, (%rbx); andl $0x7f, (%rbx)", fields, {"rbx": ACCESS + TPR})
    assert (run.reason, lab.read_u32(VAPIC + TPR)) == (R.VMCALL, 0x71)


def test_string_moves_go_through_the_page(lab):
    fields = apic(lab, apic_register_virtualization=1)
    lab.write_u32(VAPIC + 0x20, SIGNATURE)
    registers = {"rsi": ACCESS + 0x20, "rdi": DATA, "rcx": 1}
    run = lab.run("rep movsl", fields, registers)
    assert (run.reason, lab.read_u32(DATA)) == (R.VMCALL, SIGNATURE)
    registers = {"rsi": DATA, "rdi": ACCESS + 0x380, "rcx": 2}
    run = lab.run("rep movsl", fields, registers)
    assert (run.reason, run.qualification) == (R.APIC_WRITE, 0x380)
    assert (run.registers["rcx"], run.rip) == (1, CODE)
    run = lab.resume({}, run.registers)
    assert (run.reason, run.qualification) == (R.APIC_ACCESS, 0x384 | WRITE)


def test_vmxoff_gives_the_page_back():
    lab = Lab()
    assert (
        lab.run("mov (%rbx), %eax", apic(lab, ept=False), {"rbx": ACCESS}).reason is R.APIC_ACCESS
    )
    assert lab.vcpu.window is not None
    lab.l1.vmxoff()
    assert lab.vcpu.window is None
    assert lab.vcpu.nested.flat is None


def test_parts_of_a_register_are_read(lab):
    fields = apic(lab)
    lab.write_u32(VAPIC + TPR, SIGNATURE)
    run = lab.run("movzbl 1(%rbx), %eax; movzwl 2(%rbx), %ecx", fields, {"rbx": ACCESS + TPR})
    assert (run.registers["rax"], run.registers["rcx"]) == (0x56, 0x1234)


def test_a_fetch_exits(lab):
    run = lab.run("jmp *%rbx", apic(lab), {"rbx": ACCESS + 0x123})
    assert (run.reason, run.qualification) == (R.APIC_ACCESS, 0x123 | FETCH)


@pytest.mark.parametrize("ept", [True, False])
def test_an_access_during_event_delivery_exits_with_the_event(lab, ept):
    fields = apic(lab, ept=ept) | {F.GUEST_RSP: ACCESS + 0x800}
    run = lab.run("ud2", fields)
    assert run.reason is R.APIC_ACCESS
    assert run.qualification & 0xF000 == DELIVERY
    assert run[F.IDT_VECTORING_INFORMATION] == VALID | 3 << 8 | 6


def test_an_access_of_a_page_walk_exits(lab):
    """L2's page directory lies in the APIC-access page."""
    fields = apic(lab) | {F.GUEST_CR3: lab.pages(), F.APIC_ACCESS_ADDRESS: PD}
    run = lab.run("nop", fields)
    assert (run.reason, run.qualification & 0xF000) == (R.APIC_ACCESS, WALK)


def test_two_mappings_of_the_page_are_alike(lab):
    fields = apic(lab)
    lab.write_u64(lab.nested_entry(ACCESS + 0x1000), ACCESS | 0x37)
    lab.write_u32(VAPIC + TPR, 0x50)
    run = lab.run("mov (%rbx), %eax", fields, {"rbx": ACCESS + 0x1000 + TPR})
    assert (run.reason, run.registers["rax"]) == (R.VMCALL, 0x50)


def test_the_page_is_memory_when_the_control_is_0(lab):
    run = lab.run("mov (%rbx), %eax", apic(lab), {"rbx": ACCESS + 0x10})
    assert run.reason is R.APIC_ACCESS
    run = lab.run("mov (%rbx), %eax", apic(lab, accesses=0), {"rbx": ACCESS + 0x10})
    assert (run.reason, run.registers["rax"]) == (R.VMCALL, 0xEEEEEEEE)
    run = lab.run("mov (%rbx), %eax", apic(lab), {"rbx": ACCESS + 0x10})
    assert run.reason is R.APIC_ACCESS


def test_an_ept_violation_comes_first(lab):
    fields = apic(lab)
    where = lab.nested_entry(ACCESS)
    lab.write_u64(where, lab.read_u64(where) & ~7)
    run = lab.run("mov (%rbx), %eax", fields, {"rbx": ACCESS + 0x10})
    assert run.reason is R.EPT_VIOLATION


# -- writes to the APIC-access page ---------------------------------------------------------------


@pytest.mark.parametrize("ept", [True, False], ids=["EPT", "no EPT"])
@pytest.mark.parametrize("registers", [0, 1], ids=["TPR only", "all registers"])
def test_writes_are_virtualized_exit_or_exit_behind_the_write(lab, ept, registers):
    fields = apic(lab, ept=ept, apic_register_virtualization=registers)
    for offset in REGISTERS if ept else REGISTERS[::4]:
        lab.write_u32(VAPIC + offset, 0)
        run = lab.run("mov %eax, (%rbx)", fields, {"rbx": ACCESS + offset, "rax": SIGNATURE})
        written = lab.read_u32(VAPIC + offset)
        if offset not in (WRITABLE if registers else {TPR}):
            assert (run.reason, run.qualification) == (R.APIC_ACCESS, offset | WRITE)
            assert (written, run.length, run.rip) == (0, 2, CODE)
        elif offset == TPR:
            assert (run.reason, written) == (R.VMCALL, SIGNATURE & 0xFF)
        elif offset == ICR_HIGH:
            assert (run.reason, written) == (R.VMCALL, SIGNATURE & 0xFF000000)
        else:
            assert (run.reason, run.qualification) == (R.APIC_WRITE, offset)
            assert (written, run.rip) == (SIGNATURE, CODE + 2)


def test_a_trap_flag_stays_pending_behind_a_trap_like_exit(lab):
    fields = apic(lab, apic_register_virtualization=1) | {F.GUEST_RFLAGS: 0x102}
    run = lab.run("mov %eax, (%rbx); nop", fields, {"rbx": ACCESS + 0xF0, "rax": 1})
    assert (run.reason, run.rip) == (R.APIC_WRITE, CODE + 2)
    assert run[F.GUEST_PENDING_DEBUG_EXCEPTIONS] == 1 << 14


# -- the TPR shadow --------------------------------------------------------------------------------


def test_cr8_is_bits_7_to_4_of_vtpr(lab):
    fields = apic(lab, accesses=0)
    lab.write_u32(VAPIC + TPR, SIGNATURE)
    run = lab.run("mov %cr8, %rax; mov %rbx, %cr8", fields, {"rbx": 0xA})
    assert run.reason is R.VMCALL
    assert run.registers["rax"] == 7
    assert lab.read_u32(VAPIC + TPR) == 0xA0


def test_a_reserved_bit_of_cr8_is_refused(lab):
    run = lab.run("mov %rbx, %cr8", apic(lab, accesses=0), {"rbx": 0x10})
    assert run.vector == 13


def test_without_a_shadow_cr8_is_the_local_apics(lab):
    off = lab.primary(use_tpr_shadow=0, cr8_load_exiting=0, cr8_store_exiting=0)
    run = lab.run("mov %rbx, %cr8; mov %cr8, %rax", off, {"rbx": 5})
    assert run.registers["rax"] == 5
    assert lab.vcpu.lapic.cr8 == 5
    lab.vcpu.lapic.cr8 = 0


@pytest.mark.parametrize("source", ["mov %rax, %cr8", "mov %ecx, (%rbx)"])
def test_lowering_the_tpr_below_the_threshold_exits_behind(lab, source):
    fields = apic(lab) | {F.TPR_THRESHOLD: 5}
    lab.write_u32(VAPIC + TPR, 0x90)
    length = 4 if "cr8" in source else 2
    same = {"rax": 5, "rcx": 0x50, "rbx": ACCESS + TPR}
    assert lab.run(f"{source}; vmcall", fields, same).reason is R.VMCALL
    lower = {"rax": 4, "rcx": 0x4F, "rbx": ACCESS + TPR}
    run = lab.run(f"{source}; vmcall", fields, lower)
    assert (run.reason, run.rip) == (R.TPR_BELOW_THRESHOLD, CODE + length)


@pytest.mark.parametrize(("vtpr", "reason"), [(0x4F, R.TPR_BELOW_THRESHOLD), (0x50, R.VMCALL)])
def test_an_entry_below_the_threshold_exits(lab, vtpr, reason):
    fields = apic(lab) | {F.TPR_THRESHOLD: 5}
    lab.write_u32(VAPIC + TPR, vtpr)
    run = lab.run("vmcall", fields)
    assert (run.reason, run.rip) == (reason, CODE)


# -- x2APIC mode -----------------------------------------------------------------------------------


def x2apic(lab, **secondary):
    primary = {"use_msr_bitmaps": 1}
    return apic(lab, accesses=0, primary=primary, virtualize_x2apic_mode=1, **secondary)


def test_only_the_tpr_is_read_without_register_virtualization(lab):
    fields = x2apic(lab)
    lab.write_u64(VAPIC + TPR, 0x1122334400000030)
    run = lab.run("rdmsr", fields, {"rcx": 0x808})
    assert (run.registers["rax"], run.registers["rdx"]) == (0x30, 0x11223344)
    assert lab.run("rdmsr", fields, {"rcx": 0x80F}).vector == 13  # L1's is in xAPIC mode


def test_every_msr_is_read_with_register_virtualization(lab):
    fields = x2apic(lab, apic_register_virtualization=1)
    for number in (0x800, 0x802, 0x80B, 0x830, 0x83F, 0x840, 0x8FF):
        lab.write_u64(VAPIC + (number & 0xFF) * 16, 0x55 << 32 | number)
        run = lab.run("rdmsr", fields, {"rcx": number})
        assert (run.registers["rax"], run.registers["rdx"]) == (number, 0x55)


def test_the_tpr_is_written_as_msr(lab):
    fields = x2apic(lab) | {F.TPR_THRESHOLD: 0}
    run = lab.run("wrmsr", fields, {"rcx": 0x808, "rax": 0x77, "rdx": 0})
    assert (run.reason, run.vector) == (R.VMCALL, None)
    assert lab.read_u64(VAPIC + TPR) == 0x77
    assert lab.run("wrmsr", fields, {"rcx": 0x808, "rax": 0x177, "rdx": 0}).vector == 13
    assert lab.run("wrmsr", fields, {"rcx": 0x80B, "rax": 0, "rdx": 0}).vector == 13


def test_eoi_and_self_ipi_are_msrs_with_virtual_interrupts(lab):
    fields = x2apic(lab, **ENABLE_ALL)
    assert lab.run("wrmsr", fields, {"rcx": 0x80B, "rax": 1, "rdx": 0}).vector == 13
    run = lab.run("wrmsr", fields, {"rcx": 0x83F, "rax": 0x41, "rdx": 0})
    assert (run.reason, run.vector) == (R.VMCALL, None)
    assert lab.read_u32(VAPIC + 0x220) == 2
    run = lab.run("wrmsr", fields, {"rcx": 0x83F, "rax": 0x0F, "rdx": 0})
    assert (run.reason, run.qualification) == (R.APIC_WRITE, SELF_IPI)
    assert lab.run("wrmsr", fields, {"rcx": 0x83F, "rax": 0x141, "rdx": 0}).vector == 13


# -- virtual interrupts ----------------------------------------------------------------------------


def test_an_entry_delivers_what_rvi_names(lab):
    fields = apic(lab, status=0x41, **ENABLE_ALL) | {F.GUEST_RFLAGS: 0x202}
    lab.write_u32(VAPIC + 0x220, 2)
    run = lab.run("nop", fields, reads=[F.GUEST_INTERRUPT_STATUS])
    assert run.vector == 0x41
    assert run[F.GUEST_INTERRUPT_STATUS] == 0x4100
    assert lab.read_u32(VAPIC + 0x220) == 0
    assert lab.read_u32(VAPIC + 0x120) == 2
    assert lab.read_u32(VAPIC + 0xA0) == 0x40


def test_nothing_is_delivered_before_the_window_opens(lab):
    fields = apic(lab, status=0x41, **ENABLE_ALL)
    lab.write_u32(VAPIC + 0x220, 2)
    run = lab.run("nop; sti; nop; nop", fields)
    assert run.vector == 0x41
    assert lab.read_u64(run[F.GUEST_RSP]) == CODE + 3  # behind the shadow of STI


@pytest.mark.parametrize(("vtpr", "vector"), [(0x4F, None), (0x3F, 0x41)])
def test_the_tpr_holds_back_its_class(lab, vtpr, vector):
    fields = apic(lab, status=0x41, **ENABLE_ALL) | {F.GUEST_RFLAGS: 0x202}
    lab.write_u32(VAPIC + TPR, vtpr)
    assert lab.run("nop", fields).vector == vector


def test_lowering_the_tpr_delivers(lab):
    fields = apic(lab, status=0x41, **ENABLE_ALL) | {F.GUEST_RFLAGS: 0x202}
    lab.write_u32(VAPIC + TPR, 0x50)
    run = lab.run("mov %rax, %cr8; nop", fields, {"rax": 3})
    assert run.vector == 0x41
    assert lab.read_u64(run[F.GUEST_RSP]) == CODE + 4


def test_a_self_ipi_is_delivered_and_its_eoi_delivers_the_next(lab, gates):
    handlers(lab, 0x51, f"movl $0, {ACCESS + EOI:#x}")
    handlers(lab, 0x52, f"movl $0, {ACCESS + EOI:#x}")
    fields = apic(lab, **ENABLE_ALL)
    run = lab.run(
        f"movl $0x40051, {ACCESS + ICR:#x}; movl $0x40052, {ACCESS + ICR:#x}; sti; nop; nop",
        fields,
        reads=[F.GUEST_INTERRUPT_STATUS],
    )
    assert (run.reason, run.vector) == (R.VMCALL, None)
    assert lab.read_u32(DATA) == 2
    assert run[F.GUEST_INTERRUPT_STATUS] == 0
    assert lab.read_u32(VAPIC + 0x120) == lab.read_u32(VAPIC + 0x220) == 0


@pytest.mark.parametrize("command", [0x51, 0x80051, 0x40551, 0x4000F, 0x48051, 0x50051])
def test_a_command_that_is_no_self_ipi_exits_behind(lab, command):
    fields = apic(lab, **ENABLE_ALL)
    run = lab.run("mov %eax, (%rbx)", fields, {"rbx": ACCESS + ICR, "rax": command})
    assert (run.reason, run.qualification) == (R.APIC_WRITE, ICR)


def test_an_eoi_in_the_bitmap_exits_behind(lab):
    fields = apic(lab, status=0x4100, **ENABLE_ALL) | {F.EOI_EXIT_BITMAP_1: 2}
    lab.write_u32(VAPIC + 0x120, 2)
    run = lab.run(f"movl $7, {ACCESS + EOI:#x}", fields, reads=[F.GUEST_INTERRUPT_STATUS])
    assert (run.reason, run.qualification) == (R.VIRTUALIZED_EOI, 0x41)
    assert run.rip > CODE
    assert run[F.GUEST_INTERRUPT_STATUS] == 0
    assert lab.read_u32(VAPIC + 0x120) == lab.read_u32(VAPIC + EOI) == 0


def test_a_virtual_interrupt_wakes_from_hlt(lab):
    fields = apic(lab, status=0x41, primary={"hlt_exiting": 0}, **ENABLE_ALL)
    run = lab.run("hlt", fields | {F.GUEST_ACTIVITY_STATE: 1, F.GUEST_RFLAGS: 0x202})
    assert (run.vector, run[F.GUEST_ACTIVITY_STATE]) == (0x41, 0)


# -- posted interrupts -----------------------------------------------------------------------------

NOTIFICATION = 0xE3
NOTIFY = "mov $0xfee00000, %r8d; movl ${:#x}, 0x300(%r8); nop; nop"


def posted(lab):
    """Fields that process posted interrupts, and a descriptor with its notification outstanding."""
    lab.vcpu.lapic.write(0xF0, 4, 0x1FF)
    fields = apic(lab, **ENABLE_ALL) | {F.GUEST_RFLAGS: 0x202}
    fields = lab.pin(fields, process_posted_interrupts=1)
    fields |= lab.on_exit(acknowledge_interrupt=1)
    lab.write(DESCRIPTOR, bytes(64))
    lab.write_u64(DESCRIPTOR + 32, 0xAB00_0001)
    return fields | {
        F.POSTED_INTERRUPT_DESCRIPTOR_ADDRESS: DESCRIPTOR,
        F.POSTED_INTERRUPT_NOTIFICATION_VECTOR: NOTIFICATION,
    }


def test_a_notification_delivers_what_is_posted_without_an_exit(lab):
    fields = posted(lab)
    for vector in (0x41, 0x72):
        lab.write_u32(DESCRIPTOR + 4 * (vector >> 5), 1 << (vector & 31))
    source = NOTIFY.format(0x40000 | NOTIFICATION)
    run = lab.run(source, fields, reads=[F.GUEST_INTERRUPT_STATUS])
    assert run.vector == 0x72
    assert run[F.GUEST_INTERRUPT_STATUS] == 0x7241
    assert lab.read(DESCRIPTOR, 32) == bytes(32)
    assert lab.read_u64(DESCRIPTOR + 32) == 0xAB00_0000
    assert lab.read_u32(VAPIC + 0x220) == 2
    assert lab.vcpu.lapic.read(0x170, 4) == 0  # the notification was acknowledged and ended


def test_another_interrupt_exits_acknowledged(lab):
    source = NOTIFY.format(0x40000 | NOTIFICATION + 1)
    run = lab.run(source, posted(lab))
    assert run.reason is R.EXTERNAL_INTERRUPT
    assert run[F.EXIT_INTERRUPTION_INFORMATION] == VALID | NOTIFICATION + 1
    assert lab.read_u64(DESCRIPTOR + 32) == 0xAB00_0001
    lab.vcpu.lapic.write(0xB0, 4, 0)


def test_the_interrupt_window_holds_virtual_interrupts_back(lab):
    window = {"interrupt_window_exiting": 1}
    fields = apic(lab, status=0x41, primary=window, **ENABLE_ALL) | {F.GUEST_RFLAGS: 0x202}
    run = lab.run("nop", fields)
    assert (run.reason, run.rip) == (R.INTERRUPT_WINDOW, CODE)
