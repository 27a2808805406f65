"""Each instruction that can exit: with its control it exits, without it not."""

import pytest
from vmx_lab import CODE, DATA, GDT

from undervisor.arch.vmx.controls import PrimaryControls as P
from undervisor.arch.vmx.controls import SecondaryControls as S
from undervisor.arch.vmx.exits import ExitReason as R
from undervisor.arch.vmx.fields import VmcsField as F

ONE, TWO = "primary", "secondary"

# source, length, reason, the control that makes it exit, and the setting of others it needs
CONTROLLED = [
    ("hlt", 1, R.HLT, ONE, "hlt_exiting", {}),
    ("invlpg (%rbx)", 3, R.INVLPG, ONE, "invlpg_exiting", {}),
    ("mwait", 3, R.MWAIT, ONE, "mwait_exiting", {}),
    ("monitor", 3, R.MONITOR, ONE, "monitor_exiting", {}),
    ("rdtsc", 2, R.RDTSC, ONE, "rdtsc_exiting", {}),
    ("pause", 2, R.PAUSE, ONE, "pause_exiting", {}),
    ("mov %cr3, %rax", 3, R.CONTROL_REGISTER_ACCESSES, ONE, "cr3_store_exiting", {}),
    ("mov %rbx, %cr3", 3, R.CONTROL_REGISTER_ACCESSES, ONE, "cr3_load_exiting", {}),
    ("mov %cr8, %rax", 4, R.CONTROL_REGISTER_ACCESSES, ONE, "cr8_store_exiting", {}),
    ("mov %rdx, %cr8", 4, R.CONTROL_REGISTER_ACCESSES, ONE, "cr8_load_exiting", {}),
    ("mov %db0, %rax", 3, R.MOV_DR, ONE, "mov_dr_exiting", {}),
    ("mov %rax, %db7", 3, R.MOV_DR, ONE, "mov_dr_exiting", {}),
    ("in $0x80, %al", 2, R.IO_INSTRUCTION, ONE, "unconditional_io_exiting", {}),
    ("wbinvd", 2, R.WBINVD_OR_WBNOINVD, TWO, "wbinvd_exiting", {}),
    ("rdrand %eax", 3, R.RDRAND, TWO, "rdrand_exiting", {}),
    ("rdseed %eax", 3, R.RDSEED, TWO, "rdseed_exiting", {}),
    ("rdtscp", 3, R.RDTSCP, ONE, "rdtsc_exiting", {"enable_rdtscp": 1}),
    ("invpcid (%rbx), %rdx", 5, R.INVPCID, ONE, "invlpg_exiting", {"enable_invpcid": 1}),
    ("sgdt (%rbx)", 3, R.ACCESS_TO_GDTR_OR_IDTR, TWO, "descriptor_table_exiting", {}),
    ("sidt (%rbx)", 3, R.ACCESS_TO_GDTR_OR_IDTR, TWO, "descriptor_table_exiting", {}),
    ("lgdt (%rsi)", 3, R.ACCESS_TO_GDTR_OR_IDTR, TWO, "descriptor_table_exiting", {}),
    ("lidt (%rsi)", 3, R.ACCESS_TO_GDTR_OR_IDTR, TWO, "descriptor_table_exiting", {}),
    ("sldt %eax", 3, R.ACCESS_TO_LDTR_OR_TR, TWO, "descriptor_table_exiting", {}),
    ("str %eax", 3, R.ACCESS_TO_LDTR_OR_TR, TWO, "descriptor_table_exiting", {}),
    ("lldt %dx", 3, R.ACCESS_TO_LDTR_OR_TR, TWO, "descriptor_table_exiting", {}),
    ("ltr %cx", 3, R.ACCESS_TO_LDTR_OR_TR, TWO, "descriptor_table_exiting", {}),
]


def registers(lab, source):
    """Operands under which each instruction of the table works."""
    lab.write(DATA, bytes(64))
    lab.write_u64(DATA + 64, 0x4F | GDT << 16)
    lab.write_u64(DATA + 72, GDT >> 48)
    if source.startswith("lidt"):
        lab.write_u64(DATA + 64, 0xFFF | lab.fields[F.GUEST_IDTR_BASE] << 16)
    lab.write(GDT + 0x40 + 5, b"\x89")  # the TSS is available
    values = {"rbx": DATA, "rsi": DATA + 64, "rcx": 0, "rdx": 0, "rax": 0x400}
    if "cr3" in source:
        values["rbx"] = lab.facts.l1.cr3
    if source.startswith("invpcid"):
        values["rdx"] = 2
    if source.startswith("ltr"):
        values["rcx"] = 0x40
    return values


@pytest.mark.parametrize("row", CONTROLLED, ids=[r[0] for r in CONTROLLED])
def test_an_instruction_exits_exactly_if_its_control_is_1(lab, row):
    source, length, reason, word, name, others = row
    base = lab.secondary(**others)
    values = registers(lab, source)
    word_field = F.PRIMARY_CONTROLS if word == ONE else F.SECONDARY_CONTROLS
    mask = int(getattr(P if word == ONE else S, name))
    on = base | {word_field: base[word_field] | mask}
    run = lab.run(source, on, values)
    assert run.reason is reason
    assert run.length == length
    assert run.rip == CODE
    if source == "hlt":
        return
    off = base | {word_field: base[word_field] & ~mask}
    run = lab.run(source, off, registers(lab, source))
    assert (run.reason, run.vector) == (R.VMCALL, None)
    assert run.rip == CODE + length


def test_secondary_controls_do_nothing_unless_they_are_activated(lab):
    controls = lab.primary(lab.secondary(wbinvd_exiting=1), activate_secondary_controls=0)
    run = lab.run("wbinvd", controls)
    assert (run.reason, run.vector) == (R.VMCALL, None)


def test_rdpmc_exits_if_asked_and_faults_without_counters(lab):
    assert lab.run("rdpmc", lab.primary(rdpmc_exiting=1)).reason is R.RDPMC
    assert lab.run("rdpmc", lab.primary(rdpmc_exiting=0)).vector == 13


ALWAYS = [
    ("cpuid", 2, R.CPUID),
    ("invd", 2, R.INVD),
    ("vmcall", 3, R.VMCALL),
    ("vmclear (%rbx)", 4, R.VMCLEAR),
    ("vmlaunch", 3, R.VMLAUNCH),
    ("vmptrld (%rbx)", 3, R.VMPTRLD),
    ("vmptrst (%rbx)", 3, R.VMPTRST),
    ("vmread %rax, %rcx", 3, R.VMREAD),
    ("vmread %rax, (%rbx)", 3, R.VMREAD),
    ("vmresume", 3, R.VMRESUME),
    ("vmwrite %rax, %rcx", 3, R.VMWRITE),
    ("vmxoff", 3, R.VMXOFF),
    ("vmxon (%rbx)", 4, R.VMXON),
    ("invept (%rbx), %rax", 5, R.INVEPT),
    ("invvpid (%rbx), %rax", 5, R.INVVPID),
]


@pytest.mark.parametrize(("source", "length", "reason"), ALWAYS, ids=[r[0] for r in ALWAYS])
def test_an_instruction_always_exits(lab, source, length, reason):
    run = lab.run(source, lab.primary(hlt_exiting=0), {"rbx": DATA})
    assert run.reason is reason
    assert run.length == length
    assert run.rip == CODE


RING3 = "push $0x3b; push $USER_STACK + 0xff0; pushfq; push $0x33; push $1f; iretq; 1: "


@pytest.mark.parametrize("source", [r[0] for r in ALWAYS if r[0].startswith(("vm", "inv"))])
def test_a_vmx_instruction_exits_from_ring_3_too(lab, source):
    """Only VMCALL, CPUID and the VMX instructions that exit before the CPL check; INVD is #GP."""
    run = lab.run(RING3 + source, lab_user(lab), {"rbx": DATA})
    if source == "invd":
        assert run.vector == 13
    else:
        assert run.reason in {r[2] for r in ALWAYS}
        assert run[F.GUEST_CS_SELECTOR] == 0x33


def lab_user(lab):
    return {F.GUEST_CR3: lab.pages()}


@pytest.mark.parametrize(
    "source",
    [
        "hlt",
        "invlpg (%rbx)",
        "rdmsr",
        "wrmsr",
        "mov %cr3, %rax",
        "mov %rax, %cr0",
        "mov %db7, %rax",
        "wbinvd",
        "lgdt (%rbx)",
        "lidt (%rbx)",
        "lldt %ax",
        "ltr %ax",
        "xsetbv",
        "clts",
        "lmsw %ax",
        "invpcid (%rbx), %rax",
        "mov %cr8, %rax",
    ],
)
def test_a_privileged_instruction_of_ring_3_faults_before_it_exits(lab, source):
    controls = lab.secondary(descriptor_table_exiting=1, wbinvd_exiting=1, enable_invpcid=1)
    controls[F.PRIMARY_CONTROLS] |= int(
        P.hlt_exiting
        | P.invlpg_exiting
        | P.cr3_store_exiting
        | P.mov_dr_exiting
        | P.cr8_store_exiting
    )
    cr4 = {F.GUEST_CR4: lab.fields[F.GUEST_CR4] | 1 << 18}
    run = lab.run(RING3 + source, controls | lab_user(lab) | cr4, {"rbx": DATA})
    assert run.vector == 13, run.reason


def test_vmcall_of_ring_3_exits(lab):
    run = lab.run(RING3 + "vmcall", lab_user(lab))
    assert run.reason is R.VMCALL
    assert run[F.GUEST_SS_ACCESS_RIGHTS] >> 5 & 3 == 3


def test_monitor_and_mwait_of_ring_3_are_undefined(lab):
    controls = lab.primary(mwait_exiting=1, monitor_exiting=1)
    for source in ("monitor", "mwait"):
        assert lab.run(RING3 + source, controls | lab_user(lab)).vector == 6


# -- instructions that a control makes undefined ---------------------------------------------------


@pytest.mark.parametrize(
    ("source", "control"),
    [
        ("rdtscp", "enable_rdtscp"),
        ("rdpid %rax", "enable_rdtscp"),
        ("invpcid (%rbx), %rdx", "enable_invpcid"),
        ("xsaves (%rbx)", "enable_xsaves"),
        ("xrstors (%rbx)", "enable_xsaves"),
    ],
)
def test_an_instruction_is_undefined_unless_enabled(lab, source, control):
    lab.write(DATA, bytes(1024))
    lab.write_u64(DATA + 520, 1 << 63)
    cr4 = {F.GUEST_CR4: lab.fields[F.GUEST_CR4] | 1 << 18}
    values = {"rbx": DATA, "rdx": 2 if "pcid" in source else 0, "rax": 0}
    assert lab.run(source, lab.secondary(**{control: 0}) | cr4, values).vector == 6
    run = lab.run(source, lab.secondary(**{control: 1}) | cr4, values)
    assert (run.reason, run.vector) == (R.VMCALL, None)


def test_rdtscp_is_undefined_rather_than_an_exit_when_disabled(lab):
    run = lab.run("rdtscp", lab.primary(rdtsc_exiting=1))
    assert run.vector == 6


def test_rdtsc_counts_with_the_offset_and_rdmsr_too(lab):
    offset = {F.TSC_OFFSET: 1 << 50}
    run = lab.run("rdtsc", lab.primary(use_tsc_offsetting=1) | offset)
    assert run.registers["rdx"] >> 18 == 1
    run = lab.run(
        "mov $0x10, %ecx; rdmsr", lab.primary(use_tsc_offsetting=1, use_msr_bitmaps=1) | offset
    )
    assert run.registers["rdx"] >> 18 == 1
    run = lab.run("rdtsc", lab.primary(use_tsc_offsetting=0) | offset)
    assert run.registers["rdx"] >> 18 == 0


def test_xsetbv_always_exits_but_for_its_faults(lab):
    cr4 = lab.fields[F.GUEST_CR4]
    run = lab.run("xsetbv", {F.GUEST_CR4: cr4 | 1 << 18}, {"rax": 1})
    assert run.reason is R.XSETBV
    assert run.length == 3
    assert lab.run("xsetbv", {F.GUEST_CR4: cr4 & ~(1 << 18)}).vector == 6


def test_getsec_is_undefined_without_smx(lab):
    assert lab.run("xor %eax, %eax; getsec").vector == 6


def test_rsm_is_undefined_outside_smm(lab):
    assert lab.run(".byte 0x0f, 0xaa").vector == 6


# -- information -----------------------------------------------------------------------------------


def test_invlpg_gives_the_linear_address(lab):
    run = lab.run(
        "invlpg 8(%rbx, %rcx, 4)", lab.primary(invlpg_exiting=1), {"rbx": 1 << 40, "rcx": 3}
    )
    assert run.qualification == (1 << 40) + 20


# SDM 3C, "Exit Qualification for MOV DR"
@pytest.mark.parametrize(
    ("source", "qualification"),
    [
        ("mov %db0, %rax", 0x10),
        ("mov %db7, %r11", 0xB17),
        ("mov %rsi, %db3", 0x603),
        ("mov %rax, %db6", 0x006),
    ],
)
def test_mov_dr_says_register_and_direction(lab, source, qualification):
    run = lab.run(source, lab.primary(mov_dr_exiting=1))
    assert (run.reason, run.qualification) == (R.MOV_DR, qualification)


def test_the_exit_of_mov_dr_comes_before_its_faults(lab):
    de = {F.GUEST_CR4: lab.fields[F.GUEST_CR4] | 8}
    controls = lab.primary(mov_dr_exiting=1)
    free = lab.primary(mov_dr_exiting=0)
    gd = {F.GUEST_DR7: 0x2400} | lab.on_entry(load_debug_controls=1)
    for source, changes, vector in (("mov %db4, %rax", de, 6), ("mov %db0, %rax", gd, 1)):
        assert lab.run(source, controls | changes).reason is R.MOV_DR
        assert lab.run(source, free | changes).vector == vector


# SDM 3C, table "Format of the VM-Exit Instruction-Information Field as Used for INS and OUTS",
# and those of the other instructions.
@pytest.mark.parametrize(
    ("source", "information", "displacement"),
    [
        ("vmclear (%rbx)", 2 << 7 | 3 << 15 | 1 << 22 | 3 << 23, 0),
        ("vmclear 0x40(%rbx)", 2 << 7 | 3 << 15 | 1 << 22 | 3 << 23, 0x40),
        ("vmclear -8(%rbx)", 2 << 7 | 3 << 15 | 1 << 22 | 3 << 23, (1 << 64) - 8),
        ("vmclear 8(%r12, %r9, 8)", 3 | 2 << 7 | 3 << 15 | 9 << 18 | 12 << 23, 8),
        ("vmptrld %gs:(%rax)", 2 << 7 | 5 << 15 | 1 << 22, 0),
        ("vmptrst (%esp)", 1 << 7 | 2 << 15 | 1 << 22 | 4 << 23, 0),
        ("vmread %rdx, %r9", 9 << 3 | 1 << 10 | 2 << 28, 0),
        ("vmwrite %rdx, %r9", 2 << 3 | 1 << 10 | 9 << 28, 0),
        ("vmread %rdx, 4(%rbp)", 2 << 7 | 2 << 15 | 1 << 22 | 5 << 23 | 2 << 28, 4),
        ("invept (%rbx), %rcx", 2 << 7 | 3 << 15 | 1 << 22 | 3 << 23 | 1 << 28, 0),
        ("vmxon 0x1234", 2 << 7 | 3 << 15 | 1 << 22 | 1 << 27, 0x1234),
    ],
)
def test_a_vmx_instruction_tells_its_operand(lab, source, information, displacement):
    run = lab.run(source, registers={"rbx": DATA})
    assert run[F.EXIT_INSTRUCTION_INFORMATION] == information
    assert run.qualification == displacement


def test_a_rip_relative_displacement_is_the_address(lab):
    run = lab.run("vmclear 1f(%rip); 1:")
    assert run.qualification == CODE + run.length
    assert run[F.EXIT_INSTRUCTION_INFORMATION] >> 27 & 1


@pytest.mark.parametrize(
    ("source", "information"),
    [
        ("sgdt (%rbx)", 0), ("sidt (%rbx)", 1 << 28), ("lgdt (%rbx)", 2 << 28),
        ("lidt (%rbx)", 3 << 28),
    ],
)  # fmt: skip
def test_a_table_instruction_tells_its_operand(lab, source, information):
    run = lab.run(source, lab.secondary(descriptor_table_exiting=1), {"rbx": DATA})
    operand = 2 << 7 | 1 << 11 | 3 << 15 | 1 << 22 | 3 << 23
    assert run[F.EXIT_INSTRUCTION_INFORMATION] & ~(1 << 11) == (operand | information) & ~(1 << 11)


@pytest.mark.parametrize(
    ("source", "information"),
    [
        ("sldt %edx", 1 << 10 | 2 << 3),
        ("str %r9d", 1 << 10 | 9 << 3 | 1 << 28),
        ("lldt %bx", 1 << 10 | 3 << 3 | 2 << 28),
        ("ltr (%rbx)", 2 << 7 | 3 << 15 | 1 << 22 | 3 << 23 | 3 << 28),
    ],
)
def test_a_selector_instruction_tells_its_operand(lab, source, information):
    run = lab.run(source, lab.secondary(descriptor_table_exiting=1), {"rbx": DATA})
    assert run[F.EXIT_INSTRUCTION_INFORMATION] == information


@pytest.mark.parametrize(
    ("source", "information"),
    [("rdrand %ax", 0), ("rdrand %r10d", 10 << 3 | 1 << 11), ("rdrand %rdx", 2 << 3 | 2 << 11)],
)
def test_rdrand_tells_its_destination(lab, source, information):
    run = lab.run(source, lab.secondary(rdrand_exiting=1))
    assert run[F.EXIT_INSTRUCTION_INFORMATION] == information


# -- I/O -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "qualification"),
    [
        ("in $0x80, %al", 0 | 1 << 3 | 1 << 6 | 0x80 << 16),
        ("in $0x80, %eax", 3 | 1 << 3 | 1 << 6 | 0x80 << 16),
        ("out %ax, $0x81", 1 | 1 << 6 | 0x81 << 16),
        ("in %dx, %al", 0 | 1 << 3 | 0x5000 << 16),
        ("out %eax, %dx", 3 | 0x5000 << 16),
        ("insb", 0 | 1 << 3 | 1 << 4 | 0x5000 << 16),
        ("outsw", 1 | 1 << 4 | 0x5000 << 16),
        ("rep outsl", 3 | 1 << 4 | 1 << 5 | 0x5000 << 16),
    ],
)
def test_io_tells_port_size_direction_and_form(lab, source, qualification):
    values = {"rdx": 0x5000, "rsi": DATA, "rdi": DATA + 8, "rcx": 2}
    run = lab.run(source, lab.primary(unconditional_io_exiting=1), values)
    assert (run.reason, run.qualification) == (R.IO_INSTRUCTION, qualification)
    if "s" in source.split()[-1]:
        assert run[F.GUEST_LINEAR_ADDRESS] == (DATA + 8 if "ins" in source else DATA)
        size = run[F.EXIT_INSTRUCTION_INFORMATION] >> 7 & 7
        assert size == 2
        if "outs" in source:
            assert run[F.EXIT_INSTRUCTION_INFORMATION] >> 15 & 7 == 3


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("port", [0x0, 0x7FFC, 0x7FFF, 0x8000, 0xFFFC])
def test_io_bitmaps_decide_port_by_port(lab, port, bits):
    size = bits // 8
    controls = lab.primary(use_io_bitmaps=1, unconditional_io_exiting=1)
    register = {8: "al", 16: "ax", 32: "eax"}[bits]
    source = f"out %{register}, %dx"
    lab.fill(lab.places.io, 0x2000)
    if port + size <= 0x10000 and port not in (0, 0x7FFC):
        run = lab.run(source, controls, {"rdx": port})
        assert run.reason is R.VMCALL
    lab.set_bit(lab.places.io, port + size - 1)
    run = lab.run(source, controls, {"rdx": port})
    lab.fill(lab.places.io, 0x2000)
    assert run.reason is R.IO_INSTRUCTION


def test_an_access_that_wraps_the_io_space_exits(lab):
    controls = lab.primary(use_io_bitmaps=1)
    assert lab.run("out %ax, %dx", controls, {"rdx": 0xFFFF}).reason is R.IO_INSTRUCTION
    assert lab.run("out %al, %dx", controls, {"rdx": 0xFFFF}).reason is R.VMCALL


# -- MSRs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("msr", "offset"),
    [(0x174, 0), (0x1FFF, 0), (0xC0000080, 0x400), (0xC0001FFF, 0x400)],
)
@pytest.mark.parametrize("write", [False, True])
def test_the_msr_bitmap_decides_msr_by_msr(lab, msr, offset, write):
    controls = lab.primary(use_msr_bitmaps=1)
    offset += 0x800 * write
    where = lab.places.msr + offset
    lab.set_bit(where, msr & 0x1FFF)
    source = "wrmsr" if write else "rdmsr"
    run = lab.run(source, controls, {"rcx": msr})
    lab.set_bit(where, msr & 0x1FFF, False)
    assert (run.reason, run.length) == (R.WRMSR if write else R.RDMSR, 2)
    if msr in (0x174, 0xC0000080) and not write:
        assert lab.run(source, controls, {"rcx": msr}).reason is R.VMCALL


@pytest.mark.parametrize("msr", [0x2000, 0xBFFFFFFF, 0xC0002000, 0xFFFFFFFF])
def test_an_msr_outside_the_bitmaps_ranges_exits(lab, msr):
    assert lab.run("rdmsr", lab.primary(use_msr_bitmaps=1), {"rcx": msr}).reason is R.RDMSR


def test_every_msr_access_exits_without_a_bitmap(lab):
    assert lab.run("rdmsr", lab.primary(use_msr_bitmaps=0), {"rcx": 0x10}).reason is R.RDMSR


def test_an_unknown_msr_that_does_not_exit_faults(lab):
    assert lab.run("rdmsr", lab.primary(use_msr_bitmaps=1), {"rcx": 0x1FF0}).vector == 13


def test_pause_loop_exiting_counts_pauses(lab):
    controls = lab.secondary(pause_loop_exiting=1) | {F.PLE_GAP: 1 << 20, F.PLE_WINDOW: 20000}
    run = lab.run("1: pause; inc %rax; jmp 1b", controls)
    assert run.reason is R.PAUSE
    assert 1 < run.registers["rax"] < 100
