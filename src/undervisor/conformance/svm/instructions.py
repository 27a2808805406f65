"""The SVM instructions themselves: where they are undefined, and how each faults."""

from __future__ import annotations

from typing import Final

from undervisor.arch.x86.events import Vector
from undervisor.arch.x86.msr import Msr
from undervisor.arch.x86.registers import Efer
from undervisor.conformance.expect import each
from undervisor.conformance.suite import guest_test
from undervisor.conformance.svm.lab import SvmLab

NEED_SVME: Final = ("vmrun %rax", "vmload %rax", "vmsave %rax", "clgi", "invlpga %rax, %ecx")
"""STGI and SKINIT are defined without EFER.SVME where the processor has SKINIT."""


@guest_test("APM: Enabling SVM", "APM: VMRUN", "APM: VMLOAD", "APM: CLGI", "APM: INVLPGA")
def instructions_are_undefined_without_efer_svme(lab: SvmLab) -> None:
    """While EFER.SVME is 0, each SVM instruction causes #UD."""
    lab.l1.wrmsr(Msr.EFER, lab.facts.l1.efer & ~Efer.svme)
    with lab.batch() as batch:
        answers = {
            text: batch.call(lab.assemble(text), {"rax": lab.places.control}) for text in NEED_SVME
        }
    faults = {text: answer.fault and answer.fault.vector for text, answer in answers.items()}
    each("the exception without EFER.SVME", dict(faults), Vector.UD)
