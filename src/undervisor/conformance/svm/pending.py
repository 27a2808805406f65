"""Entering L2 while something waits for the processor: who gets it, and when.

L1 clears GIF, lets something become pending, and enters; how often it has been delivered to L1 is
looked at before and after it sets GIF again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.x86.events import Vector
from undervisor.arch.x86.msr import Msr
from undervisor.conformance.expect import Lacking
from undervisor.conformance.svm.lab import Changes, SvmLab
from undervisor.conformance.svm.run import Run

APIC: Final = 0xFEE00000
VECTOR: Final = 0x55
TO_APIC: Final = f"mov ${APIC:#x}, %edi;"
SELF_INTERRUPT: Final = f"movl ${0x40000 | VECTOR:#x}, 0x300(%rdi);"
SELF_NMI: Final = "movl $0, 0x310(%rdi); movl $0x400, 0x300(%rdi);"
"""An NMI to APIC 0, which is the processor itself: the shorthand "self" is for fixed ones only."""


def timer(counts: int = 20000) -> str:
    """The local APIC's timer, once, so many counts from now."""
    return f"movl ${VECTOR:#x}, 0x320(%rdi); movl $0xb, 0x3e0(%rdi); movl ${counts}, 0x380(%rdi);"


def xapic(lab: SvmLab) -> None:
    """Lacking where the local APIC is not at its usual address in xAPIC mode."""
    base = lab.l1.rdmsr(Msr.APIC_BASE).value
    if base & 0xFFFFFFC00 != APIC | 0x800:
        raise Lacking(f"a local APIC in xAPIC mode at {APIC:#x} (IA32_APIC_BASE is {base:#x})")


@dataclass(frozen=True, slots=True)
class Entered:
    """An L2 that ran; `held` and `taken`: deliveries to L1 before and after it set GIF."""

    run: Run
    held: int
    taken: int


def enter(
    lab: SvmLab,
    before: str,
    changes: Changes | None = None,
    *,
    wants: Iterable[Intercept] = (),
    without: Iterable[Intercept] = (),
    interrupts: bool = True,
    vector: int = VECTOR,
) -> Entered:
    """CLGI, `before` with RDI at the APIC, IF as `interrupts`, VMRUN; then STGI and a look.

    `vector` is the one whose deliveries to L1 are counted.
    """
    count = f"{lab.block.counts + 4 * vector:#x}"
    flag = "sti" if interrupts else "cli"
    code = f"""
        mov %rax, %r12
        mov $SCRATCH, %eax; vmsave %rax
        movl $0, {count}
        clgi
        {TO_APIC} {before}
        {flag}
        mov %r12, %rax; vmload %rax
        vmrun %rax
        mov $SCRATCH, %eax; vmload %rax
        mov {count}, %r13d
        stgi
        nop
        nop
        mov {count}, %r14d
        sti
        nop
        cli
    """
    with lab.batch() as batch:
        lab.plan_launch(batch, bytes(lab.area(changes, wants, without)))
        ran = batch.call(lab.assemble(code), {"rax": lab.places.control}, ["r13", "r14"])
        run = lab.plan_reading(batch)
    return Entered(run, ran.value["r13"], ran.value["r14"])


NMI: Final = int(Vector.NMI)
