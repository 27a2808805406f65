"""Nested page faults of L0's own tables: memory-mapped I/O, and what is no memory at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from undervisor.hypervisor import decode, mmio
from undervisor.hypervisor.exit import Exit
from undervisor.hypervisor.exits import io
from undervisor.hypervisor.verdict import Verdict

if TYPE_CHECKING:
    from undervisor.hypervisor.vcpu import Vcpu


def nested_page_fault(vcpu: Vcpu, exit: Exit) -> Verdict:
    """An access that L0's nested tables do not allow: L0 carries it out on its devices."""
    if decode.instruction(vcpu).code in io.STRINGS:
        return io.string(vcpu)
    return mmio.emulate(vcpu)
