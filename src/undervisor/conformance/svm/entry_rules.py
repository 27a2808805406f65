"""Every rule of VMRUN, broken alone in a VMCB that the processor enters."""

from __future__ import annotations

from typing import Final

from undervisor.arch.svm.checks import RULES
from undervisor.conformance.entries.claims import check
from undervisor.conformance.entries.svm.entries import SvmEntries
from undervisor.conformance.suite import guest_test
from undervisor.conformance.svm.lab import SvmLab

SECTIONS: Final = {rule.section: rule.section for rule in RULES}


@guest_test("APM: VMRUN Instruction", cases=SECTIONS)
def each_rule_of_a_section_fails_vmrun(lab: SvmLab, section: str) -> None:
    """A VMCB that breaks one rule of VMRUN gives VMEXIT_INVALID."""
    check(SvmEntries(lab.probe), [rule.id for rule in RULES if rule.section == section])
