"""L2's RDMSR and WRMSR: the MSR bitmaps."""

from __future__ import annotations

from itertools import product
from typing import Final

from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.x86.msr import Msr
from undervisor.conformance.expect import each, equal
from undervisor.conformance.suite import guest_test
from undervisor.conformance.vmx.lab import VmxLab
from undervisor.conformance.vmx.run import Run

QUARTERS: Final = {
    ("rdmsr", 0x00000000): 0x000, ("rdmsr", 0xC0000000): 0x400,
    ("wrmsr", 0x00000000): 0x800, ("wrmsr", 0xC0000000): 0xC00,
}  # fmt: skip
"""Instruction and first MSR -> the byte where its bitmap of 1 KiB begins."""
REASON: Final = {"rdmsr": ExitReason.RDMSR, "wrmsr": ExitReason.WRMSR}
GP: Final = 13


def _accesses(lab: VmxLab, cases: list[tuple[str, int]], bitmaps: int = 1) -> list[Run]:
    controls = lab.primary(use_msr_bitmaps=bitmaps)
    sources = [f"mov ${msr:#x}, %ecx; {text}" for text, msr in cases]
    return lab.sweep([controls] * len(cases), sources=sources, registers={"rax": 0, "rdx": 0})


@guest_test("SDM: MSR-Bitmap Address")
def a_bit_makes_its_msr_exit_and_no_other(lab: VmxLab) -> None:
    """Each of the four bitmaps: the access whose bit is 1 exits, with bits 0 of all others."""
    got: dict[tuple[str, int], object] = {}
    for (text, first), offset in QUARTERS.items():
        for number in (0, 0x174, 0x1FFF):
            lab.fill(lab.places.msr, 0x1000)
            lab.set_bit(lab.places.msr + offset, number)
            (run,) = _accesses(lab, [(text, first + number)])
            got[text, first + number] = (run.reason, run.length, run.qualification)
    each("the reason, length and qualification of", got, lambda case: (REASON[case[0]], 2, 0))


@guest_test("SDM: MSR-Bitmap Address")
def a_clear_bit_lets_its_msr_pass(lab: VmxLab) -> None:
    """With all other bits 1 the access whose bit is 0 does not exit: it works, or is #GP(0)."""
    works = {("rdmsr", int(Msr.SYSENTER_CS)), ("wrmsr", int(Msr.SYSENTER_CS)),
             ("rdmsr", int(Msr.EFER)), ("wrmsr", int(Msr.KERNEL_GS_BASE))}  # fmt: skip
    cases = [*works, ("rdmsr", 0x1FF0), ("wrmsr", 0x1FF0), ("rdmsr", 0xC0001FF0)]
    got: dict[tuple[str, int], object] = {}
    lab.write(lab.places.msr, b"\xff" * 0x1000)
    for text, msr in cases:
        at = lab.places.msr + QUARTERS[text, msr & 0xC0000000]
        lab.set_bit(at, msr & 0x1FFF, on=False)
        (run,) = _accesses(lab, [(text, msr)])
        got[text, msr] = (run.reason, run.vector_of(run.rip))
        lab.set_bit(at, msr & 0x1FFF)
    each("the exit and the vector that L2 got for", got,
         lambda case: (ExitReason.VMCALL, None if case in works else GP))  # fmt: skip


@guest_test("SDM: MSR-Bitmap Address", "SDM: Instructions That Cause VM Exits Conditionally")
def an_msr_outside_the_ranges_of_the_bitmaps_exits(lab: VmxLab) -> None:
    """RDMSR and WRMSR exit if ECX is in neither 0-1FFFH nor C0000000H-C0001FFFH."""
    lab.fill(lab.places.msr, 0x1000)
    outside = (0x2000, 0x40000000, 0x80000000, 0xBFFFFFFF, 0xC0002000, 0xFFFFFFFF)
    cases = list(product(REASON, outside))
    runs = dict(zip(cases, _accesses(lab, cases), strict=True))
    each("the exit of", {case: run.reason for case, run in runs.items()}, lambda c: REASON[c[0]])


@guest_test("SDM: Instructions That Cause VM Exits Conditionally")
def without_bitmaps_every_msr_access_exits(lab: VmxLab) -> None:
    """With "use MSR bitmaps" 0 every RDMSR and WRMSR exits, of MSRs that do not exist too."""
    lab.fill(lab.places.msr, 0x1000)
    cases = list(product(REASON, (0x10, 0x1B, 0x174, 0x808, 0x1FF0, 0xC0000080, 0x2000)))
    runs = dict(zip(cases, _accesses(lab, cases, 0), strict=True))
    each("the exit of", {case: run.reason for case, run in runs.items()}, lambda c: REASON[c[0]])


@guest_test("SDM: MSR-Bitmap Address")
def the_upper_half_of_rcx_does_not_matter(lab: VmxLab) -> None:
    """The bitmaps go by ECX: bits 63:32 of RCX are ignored."""
    lab.fill(lab.places.msr, 0x1000)
    lab.set_bit(lab.places.msr, Msr.SYSENTER_CS)
    on = lab.primary(use_msr_bitmaps=1)
    high = 0xFFFF_FFFF << 32
    lab.run("rdmsr", on, {"rcx": high | Msr.SYSENTER_CS}).exits_with(ExitReason.RDMSR)
    lab.run("rdmsr", on, {"rcx": high | Msr.SYSENTER_ESP}).ends()


X2APIC: Final = 1 << 10
"""IA32_APIC_BASE bit 10."""


@guest_test("SDM: MSR-Bitmap Address", "SDM: Virtualizing MSR-Based APIC Accesses")
def l2_reaches_no_x2apic_msr_that_l1_withholds(lab: VmxLab) -> None:
    """While L1's bits for the x2APIC MSRs are 1, L2's accesses exit, in either mode of the APIC.

    With "virtualize x2APIC mode" and without.
    """
    bits = b"\xff" * 0x20
    lab.fill(lab.places.msr, 0x1000)
    lab.write(lab.places.msr + 0x100, bits)
    lab.write(lab.places.msr + 0x900, bits)
    msrs = (0x802, 0x808, 0x80B, 0x80D, 0x80F, 0x828, 0x830, 0x832, 0x838, 0x83F, 0x8FF)
    cases = list(product(REASON, msrs))
    with lab.batch() as batch:
        has = batch.cpuid(1)
        base = batch.rdmsr(Msr.APIC_BASE)
    for on in (0, X2APIC) if has.value["rcx"] >> 21 & 1 else (0,):
        if on:
            lab.l1.wrmsr(Msr.APIC_BASE, base.value | on)
        runs = dict(zip(cases, _accesses(lab, cases), strict=True))
        each("the exit of", {c: run.reason for c, run in runs.items()}, lambda c: REASON[c[0]])


@guest_test("SDM: Changes to Instruction Behavior in VMX Non-Root Operation")
def an_msr_that_does_not_exist_faults_where_it_does_not_exit(lab: VmxLab) -> None:
    """RDMSR that does not exit of an MSR that does not exist is #GP(0) in L2."""
    lab.fill(lab.places.msr, 0x1000)
    run = lab.run("rdmsr", lab.primary(use_msr_bitmaps=1), {"rcx": 0x1FF0, "rax": 5, "rdx": 6})
    run.delivers(GP)
    equal("RAX and RDX", (run.registers["rax"], run.registers["rdx"]), (5, 6))
