"""CPU models: what an L1 sees as its processor.

model = models.named("intel,+pcid,-xsave,phys-bits=39")
model.cpuid(leaf, subleaf, state)      # CPUID
model.msrs()                           # initial MSRs, capability MSRs among them
model.msr_table[number].legalize(...)  # WRMSR
model.vmx                              # VmxCapabilities, or None
"""

from undervisor.hypervisor.models.leaves import TSC_HZ, CpuidState
from undervisor.hypervisor.models.model import CpuModel
from undervisor.hypervisor.models.overrides import named, names

__all__ = ["TSC_HZ", "CpuModel", "CpuidState", "named", "names"]
