"""Which extension a CPU model has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from undervisor.hypervisor.nested import Nested
from undervisor.hypervisor.nested.none import NoNested

if TYPE_CHECKING:
    from undervisor.hypervisor.vcpu import Vcpu


def nested_for(vcpu: Vcpu) -> Nested:
    """A new, switched-off extension for a vCPU of the model's vendor."""
    return NoNested()
