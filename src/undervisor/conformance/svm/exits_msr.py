"""The MSR permission map: which MSRs exit, and what L2 does with the others."""

from __future__ import annotations

from typing import Final

from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.svm.permissions import MSRS_PER_RANGE, msr_bit
from undervisor.arch.svm.vmcb import VmcbField as F
from undervisor.arch.x86.msr import Msr
from undervisor.conformance.expect import Lacking, each, equal
from undervisor.conformance.suite import guest_test
from undervisor.conformance.svm import modes
from undervisor.conformance.svm.lab import SvmLab
from undervisor.conformance.svm.run import Run

WANTS: Final = [Intercept.MSR_PROT]
MAP_SIZE: Final = 0x2000
# One MSR for each range that exists everywhere with SVM, and a value that it takes.
KNOWN: Final = {Msr.SYSENTER_ESP: 0x123456, Msr.LSTAR: 0x234567, Msr.VM_HSAVE_PA: 0x600000}
FIRSTS: Final = (0x0, 0xC0000000, 0xC0010000)
EDGES: Final = [msr for first in FIRSTS for msr in (first, first + MSRS_PER_RANGE - 1)]
OUTSIDE: Final = [
    msr for first in FIRSTS for msr in (first - 1 & 0xFFFFFFFF, first + MSRS_PER_RANGE)
]  # fmt: skip
READ, WRITE = 0, 1


def _bit(lab: SvmLab, msr: int, write: int, on: bool = True) -> None:
    bit = msr_bit(msr)
    assert bit is not None, "the map covers it"
    lab.set_bit(lab.places.msr, bit + write, on)


def _access(lab: SvmLab, msr: int, write: int, value: int = 0) -> Run:
    text = "wrmsr" if write else "rdmsr"
    return lab.run(text, {F.RAX: value & 0xFFFFFFFF},
                   registers={"rcx": msr, "rdx": value >> 32}, wants=WANTS)  # fmt: skip


@guest_test("APM: MSR Intercepts")
def an_msr_in_the_map_exits(lab: SvmLab) -> None:
    """RDMSR and WRMSR each exit by their own bit of the map; EXITINFO1 tells which it was."""
    got, wanted = {}, {}
    for msr, value in KNOWN.items():
        for bit in (READ, WRITE):
            lab.fill(lab.places.msr, MAP_SIZE)
            _bit(lab, msr, bit)
            for access in (READ, WRITE):
                case = f"{msr.name}, {'W' if access else 'R'} with the bit of {'W' if bit else 'R'}"
                run = _access(lab, msr, access, value)
                got[case] = (run.code, run.info1 if run.code == ExitCode.MSR else access)
                exits = ExitCode.MSR if bit == access else ExitCode.VMMCALL
                wanted[case] = (exits, access)
    lab.l1.wrmsr(Msr.VM_HSAVE_PA, lab.places.region)
    each("exit and EXITINFO1", got, lambda case: wanted[case])


@guest_test("APM: MSR Intercepts", "APM: MSR Ranges Covered by MSRPM")
def the_edges_of_the_ranges_are_covered(lab: SvmLab) -> None:
    """The first and the last MSR of each of the three ranges exit by their bits."""
    runs = {}
    for msr in EDGES:
        lab.fill(lab.places.msr, MAP_SIZE)
        _bit(lab, msr, READ)
        runs[msr] = _access(lab, msr, READ)
    each("the exit", {msr: run.code for msr, run in runs.items()}, ExitCode.MSR)
    each("RCX", {msr: run.registers["rcx"] for msr, run in runs.items()}, lambda msr: msr)


@guest_test("APM: MSR Intercepts", "APM: MSR Ranges Covered by MSRPM")
def an_msr_outside_the_ranges_always_exits(lab: SvmLab) -> None:
    """With MSR_PROT set, an MSR that the map does not cover exits, though the map is all 0."""
    got = {}
    for msr in OUTSIDE:
        for access in (READ, WRITE):
            run = _access(lab, msr, access)
            got[f"{'WRMSR' if access else 'RDMSR'} of {msr:#x}"] = run.code
    each("the exit", got, ExitCode.MSR)


@guest_test("APM: MSR Intercepts", "APM: Intercept Operation")
def without_msr_prot_the_map_is_not_looked_at(lab: SvmLab) -> None:
    """While the MSR_PROT intercept is clear no MSR exits, whatever the map says."""
    lab.fill(lab.places.msr, MAP_SIZE, 0xFF)
    run = lab.run(f"mov ${int(Msr.LSTAR):#x}, %ecx; rdmsr; wrmsr")
    run.ends()


@guest_test("APM: MSR Intercepts")
def an_intercepted_write_does_not_happen(lab: SvmLab) -> None:
    """WRMSR that exits has not written, RDMSR that exits has not read."""
    _bit(lab, Msr.SYSENTER_EIP, WRITE)
    _bit(lab, Msr.SYSENTER_EIP, READ)
    run = _access(lab, Msr.SYSENTER_EIP, WRITE, 0x777000)
    run.exits_with(ExitCode.MSR, WRITE)
    equal("SYSENTER_EIP after WRMSR", run[F.SYSENTER_EIP], lab.vmcb.sysenter_eip)
    run = lab.run("rdmsr", {F.RAX: 0x55}, {"rcx": int(Msr.SYSENTER_EIP), "rdx": 0x66}, wants=WANTS)
    run.exits_with(ExitCode.MSR, READ)
    equal("EAX and EDX after RDMSR", (run.registers["rax"], run.registers["rdx"]), (0x55, 0x66))


@guest_test("APM: MSR Intercepts", "APM: Instruction Intercepts")
def privilege_comes_before_the_map(lab: SvmLab) -> None:
    """At CPL 3 RDMSR and WRMSR are #GP(0) of L2, whatever the map says."""
    lab.fill(lab.places.msr, MAP_SIZE, 0xFF)
    begin = modes.user(lab)
    for text in ("rdmsr", "wrmsr"):
        run = lab.run(text, begin, wants=[*WANTS, Intercept.EXCP_GP])
        run.exits_with(ExitCode.EXCP_GP, 0)


@guest_test("APM: MSR Intercepts", "APM: RDMSR")
def an_unknown_msr_that_is_not_intercepted_faults_in_l2(lab: SvmLab) -> None:
    """An MSR that does not exist is #GP(0) of L2 where the map lets it through."""
    missing = 0x1FF0
    if lab.l1.rdmsr(missing).fault is None:
        raise Lacking(f"a fault at RDMSR of {missing:#x}, which no processor has")
    lab.code(f"mov ${missing:#x}, %ecx; rdmsr")
    lab.run(None, wants=WANTS).delivers(13)
    lab.run(None, wants=[*WANTS, Intercept.EXCP_GP]).exits_with(ExitCode.EXCP_GP, 0)


# MSRs whose L2 values VMLOAD and VMRUN give, and the field of each.
IN_VMCB: Final = {
    Msr.STAR: F.STAR, Msr.LSTAR: F.LSTAR, Msr.CSTAR: F.CSTAR, Msr.FMASK: F.SFMASK,
    Msr.KERNEL_GS_BASE: F.KERNEL_GS_BASE, Msr.FS_BASE: F.FS_BASE, Msr.GS_BASE: F.GS_BASE,
    Msr.SYSENTER_CS: F.SYSENTER_CS, Msr.SYSENTER_ESP: F.SYSENTER_ESP,
    Msr.SYSENTER_EIP: F.SYSENTER_EIP,
}  # fmt: skip


@guest_test("APM: MSR Intercepts", "APM: VMCB Layout, State Save Area")
def msrs_that_are_not_intercepted_are_l2s_own(lab: SvmLab) -> None:
    """L2 reads the MSRs that its VMCB has, what it writes is saved there, and L1's stay."""
    with lab.batch() as batch:
        before = {msr: batch.rdmsr(msr) for msr in IN_VMCB}
    changes = {field: 0x10 + 0x10 * n for n, field in enumerate(IN_VMCB.values())}
    got, saved = {}, {}
    for msr, field in IN_VMCB.items():
        code = f"mov ${int(msr):#x}, %ecx; rdmsr; mov %eax, %ebx; inc %eax; wrmsr"
        run = lab.run(code, changes)
        run.ends()
        got[msr], saved[msr] = run.registers["rbx"], run[field]
    each("what L2 reads", got, lambda msr: changes[IN_VMCB[msr]])
    each("what is saved", saved, lambda msr: changes[IN_VMCB[msr]] + 1)
    with lab.batch() as batch:
        after = {msr: batch.rdmsr(msr) for msr in IN_VMCB}
    each("L1's MSR", {m: a.value for m, a in after.items()}, lambda m: before[m].value)
