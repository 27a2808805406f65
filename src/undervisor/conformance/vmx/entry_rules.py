"""Every rule of VM entry, broken alone from a state that the processor enters."""

from __future__ import annotations

from typing import Final

from undervisor.arch.vmx.checks import RULES
from undervisor.conformance.entries.claims import check
from undervisor.conformance.entries.vmx.entries import VmxEntries
from undervisor.conformance.suite import guest_test
from undervisor.conformance.vmx.lab import VmxLab

SECTIONS: Final = {rule.section: rule.section for rule in RULES}


@guest_test("SDM: VM Entries", cases=SECTIONS)
def each_rule_of_a_section_fails_the_entry(lab: VmxLab, section: str) -> None:
    """A state that breaks one rule of VM entry fails with the outcome that the section gives."""
    lab.l1.vmxoff()
    check(VmxEntries(lab.probe), [rule.id for rule in RULES if rule.section == section])
