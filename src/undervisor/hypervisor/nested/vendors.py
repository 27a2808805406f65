"""Which extension a CPU model has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from undervisor.hypervisor.nested import Nested
from undervisor.hypervisor.nested.none import NoNested
from undervisor.hypervisor.nested.svm import NestedSvm
from undervisor.hypervisor.nested.vmx import NestedVmx

if TYPE_CHECKING:
    from undervisor.hypervisor.vcpu import Vcpu


def nested_for(vcpu: Vcpu) -> Nested:
    """A new, switched-off extension for a vCPU of the model's vendor."""
    if vcpu.has("vmx"):
        return NestedVmx(vcpu)
    if vcpu.has("svm"):
        return NestedSvm(vcpu)
    return NoNested()
