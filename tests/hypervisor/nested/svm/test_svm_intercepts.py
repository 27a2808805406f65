"""Each intercept: the exit that L1 sees, where L2 stopped, and what L2 does without it."""

import pytest
from svm_world import CODE32, CS32, DATA, IDT, L2_CODE, STUBS, World, gate

from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.svm.vmcb import VmcbField
from undervisor.arch.x86.events import Vector
from undervisor.arch.x86.msr import Msr
from undervisor.arch.x86.registers import Cr0, Efer
from undervisor.arch.x86.segments import Segment
from undervisor.hypervisor.nested.svm.controls import UNSUPPORTED

MOV = 1 << 63

# L2's instruction (before it `setup`), the intercept, EXITINFO1, EXITINFO2 (None: not looked at)
# and the length of the instruction.
INSTRUCTIONS = {
    "mov cr0, rdx": ("", "mov %cr0, %rdx", Intercept.CR0_READ, MOV | 2, 0, 3),
    "mov rbx, cr0": ("mov %cr0, %rbx", "mov %rbx, %cr0", Intercept.CR0_WRITE, MOV | 3, 0, 3),
    "smsw": ("", "smsw %ax", Intercept.CR0_READ, 0, 0, 4),
    "lmsw": ("smsw %ax", "lmsw %ax", Intercept.CR0_WRITE, 0, 0, 3),
    "clts": ("", "clts", Intercept.CR0_WRITE, 0, 0, 2),
    "mov cr2, r9": ("", "mov %cr2, %r9", Intercept.CR2_READ, MOV | 9, 0, 4),
    "mov rax, cr2": ("", "mov %rax, %cr2", Intercept.CR2_WRITE, MOV, 0, 3),
    "mov cr3, rax": ("", "mov %cr3, %rax", Intercept.CR3_READ, MOV, 0, 3),
    "mov rax, cr3": ("mov %cr3, %rax", "mov %rax, %cr3", Intercept.CR3_WRITE, MOV, 0, 3),
    "mov cr4, rsi": ("", "mov %cr4, %rsi", Intercept.CR4_READ, MOV | 6, 0, 3),
    "mov rax, cr4": ("mov %cr4, %rax", "mov %rax, %cr4", Intercept.CR4_WRITE, MOV, 0, 3),
    "mov cr8, rax": ("", "mov %cr8, %rax", Intercept.CR8_READ, MOV, 0, 4),
    "mov rax, cr8": ("xor %eax, %eax", "mov %rax, %cr8", Intercept.CR8_WRITE, MOV, 0, 4),
    "mov dr0, rcx": ("", "mov %dr0, %rcx", Intercept.DR0_READ, 1, 0, 3),
    "mov rcx, dr3": ("xor %ecx, %ecx", "mov %rcx, %dr3", Intercept.DR3_WRITE, 1, 0, 3),
    **{
        f"mov dr{n}, rdx": ("", f"mov %dr{n}, %rdx", Intercept(Intercept.DR0_READ + n), 2, 0, 3)
        for n in (1, 2, 3, 4, 5, 7)
    },
    **{
        f"mov rdx, dr{n}": (
            f"mov %dr{n}, %rdx",
            f"mov %rdx, %dr{n}",
            Intercept(Intercept.DR0_WRITE + n),
            2,
            0,
            3,
        )
        for n in (0, 1, 2, 4, 5, 6)
    },
    "rdpmc": ("xor %ecx, %ecx", "rdpmc", Intercept.RDPMC, 0, None, 2),
    "mov dr6, rax": ("", "mov %dr6, %rax", Intercept.DR6_READ, 0, 0, 3),
    "mov rdi, dr7": ("mov $0x400, %edi", "mov %rdi, %dr7", Intercept.DR7_WRITE, 7, 0, 3),
    "sidt": ("", f"sidt {DATA:#x}", Intercept.IDTR_READ, 0, None, 8),
    "sgdt": ("", f"sgdt {DATA:#x}", Intercept.GDTR_READ, 0, None, 8),
    "sldt": ("", "sldt %ax", Intercept.LDTR_READ, 0, None, 4),
    "str": ("", "str %ax", Intercept.TR_READ, 0, None, 4),
    "lidt": (f"sidt {DATA:#x}", f"lidt {DATA:#x}", Intercept.IDTR_WRITE, 0, None, 8),
    "lgdt": (f"sgdt {DATA:#x}", f"lgdt {DATA:#x}", Intercept.GDTR_WRITE, 0, None, 8),
    "lldt": ("xor %eax, %eax", "lldt %ax", Intercept.LDTR_WRITE, 0, None, 3),
    "ltr": ("andb $0xfd, 0x12045; mov $0x40, %eax", "ltr %ax", Intercept.TR_WRITE, 0, None, 3),
    "rdtsc": ("", "rdtsc", Intercept.RDTSC, 0, None, 2),
    "rdtscp": ("", "rdtscp", Intercept.RDTSCP, 0, None, 3),
    "pushf": ("", "pushfq", Intercept.PUSHF, 0, None, 1),
    "popf": ("pushfq", "popfq", Intercept.POPF, 0, None, 1),
    "cpuid": ("", "cpuid", Intercept.CPUID, 0, None, 2),
    "rsm": ("", "rsm", Intercept.RSM, 0, None, 2),
    "iret": (
        "mov %rsp, %rbx; push $0x10; push %rbx; pushfq; push $8; push $out",
        "iretq; out:",
        Intercept.IRET,
        0,
        None,
        2,
    ),
    "int n": ("", "int $0x80", Intercept.INTN, 0x80, None, 2),
    "invd": ("", "invd", Intercept.INVD, 0, None, 2),
    "wbinvd": ("", "wbinvd", Intercept.WBINVD, 0, None, 2),
    "pause": ("", "pause", Intercept.PAUSE, 0, None, 2),
    "hlt": ("", "hlt", Intercept.HLT, 0, None, 1),
    "invlpg": ("mov $0x4321, %ebx", "invlpg 0x123000(%rbx)", Intercept.INVLPG, 0x127321, None, 7),
    "invlpga": (
        "xor %eax, %eax; mov $1, %ecx",
        "invlpga %rax, %ecx",
        Intercept.INVLPGA,
        0,
        None,
        3,
    ),
    "vmrun": ("", "vmrun %rax", Intercept.VMRUN, 0, None, 3),
    "vmmcall": ("", "vmmcall", Intercept.VMMCALL, 0, None, 3),
    "vmload": ("", "vmload %rax", Intercept.VMLOAD, 0, None, 3),
    "vmsave": ("", "vmsave %rax", Intercept.VMSAVE, 0, None, 3),
    "stgi": ("", "stgi", Intercept.STGI, 0, None, 3),
    "clgi": ("", "clgi", Intercept.CLGI, 0, None, 3),
    "skinit": ("", "skinit %eax", Intercept.SKINIT, 0, None, 3),
    "icebp": ("", ".byte 0xf1", Intercept.ICEBP, 0, None, 1),
    "monitor": ("mov $0x400000, %eax; xor %ecx, %ecx", "monitor", Intercept.MONITOR, 0, None, 3),
    "mwait": ("xor %ecx, %ecx", "mwait", Intercept.MWAIT, 0, None, 3),
    "mwait, armed": (
        "mov $0x400000, %eax; xor %ecx, %ecx; monitor",
        "mwait",
        Intercept.MWAIT_CONDITIONAL,
        0,
        None,
        3,
    ),
    "xsetbv": (
        "mov %cr4, %rax; or $0x40000, %eax; mov %rax, %cr4; xor %ecx, %ecx; xgetbv",
        "xsetbv",
        Intercept.XSETBV,
        0,
        None,
        3,
    ),
    "invpcid": (
        "xor %eax, %eax; movq $0, 0x400000; movq $0, 0x400008; mov $0x400000, %ebx; mov $2, %eax",
        "invpcid (%rbx), %rax",
        Intercept.INVPCID,
        0,
        None,
        5,
    ),
}
# Without the intercept these fault in L2: at CPL 0 with SVM on.
UNDEFINED = {"rsm", "vmmcall", "skinit"}
# What ends or stops L2 by itself, or has no meaning without preparation.
NOT_ALONE = {"rdpmc", "vmrun", "vmmcall", "hlt", "stgi", "clgi", "vmload", "vmsave"}


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_an_intercepted_instruction_exits_with_its_information(name):
    setup, instruction, intercept, info1, info2, length = INSTRUCTIONS[name]
    world = World(f"{setup}\nat: {instruction}\nlast: vmmcall", wants=[intercept])
    world.run()
    vmcb, at = world.vmcb, world.l2.labels["at"]
    assert vmcb.exitcode == intercept
    assert vmcb.rip == at
    assert vmcb.nrip == at + length
    assert vmcb.exitinfo1 == info1
    assert info2 is None or vmcb.exitinfo2 == info2
    assert vmcb.exitintinfo == 0
    assert not world.vcpu.gif


@pytest.mark.parametrize("name", sorted(INSTRUCTIONS.keys() - NOT_ALONE))
def test_an_instruction_that_nobody_wants_is_carried_out(name):
    setup, instruction, *_ = INSTRUCTIONS[name]
    world = World(f"{setup}\nat: {instruction}\nlast: vmmcall")
    if name in UNDEFINED:
        world.want(Intercept.EXCP_UD)
    world.run()
    if name in UNDEFINED:
        assert world.vmcb.exitcode == ExitCode.EXCP_UD
        assert world.vmcb.rip == world.l2.labels["at"]
        return
    assert world.vmcb.exitcode == ExitCode.VMMCALL
    assert world.vmcb.rip == world.l2.labels["last"]


def test_the_intercept_of_debug_exceptions_does_not_see_icebp():
    world = World(".byte 0xf1; last: vmmcall", wants=[Intercept.EXCP_DB])
    world.run()
    assert world.vmcb.exitcode == ExitCode.VMMCALL
    assert world.vmcb.rip == world.l2.labels["last"]
    assert world.seen(Vector.DB) == 1


@pytest.mark.parametrize(
    "setup",
    ["mov $5, %ecx", "xor %ecx, %ecx; xor %eax, %eax"],
    ids=["no such register", "an illegal value"],
)
def test_xsetbv_exits_before_its_general_protection_fault(setup):
    enable = "mov %cr4, %rax; or $0x40000, %eax; mov %rax, %cr4"
    wants = [Intercept.XSETBV, Intercept.EXCP_GP]
    world = World(f"{enable}; xor %edx, %edx; {setup}; xsetbv", wants=wants)
    world.run()
    assert world.vmcb.exitcode == ExitCode.XSETBV


def test_xsetbv_without_osxsave_is_undefined_before_it_exits():
    world = World("xsetbv", wants=[Intercept.XSETBV, Intercept.EXCP_UD])
    world.run()
    assert world.vmcb.exitcode == ExitCode.EXCP_UD


# An exception in L2: code, vector, error code, address in EXITINFO2.
EXCEPTIONS = {
    "#DE": ("xor %ecx, %ecx; xor %edx, %edx", "div %ecx", Vector.DE, 0, 0),
    "#BP": ("", "int3", Vector.BP, 0, 0),
    "#UD": ("", "ud2", Vector.UD, 0, 0),
    "#NM": ("mov %cr0, %rax; or $8, %eax; mov %rax, %cr0", "fninit", Vector.NM, 0, 0),
    "#NP": ("movl $0, 0x12044; mov $0x40, %eax", "lldt %ax", Vector.GP, 0x40, 0),
    "#GP(0)": ("mov $1 << 63, %rbx", "mov (%rbx), %eax", Vector.GP, 0, 0),
    "#GP(selector)": ("mov $0x1238, %eax", "mov %eax, %ds", Vector.GP, 0x1238, 0),
    "#GP of an MSR": ("mov $0x4b564d77, %ecx", "rdmsr", Vector.GP, 0, 0),
    "#GP of CR4": ("mov $1 << 40, %rax", "mov %rax, %cr4", Vector.GP, 0, 0),
    "#MF": (
        "fninit; push $0x340; fldcw (%rsp); fldz; fld1; fdivp",
        "fwait",
        Vector.MF,
        0,
        0,
    ),
    "#SS": (
        "mov $0x00cf13000000ffff, %rax; mov %rax, GDT + 0x38; mov $0x38, %eax",
        "mov %eax, %ss",
        Vector.SS,
        0x38,
        0,
    ),
    "#PF": ("mov $0x123456789000, %rbx", "movl $1, 0x10(%rbx)", Vector.PF, 2, 0x123456789010),
}


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_an_intercepted_exception_exits_at_its_instruction(name):
    setup, instruction, vector, error, address = EXCEPTIONS[name]
    world = World(f"{setup}\nat: {instruction}")
    world.vmcb.cr2 = 0x5555
    world.want(Intercept(Intercept.EXCP_DE + vector))
    world.run()
    vmcb = world.vmcb
    assert vmcb.exitcode == ExitCode.EXCP_DE + vector
    assert vmcb.rip == world.l2.labels["at"]
    assert (vmcb.exitinfo1, vmcb.exitinfo2) == (error, address)
    assert vmcb.cr2 == 0x5555
    assert vmcb.nrip == (world.l2.labels["at"] + 1 if vector is Vector.BP else 0)
    assert world.seen(vector) == 0


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_an_exception_that_nobody_wants_is_l2s(name):
    setup, instruction, vector, error, address = EXCEPTIONS[name]
    world = World(f"{setup}\nat: {instruction}")
    handler = 0x210000
    world.memory.write(handler, b"\x0f\x01\xd9")  # VMMCALL
    world.memory.write(IDT + 16 * vector, gate(handler))
    world.run()
    assert world.vmcb.exitcode == ExitCode.VMMCALL
    assert world.vmcb.rip == handler
    if vector is Vector.PF:
        assert world.vmcb.cr2 == address
    frame = world.memory.u64(world.vmcb.rsp)
    length = 1 if vector is Vector.BP else 0
    if name not in ("#DE", "#BP", "#UD", "#NM", "#MF"):
        assert frame == error
        frame = world.memory.u64(world.vmcb.rsp + 8)
    assert frame == world.l2.labels["at"] + length


def test_a_single_step_exits_behind_the_instruction_and_tells_dr6():
    world = World("pushfq; orl $0x100, (%rsp); popfq; nop; at: nop", wants=[Intercept.EXCP_DB])
    world.run()
    assert world.vmcb.exitcode == ExitCode.EXCP_DB
    assert world.vmcb.rip == world.l2.labels["at"]
    assert world.vmcb.dr6 & 1 << 14


def test_a_single_step_over_what_l0_carries_out_exits_as_well():
    world = World("pushfq; orl $0x100, (%rsp); popfq; cpuid; at: nop", wants=[Intercept.EXCP_DB])
    world.run()
    assert world.vmcb.exitcode == ExitCode.EXCP_DB
    assert world.vmcb.rip == world.l2.labels["at"]
    assert world.vmcb.dr6 & 1 << 14


# -- the selective CR0 write -------------------------------------------------------------------

CR0_WRITES = {
    "ts and mp": ("mov %cr0, %rax; xor $0xa, %eax", "mov %rax, %cr0", False),
    "nothing": ("mov %cr0, %rax", "mov %rax, %cr0", False),
    "am": ("mov %cr0, %rax; xor $0x40000, %eax", "mov %rax, %cr0", True),
    "cd": ("mov %cr0, %rax; or $0x40000000, %eax", "mov %rax, %cr0", True),
    "clts": ("", "clts", False),
    "lmsw of ts": ("smsw %ax; xor $8, %eax", "lmsw %ax", False),
    "lmsw of em": ("smsw %ax; xor $4, %eax", "lmsw %ax", True),
}


@pytest.mark.parametrize("name", CR0_WRITES)
def test_the_selective_intercept_ignores_ts_and_mp(name):
    setup, instruction, exits = CR0_WRITES[name]
    world = World(f"{setup}\nat: {instruction}", wants=[Intercept.CR0_SEL_WRITE])
    world.run()
    if exits:
        assert world.vmcb.exitcode == ExitCode.CR0_SEL_WRITE
        assert world.vmcb.rip == world.l2.labels["at"]
    else:
        assert world.vmcb.exitcode == ExitCode.VMMCALL


def test_the_full_cr0_intercept_comes_before_the_selective_one():
    wants = [Intercept.CR0_SEL_WRITE, Intercept.CR0_WRITE]
    world = World("mov %cr0, %rax; xor $0x40000, %eax; mov %rax, %cr0", wants=wants)
    world.run()
    assert world.vmcb.exitcode == ExitCode.CR0_WRITE


def test_l2s_write_of_cr0_is_l2s_alone():
    world = World("mov %cr0, %rax; or $0x40000, %eax; mov %rax, %cr0")
    world.run()
    assert world.vmcb.cr0 & Cr0.am
    assert not world.vcpu.state.cr0 & Cr0.am


# -- the permission maps -----------------------------------------------------------------------

PORTS = {
    "outb": ("mov $0x5a50, %edx", "out %al, %dx", 0x5A50, 0x5A500210, 1),
    "inl": ("mov $0x5a50, %edx", "in %dx, %eax", 0x5A53, 0x5A500241, 1),
    "outw imm": ("", "outw %ax, $0x44", 0x45, 0x00440220, 3),
    "last port, beyond the end": ("mov $0xffff, %edx", "in %dx, %ax", 0x10000, 0xFFFF0221, 2),
    "outsb": ("mov $0x5a50, %edx; mov $0x400000, %esi", "outsb", 0x5A50, 0x5A500E14, 1),
    "rep insl": (
        "mov $0x5a50, %edx; mov $0x400000, %edi; mov $2, %ecx",
        "rep insl",
        0x5A50,
        0x5A50024D,
        2,
    ),
    "outsb fs": (
        "mov $0x5a50, %edx; mov $0x400000, %esi",
        "outsb %fs:(%rsi), %dx",
        0x5A50,
        0x5A501214,
        2,
    ),
}


@pytest.mark.parametrize("name", PORTS)
def test_a_port_in_the_map_exits_with_the_next_rip(name):
    setup, instruction, port, info1, length = PORTS[name]
    world = World(f"{setup}\nat: {instruction}", wants=[Intercept.IOIO_PROT])
    where = world.vmcb.iopm_base_pa + port // 8
    world.memory.write(where, bytes((1 << port % 8,)))
    world.run()
    at = world.l2.labels["at"]
    assert world.vmcb.exitcode == ExitCode.IOIO
    assert world.vmcb.exitinfo1 == info1
    assert world.vmcb.exitinfo2 == at + length
    assert world.vmcb.rip == at


def test_a_port_that_is_not_in_the_map_is_l2s():
    world = World("mov $0x5a50, %edx; mov $-1, %eax; in %dx, %al", wants=[Intercept.IOIO_PROT])
    world.memory.write(world.vmcb.iopm_base_pa + 0x5A51 // 8, b"\xfe")
    world.run()
    assert world.vmcb.exitcode == ExitCode.VMMCALL


def test_l2s_own_permissions_come_before_the_map():
    ring3 = (
        "push $0x33; push $0x2e0000; push $2; push $0x2b; push $user; iretq; user: out %al, $0x80"
    )
    world = World(ring3, wants=[Intercept.IOIO_PROT, Intercept.EXCP_GP])
    world.memory.write(world.vmcb.iopm_base_pa, b"\xff" * 0x3000)
    world.run()
    assert world.vmcb.exitcode == ExitCode.EXCP_GP
    assert world.vmcb.cpl == 3


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize(
    ("number", "byte", "bit"),
    [
        (Msr.SYSENTER_CS, 0x174 // 4, 0),
        (Msr.EFER, 0x800 + 0x80 // 4, 0),
        (Msr.VM_HSAVE_PA, 0x1000 + 0x117 // 4, 6),
        (0x4B564D00, None, 0),
    ],
)
def test_an_msr_in_the_map_exits(number, byte, bit, write):
    access = "wrmsr" if write else "rdmsr"
    world = World(f"mov ${int(number):#x}, %ecx; at: {access}", wants=[Intercept.MSR_PROT])
    if byte is not None:
        world.memory.write(world.vmcb.msrpm_base_pa + byte, bytes((1 << bit + write,)))
    world.run()
    assert world.vmcb.exitcode == ExitCode.MSR
    assert world.vmcb.exitinfo1 == write
    assert world.vmcb.nrip == world.l2.labels["at"] + 2


def test_an_msr_that_is_not_in_the_map_is_read_and_written_by_l2():
    msr = int(Msr.STAR)
    world = World(
        f"mov ${msr:#x}, %ecx; mov $0x1234, %eax; xor %edx, %edx; wrmsr; rdmsr; mov %eax, DATA",
        wants=[Intercept.MSR_PROT],
    )
    world.run()
    assert world.vmcb.exitcode == ExitCode.VMMCALL
    assert world.data() & 0xFFFFFFFF == 0x1234


def test_an_interrupt_to_a_gate_reaches_l2_when_nobody_wants_it():
    world = World("int $0x80; int $0x81; int3")
    world.run()
    assert (world.seen(0x80), world.seen(0x81), world.seen(3)) == (1, 1, 1)


def test_int_3_in_two_bytes_is_a_software_interrupt_and_no_breakpoint():
    world = World("int3; .byte 0xcd, 3", wants=[Intercept.INTN])
    world.run()
    assert world.vmcb.exitcode == ExitCode.SWINT
    assert world.vmcb.exitinfo1 == 3
    assert world.seen(3) == 1


@pytest.mark.parametrize(("count", "passes"), [(0, 0), (1, 0), (3, 2)])
def test_the_pause_filter_counts(count, passes):
    world = World("1: incl 0x400000; pause; jmp 1b", wants=[Intercept.PAUSE])
    world.vmcb.pause_filter_count = count
    world.run()
    assert world.vmcb.exitcode == ExitCode.PAUSE
    assert world.data() == passes + 1


def test_a_shutdown_of_l2_is_an_exit():
    world = World("lidt 0x400000; ud2", wants=[Intercept.SHUTDOWN])
    world.run()
    assert world.vmcb.exitcode == ExitCode.SHUTDOWN


def test_the_second_exception_exits_before_it_becomes_a_double_fault():
    world = World("at: mov $0x1238, %eax; mov %eax, %ds", wants=[Intercept.EXCP_NP])
    absent = gate(STUBS)[:5] + b"\x0e" + bytes(10)
    world.memory.write(IDT + 16 * 13, absent)
    world.run()
    assert world.vmcb.exitcode == ExitCode.EXCP_NP
    assert world.vmcb.exitinfo1 & 2, "the error code is about a gate of the IDT"
    assert world.vmcb.exitintinfo == 0x80000B0D | 0x1238 << 32


def test_a_double_fault_exits_with_the_first_event():
    world = World("at: mov $0x1238, %eax; mov %eax, %ds", wants=[Intercept.EXCP_DF])
    world.memory.write(IDT + 16 * 13, bytes(16))
    world.run()
    assert world.vmcb.exitcode == ExitCode.EXCP_DF
    assert world.vmcb.exitinfo1 == 0
    assert world.vmcb.exitintinfo == 0x80000B0D | 0x1238 << 32


def test_a_contributory_fault_is_l2s_when_l1_wants_double_faults_only():
    world = World(
        "mov $0x1238, %eax; movb $0xcf, 0x20000 + 13 * 64; at: nop", wants=[Intercept.EXCP_DF]
    )
    handler = 0x210000
    world.memory.write(handler, b"\x0f\x01\xd9")
    world.memory.write(IDT + 16 * 13, gate(handler))
    world.memory.write(world.l2.labels["at"], b"\x8e\xd8")
    world.run()
    assert world.vmcb.exitcode == ExitCode.VMMCALL
    assert world.vmcb.rip == handler


def test_clearing_efer_svme_in_l2_makes_vmmcall_undefined():
    clear = f"mov $0xc0000080, %ecx; rdmsr; and ${~int(Efer.svme) & 0xFFFFFFFF:#x}, %eax; wrmsr"
    world = World(f"{clear}; at: vmmcall", wants=[Intercept.EXCP_UD])
    world.run()
    assert world.vmcb.exitcode == ExitCode.EXCP_UD
    assert world.vmcb.rip == world.l2.labels["at"] != L2_CODE


IN_COMPATIBILITY_MODE = {
    "#OF": ("mov $0x7fffffff, %eax; inc %eax; at: into", Intercept.EXCP_OF, 1),
    "#BR": ("movl $5, 0x400000; movl $9, 0x400004; at: bound %eax, 0x400000", Intercept.EXCP_BR, 0),
}


@pytest.mark.parametrize("name", IN_COMPATIBILITY_MODE)
def test_exceptions_of_legacy_instructions_exit_as_well(name):
    source, intercept, length = IN_COMPATIBILITY_MODE[name]
    world = World(f".code32; mov $1, %eax; {source}", wants=[intercept])
    world.vmcb.set_segment(VmcbField.CS_SELECTOR, Segment(CS32, 0, 0xFFFFFFFF, CODE32))
    world.run()
    at = world.l2.labels["at"]
    assert world.vmcb.exitcode == intercept
    assert world.vmcb.rip == at
    assert world.vmcb.nrip == (at + length if length else 0)


def test_a_task_state_segment_that_is_too_small_is_an_exception_that_exits():
    ring3 = "push $0x33; push $0x2e0000; push $2; push $0x2b; push $at; iretq; at: int $0x80"
    world = World(ring3, wants=[Intercept.EXCP_TS])
    world.vmcb.tr_limit = 3
    world.run()
    assert world.vmcb.exitcode == ExitCode.EXCP_TS
    assert world.vmcb.rip == world.l2.labels["at"]
    assert world.vmcb.exitintinfo & 0x800007FF == 0x80000480


def test_rdpmc_that_nobody_wants_is_refused():
    world = World("xor %ecx, %ecx; at: rdpmc", wants=[Intercept.EXCP_GP])
    world.run()
    assert world.vmcb.exitcode == ExitCode.EXCP_GP
    assert world.vmcb.rip == world.l2.labels["at"]


# Intercepts with tests of their own, here and in the tests of events.
ELSEWHERE = {
    *(Intercept.INTR, Intercept.NMI, Intercept.SMI, Intercept.INIT, Intercept.VINTR),
    *(Intercept.CR0_SEL_WRITE, Intercept.IOIO_PROT, Intercept.MSR_PROT, Intercept.SHUTDOWN),
    *(Intercept.EXCP_DB, Intercept.EXCP_DF, Intercept.EXCP_NP, Intercept.EXCP_SX),
    *(Intercept.EXCP_OF, Intercept.EXCP_BR, Intercept.EXCP_TS),
}


def test_every_intercept_is_tested_or_has_a_reason_why_it_has_no_effect():
    tested = {row[2] for row in INSTRUCTIONS.values()} | ELSEWHERE
    tested |= {Intercept(Intercept.EXCP_DE + row[2]) for row in EXCEPTIONS.values()}
    assert tested | UNSUPPORTED.keys() == set(Intercept)
    assert not tested & UNSUPPORTED.keys()
