"""Intercepts of control and debug registers, and what L2 may do to them without."""

from __future__ import annotations

from typing import Final

from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.svm.vmcb import VirtualInterrupt
from undervisor.arch.svm.vmcb import VmcbField as F
from undervisor.arch.x86.events import Vector
from undervisor.arch.x86.msr import Msr
from undervisor.arch.x86.registers import Cr0, Cr4, Efer
from undervisor.conformance.expect import Lacking, each, equal
from undervisor.conformance.suite import guest_test
from undervisor.conformance.svm import modes
from undervisor.conformance.svm.lab import SvmLab
from undervisor.conformance.svm.needs import feature
from undervisor.conformance.svm.run import Run

MOV: Final = 1 << 63
"""EXITINFO1 of a MOV from or to a control register. APM 2, "MOV CRx/DRx Intercepts"."""
CRS: Final = (0, 2, 3, 4, 8)
DRS: Final = (0, 1, 2, 3, 6, 7)
R11: Final = 11


def _access(kind: str, number: int, *, write: bool) -> tuple[str, Intercept]:
    """MOV of R11 from or to a register, after reading it; and its intercept."""
    read = f"mov %{kind}{number}, %r11"
    text = f"mov %r11, %{kind}{number}" if write else read
    name = f"{'CR' if kind == 'cr' else 'DR'}{number}_{'WRITE' if write else 'READ'}"
    return text, Intercept[name]


def _both_ways(lab: SvmLab, kind: str, numbers: tuple[int, ...], *, write: bool) -> None:
    """With its intercept each access exits at the instruction; without, it is carried out."""
    alone: dict[str, object] = {}
    wanted: dict[str, object] = {}
    for number in numbers:
        text, intercept = _access(kind, number, write=write)
        before = f"mov %{kind}{number}, %r11" if write else "nop"
        lab.code(f"{before}\njmp 1f\n1: {text}")
        at = lab.places.code + len(lab.assemble(f"{before}\njmp 1f\n1:"))
        run = lab.run(None, wants=[intercept])
        alone[text] = (run.code, run.rip)
        wanted[text] = (intercept, at)
        others = [_access(kind, other, write=w)[1] for other in numbers for w in (False, True)]
        others = [other for other in others if other != intercept]
        lab.code(text if not write else f"mov $0x{_harmless(lab, kind, number):x}, %r11; {text}")
        run = lab.run(None, wants=others)
        alone[f"{text}, not intercepted"] = run.code
        wanted[f"{text}, not intercepted"] = ExitCode.VMMCALL
    each("exit code and RIP", alone, lambda text: wanted[text])


def _harmless(lab: SvmLab, kind: str, number: int) -> int:
    """A value that L2 may write into the register."""
    values = {0: lab.vmcb.cr0, 3: lab.vmcb.cr3, 4: lab.vmcb.cr4}
    return values.get(number, 0) if kind == "cr" else {6: 0xFFFF0FF0, 7: 0x400}.get(number, 0)


@guest_test("APM: Intercept Operation", "APM: Control Register Intercepts")
def a_read_of_a_control_register_exits_by_its_own_bit(lab: SvmLab) -> None:
    """MOV from CR0, CR2, CR3, CR4 and CR8 each exit by their own intercept, and by no other."""
    _both_ways(lab, "cr", CRS, write=False)


@guest_test("APM: Intercept Operation", "APM: Control Register Intercepts")
def a_write_of_a_control_register_exits_by_its_own_bit(lab: SvmLab) -> None:
    """MOV to CR0, CR2, CR3, CR4 and CR8 each exit by their own intercept, and by no other."""
    _both_ways(lab, "cr", CRS, write=True)


@guest_test("APM: Intercept Operation", "APM: Debug Register Intercepts")
def a_read_of_a_debug_register_exits_by_its_own_bit(lab: SvmLab) -> None:
    """MOV from DR0 to DR3, DR6 and DR7 each exit by their own intercept, and by no other."""
    _both_ways(lab, "dr", DRS, write=False)


@guest_test("APM: Intercept Operation", "APM: Debug Register Intercepts")
def a_write_of_a_debug_register_exits_by_its_own_bit(lab: SvmLab) -> None:
    """MOV to DR0 to DR3, DR6 and DR7 each exit by their own intercept, and by no other."""
    _both_ways(lab, "dr", DRS, write=True)


@guest_test("APM: MOV CRx/DRx Intercepts", needs=[feature("decode_assists")])
def decode_assists_name_the_general_register(lab: SvmLab) -> None:
    """With decode assists EXITINFO1 has the register of a MOV CRx or DRx, bit 63 for MOV CRx."""
    got, wanted = {}, {}
    for kind, numbers in (("cr", CRS), ("dr", DRS)):
        for number in numbers:
            for write in (False, True):
                text, intercept = _access(kind, number, write=write)
                got[text] = lab.run(text, wants=[intercept]).info1
                wanted[text] = R11 | (MOV if kind == "cr" else 0)
    each("EXITINFO1", got, lambda text: wanted[text])


@guest_test("APM: MOV CRx/DRx Intercepts", needs=[feature("decode_assists")])
def smsw_lmsw_and_clts_are_told_from_mov(lab: SvmLab) -> None:
    """SMSW, LMSW and CLTS exit by CR0's intercepts, and bit 63 of EXITINFO1 is 0."""
    for text, intercept in (("smsw %ax", Intercept.CR0_READ), ("clts", Intercept.CR0_WRITE),
                            ("lmsw %ax", Intercept.CR0_WRITE)):  # fmt: skip
        run = lab.run(text, wants=[intercept])
        run.exits_with(intercept.exit_code)
        equal(f"bit 63 of EXITINFO1 of {text}", run.info1 >> 63, 0)


# What the selective intercept of CR0 writes is about: setup, instruction, whether it exits.
SELECTIVE: Final = {
    "MOV that changes nothing": ("mov %cr0, %rax", "mov %rax, %cr0", False),
    "MOV that changes TS": ("mov %cr0, %rax; xor $8, %eax", "mov %rax, %cr0", False),
    "MOV that changes MP": ("mov %cr0, %rax; xor $2, %eax", "mov %rax, %cr0", False),
    "MOV that changes TS and MP": ("mov %cr0, %rax; xor $10, %eax", "mov %rax, %cr0", False),
    "MOV that changes AM": ("mov %cr0, %rax; xor $0x40000, %eax", "mov %rax, %cr0", True),
    "MOV that changes WP": ("mov %cr0, %rax; xor $0x10000, %eax", "mov %rax, %cr0", True),
    "MOV that changes CD": ("mov %cr0, %rax; xor $0x40000000, %eax", "mov %rax, %cr0", True),
    "MOV that changes NE": ("mov %cr0, %rax; xor $0x20, %eax", "mov %rax, %cr0", True),
    "MOV that changes TS and AM": ("mov %cr0, %rax; xor $0x40008, %eax", "mov %rax, %cr0", True),
    "CLTS": ("", "clts", False),
    "LMSW that changes EM": ("smsw %eax; xor $4, %eax", "lmsw %ax", True),
}  # fmt: skip


@guest_test("APM: CR0_SEL_WRITE", "APM: Control Register Intercepts")
def the_selective_intercept_leaves_out_ts_and_mp(lab: SvmLab) -> None:
    """CR0_SEL_WRITE exits for a write that changes a bit of CR0 other than TS and MP."""
    got, wanted = {}, {}
    for name, (setup, text, exits) in SELECTIVE.items():
        run = lab.run(f"{setup}; {text}", wants=[Intercept.CR0_SEL_WRITE])
        got[name] = run.code
        wanted[name] = ExitCode.CR0_SEL_WRITE if exits else ExitCode.VMMCALL
    each("the exit", got, lambda name: wanted[name])


@guest_test("APM: CR0_SEL_WRITE", "APM: Control Register Intercepts")
def the_plain_intercept_of_cr0_comes_first(lab: SvmLab) -> None:
    """With both intercepts set a write of CR0 exits as CR0_WRITE, whatever it changes."""
    wants = [Intercept.CR0_SEL_WRITE, Intercept.CR0_WRITE]
    for change in (0x40000, 8, 0):
        lab.code(f"mov %cr0, %rax; xor ${change}, %eax; mov %rax, %cr0")
        lab.run(None, wants=wants).exits_with(ExitCode.CR0_WRITE)


@guest_test("APM: Control Registers", "APM: #VMEXIT")
def a_write_that_faults_does_not_happen(lab: SvmLab) -> None:
    """A write of a control register with a reserved or impossible value is #GP(0) in L2."""
    cases = {
        "CR0 bit 32": "mov %cr0, %rax; bts $32, %rax; mov %rax, %cr0",
        "CR0.PG without PE": "mov %cr0, %rax; and $~1, %eax; mov %rax, %cr0",
        "CR0.NW without CD": "mov %cr0, %rax; bts $29, %rax; btr $30, %rax; mov %rax, %cr0",
        "CR4 bit 13": "mov %cr4, %rax; bts $13, %rax; mov %rax, %cr4",
        "CR4 bit 63": "mov %cr4, %rax; bts $63, %rax; mov %rax, %cr4",
        "CR4.PAE in long mode": "mov %cr4, %rax; btr $5, %rax; mov %rax, %cr4",
        "CR3 bit 52": "mov %cr3, %rax; bts $52, %rax; mov %rax, %cr3",
        "CR8 bit 4": "mov $0x10, %eax; mov %rax, %cr8",
        "DR7 bit 32": "mov $0x100000400, %rax; mov %rax, %dr7",
        "DR6 bit 32": "mov $0x100000000, %rax; mov %rax, %dr6",
    }  # fmt: skip
    runs = {n: lab.run(code, wants=[Intercept.EXCP_GP]) for n, code in cases.items()}
    got = {name: (run.code, run.info1) for name, run in runs.items()}
    each("the exit and its error code", got, (ExitCode.EXCP_GP, 0))
    kept = {name: tuple(run[f] for f in (F.CR0, F.CR3, F.CR4)) for name, run in runs.items()}
    each("CR0, CR3 and CR4", kept, tuple(lab.vmcb[f] for f in (F.CR0, F.CR3, F.CR4)))


@guest_test("APM: Intercept Operation", "APM: Instruction Intercepts")
def privilege_comes_before_the_intercepts_of_control_registers(lab: SvmLab) -> None:
    """At CPL 3, MOV CRx, MOV DRx, CLTS and LMSW are #GP before any intercept."""
    begin = modes.user(lab)
    cases = {
        "mov %cr0, %rax": Intercept.CR0_READ, "mov %rax, %cr3": Intercept.CR3_WRITE,
        "mov %cr8, %rax": Intercept.CR8_READ, "mov %rax, %cr8": Intercept.CR8_WRITE,
        "mov %db7, %rax": Intercept.DR7_READ, "clts": Intercept.CR0_WRITE,
        "lmsw %ax": Intercept.CR0_WRITE,
    }  # fmt: skip
    runs = {t: lab.run(t, begin, wants=[i, Intercept.EXCP_GP]) for t, i in cases.items()}
    each("the exit", {text: run.code for text, run in runs.items()}, ExitCode.EXCP_GP)


@guest_test("APM: Control Registers", "APM: VMRUN Instruction")
def l2s_control_registers_are_its_own(lab: SvmLab) -> None:
    """What L2 writes into CR0, CR2, CR4 and DR7 it reads again, and L1's are as before."""
    before = [lab.l1.read_cr(number).value for number in (0, 3, 4)]
    cr4 = lab.vmcb.cr4 | Cr4.de | Cr4.tsd
    run = lab.run(f"""
        mov %cr0, %rax; or ${int(Cr0.am | Cr0.mp | Cr0.ts)}, %eax; mov %rax, %cr0; mov %cr0, %rbx
        mov ${cr4}, %eax; mov %rax, %cr4; mov %cr4, %rcx
        mov $0x12345, %eax; mov %rax, %cr2; mov %cr2, %rdx
    """)  # fmt: skip
    run.ends()
    equal("CR0 in L2", run.registers["rbx"], lab.vmcb.cr0 | Cr0.am | Cr0.mp | Cr0.ts)
    equal("CR4 in L2", run.registers["rcx"], cr4)
    equal("CR2 in L2", run.registers["rdx"], 0x12345)
    after = [lab.l1.read_cr(number).value for number in (0, 3, 4)]
    equal("L1's CR0, CR3 and CR4", after, before)


@guest_test("APM: Control Registers", "APM: MOV (CRn)")
def a_flush_by_cr4_and_cr3_keeps_cr4(lab: SvmLab) -> None:
    """An L2 that toggles CR4.PGE and reloads CR3 reads CR4 as it wrote it, a thousand times."""
    run = lab.run("""
        mov $1000, %esi
        xor %edi, %edi
        mov %cr4, %rax
    1:  mov %cr4, %rcx
        cmp %rax, %rcx
        jne 2f
        btc $7, %rcx
        mov %rcx, %cr4
        mov %cr4, %rdx
        cmp %rcx, %rdx
        jne 2f
        mov %rax, %cr4
        mov %cr3, %rdx
        mov %rdx, %cr3
        dec %esi
        jnz 1b
    2:
    """)
    run.ends()
    equal("rounds that are left", run.registers["rsi"], 0)


@guest_test("APM: V_TPR", "APM: Virtual Interrupts, V_INTR_MASKING")
def with_masking_cr8_is_v_tpr(lab: SvmLab) -> None:
    """With V_INTR_MASKING L2's CR8 is V_TPR, and L1's own CR8 stays."""
    masked = int(VirtualInterrupt.v_intr_masking)
    lab.l1.write_cr(8, 5)
    run = lab.run("mov %cr8, %rbx; mov $9, %eax; mov %rax, %cr8; mov %cr8, %rcx",
                  {F.V_INTR_CONTROL: masked | 3})  # fmt: skip
    run.ends()
    equal("CR8 as L2 finds it", run.registers["rbx"], 3)
    equal("CR8 as L2 wrote it", run.registers["rcx"], 9)
    equal("V_TPR after the exit", run[F.V_INTR_CONTROL] & 0xFF, 9)
    cr8 = lab.l1.read_cr(8).value
    lab.l1.write_cr(8, 0)
    equal("L1's CR8", cr8, 5)


@guest_test("APM: V_TPR", "APM: Virtual Interrupts, V_INTR_MASKING")
def without_masking_cr8_is_the_processors(lab: SvmLab) -> None:
    """Without V_INTR_MASKING a write of CR8 in L2 changes the TPR that L1 has, and V_TPR."""
    run = lab.run("mov $9, %eax; mov %rax, %cr8; mov %cr8, %rcx")
    run.ends()
    cr8 = lab.l1.read_cr(8).value
    lab.l1.write_cr(8, 0)
    equal("CR8 as L2 reads it", run.registers["rcx"], 9)
    equal("L1's CR8", cr8, 9)
    equal("V_TPR after the exit", run[F.V_INTR_CONTROL] & 0xFF, 9)


@guest_test("APM: XSETBV", "APM: Instruction Intercepts")
def xsetbv_exits_between_its_exceptions(lab: SvmLab) -> None:
    """XSETBV exits by its intercept before its #GP, but behind the #UD without CR4.OSXSAVE."""
    wants = [Intercept.XSETBV, Intercept.EXCP_UD, Intercept.EXCP_GP]
    lab.run("xsetbv", wants=wants).exits_with(ExitCode.EXCP_UD)
    lab.run("xsetbv", wants=wants[:1]).delivers(Vector.UD)
    if not lab.l1.cpuid(1).value["rcx"] >> 26 & 1:
        raise Lacking("the processor has no XSAVE")
    begin = {F.CR4: lab.vmcb.cr4 | Cr4.osxsave}
    for text in ("mov $5, %ecx; xsetbv", "xor %ecx, %ecx; xor %eax, %eax; xor %edx, %edx; xsetbv"):
        lab.run(text, begin, wants=wants).exits_with(ExitCode.XSETBV)
        lab.run(text, begin, wants=wants[1:]).exits_with(ExitCode.EXCP_GP)


def _efer(change: str) -> str:
    return f"mov ${int(Msr.EFER):#x}, %ecx; rdmsr; {change}; wrmsr"


@guest_test("APM: Extended Feature Enable Register (EFER)", "APM: VMRUN Instruction")
def l2s_efer_is_its_own(lab: SvmLab) -> None:
    """L2 reads the VMCB's EFER, what it writes is in the VMCB afterwards, and L1's stays."""
    before = lab.l1.rdmsr(Msr.EFER).value
    run = lab.run(_efer("mov %eax, %ebx; xor $1, %eax"))
    run.ends()
    equal("EFER as L2 finds it", run.registers["rbx"], lab.vmcb.efer)
    equal("EFER after the exit", run[F.EFER], lab.vmcb.efer ^ Efer.sce)
    equal("L1's EFER", lab.l1.rdmsr(Msr.EFER).value, before)


@guest_test("APM: Extended Feature Enable Register (EFER)")
def a_bad_efer_of_l2_faults(lab: SvmLab) -> None:
    """WRMSR of EFER with a reserved bit, or LME changed while paging is on, is #GP in L2."""
    cases = {"bit 63": "bts $31, %edx", "bit 9": "bts $9, %eax", "LME": "btc $8, %eax"}
    runs: dict[str, Run] = {}
    for name, change in cases.items():
        runs[name] = lab.run(_efer(change), wants=[Intercept.EXCP_GP])
    each("the exit", {name: run.code for name, run in runs.items()}, ExitCode.EXCP_GP)
    each("EFER", {name: run[F.EFER] for name, run in runs.items()}, lab.vmcb.efer)


@guest_test("APM: Debug Registers", "APM: Instruction Intercepts")
def general_detect_faults_in_l2(lab: SvmLab) -> None:
    """With DR7.GD a MOV of a debug register is #DB with DR6.BD, and GD is then clear."""
    run = lab.run("mov $0x2400, %eax; mov %rax, %dr7; mov %db0, %rbx", wants=[Intercept.EXCP_DB])
    run.exits_with(ExitCode.EXCP_DB)
    equal("DR6.BD", run[F.DR6] >> 13 & 1, 1)
    lab.code("mov $0x2400, %eax; mov %rax, %dr7; mov %db0, %rbx")
    run = lab.run()
    run.delivers(Vector.DB)
    equal("DR7.GD in the handler", run[F.DR7] >> 13 & 1, 0)
