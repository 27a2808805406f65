"""Defects of peers that are known: which test shows one, what it is, and the evidence.

The manual's sections are cited by their titles.  What a peer's source does was read in the version
that is named; what it does, seen by running it.
"""

from __future__ import annotations

from typing import Final

from undervisor.conformance.known.bochs_svm import DEFECTS as BOCHS_SVM
from undervisor.conformance.known.bochs_vmx import DEFECTS as BOCHS_VMX
from undervisor.conformance.known.defect import Known
from undervisor.conformance.known.lab import DEFECTS as LAB
from undervisor.conformance.known.linux import DEFECTS as LINUX
from undervisor.conformance.known.qemu import DEFECTS as QEMU
from undervisor.conformance.runner import Result

KNOWN: Final[tuple[Known, ...]] = (*QEMU, *BOCHS_SVM, *BOCHS_VMX, *LAB, *LINUX)


def explain(result: Result) -> Known | None:
    """What is known of a bad result; None where nothing is."""
    return next((known for known in KNOWN if known.fits(result)), None)


__all__ = ["KNOWN", "Known", "explain"]
