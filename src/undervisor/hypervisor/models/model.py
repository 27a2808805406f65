"""A CPU model: what an L1 finds in CPUID and in the MSRs of its processors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

from undervisor.arch.vmx.capabilities import ProcessorFacts, VmxCapabilities
from undervisor.arch.vmx.fields import VmcsField
from undervisor.arch.x86 import msr
from undervisor.arch.x86.cpuid import Answer, Processor, Vendor
from undervisor.arch.x86.msr import Msr, MsrSpec
from undervisor.arch.x86.registers import Cr4
from undervisor.hypervisor.models import vmx_capabilities
from undervisor.hypervisor.models.dependencies import ARCH_CAPABILITIES
from undervisor.hypervisor.models.leaves import XCR0_SUPPORTED, CpuidState, Identity, Leaves

CR4_BITS: Final[dict[str, int]] = {
    "vme": Cr4.vme | Cr4.pvi,
    "tsc": Cr4.tsd,
    "de": Cr4.de,
    "pse": Cr4.pse,
    "pae": Cr4.pae,
    "mce": Cr4.mce,
    "pge": Cr4.pge,
    "fxsr": Cr4.osfxsr,
    "sse": Cr4.osxmmexcpt,
    "umip": Cr4.umip,
    "la57": Cr4.la57,
    "vmx": Cr4.vmxe,
    "smx": Cr4.smxe,
    "fsgsbase": Cr4.fsgsbase,
    "pcid": Cr4.pcide,
    "xsave": Cr4.osxsave,
    "smep": Cr4.smep,
    "smap": Cr4.smap,
    "pku": Cr4.pke,
}
"""Which feature gives which bits of CR4; CR4.PCE needs none."""

_WRITE_BACK = 0x0606_0606_0606_0606
_WRITE_PROTECTED = 0x0505_0505_0505_0505
_PCI_HOLE = 0xC000_0000

FIRMWARE_MTRRS: Final[dict[int, int]] = {
    Msr.MTRR_DEF_TYPE: msr.MtrrDefType.of(type=6, fixed_enable=1, enable=1),
    Msr.MTRR_FIX64K_00000: _WRITE_BACK,
    Msr.MTRR_FIX16K_80000: _WRITE_BACK,
    **{Msr.MTRR_FIX4K_C0000 + i: _WRITE_PROTECTED for i in range(8)},
    Msr.MTRR_PHYSBASE0: _PCI_HOLE,
}
"""Write-back memory with the holes of a PC, as firmware leaves the MTRRs."""


@dataclass(frozen=True)
class CpuModel:
    """A processor as its guest sees it.

    `spec`: how the user wrote it.  `features`: names of CPUID bits, of VMX features and of bits
    of IA32_ARCH_CAPABILITIES.
    """

    spec: str
    vendor: Vendor
    features: frozenset[str]
    identity: Identity
    physical_width: int = 40
    linear_width: int = 48

    @property
    def name(self) -> str:
        """The named model that this is, or was before overrides."""
        return self.spec.split(",")[0]

    @cached_property
    def processor(self) -> Processor:
        """What the rules of `arch` need to know."""
        return Processor(self.vendor, self.features, self.physical_width, self.linear_width)

    @cached_property
    def leaves(self) -> Leaves:
        """The CPUID answers."""
        return Leaves(self.processor, self.identity)

    def cpuid(self, leaf: int, subleaf: int, state: CpuidState) -> Answer:
        """What CPUID with these inputs (EAX, ECX) returns on a processor in `state`."""
        return self.leaves.answer(leaf, subleaf, state)

    def has(self, name: str) -> bool:
        """Whether the model has a feature, by name."""
        return name in self.features

    @cached_property
    def msr_table(self) -> dict[int, MsrSpec]:
        """The MSRs that this model has; access to any other raises #GP."""
        return msr.available(self.processor)

    def msrs(self, *, firmware: bool = True) -> dict[int, int]:
        """The MSRs' initial values: as firmware hands them over, or as after power-up.

        The memory size (TOP_MEM, TOP_MEM2) and IA32_APIC_BASE.BSP are the machine's to set.
        """
        values = msr.reset_values(self.processor)
        if self.vmx is not None:
            reported = self.vmx.to_msrs()
            values |= {n: v for n, v in reported.items() if n in values}
        if Msr.ARCH_CAPABILITIES in values:
            bits = sum(1 << bit for name, bit in ARCH_CAPABILITIES.items() if self.has(name))
            values[Msr.ARCH_CAPABILITIES] = bits
        if firmware:
            values |= self._firmware(values)
        return {int(number): int(value) for number, value in sorted(values.items())}

    def _firmware(self, values: dict[int, int]) -> dict[int, int]:
        """What firmware sets before it starts a system: MTRRs and the VMX lock."""
        left = dict(FIRMWARE_MTRRS) if Msr.MTRRCAP in values else {}
        if left:
            below = (1 << self.physical_width) - (1 << 30)
            left[Msr.MTRR_PHYSMASK0] = below | 1 << 11
        if Msr.FEATURE_CONTROL in values:
            left[Msr.FEATURE_CONTROL] = msr.FeatureControl.of(lock=1, vmx_outside_smx=1)
        return left

    @cached_property
    def vmx(self) -> VmxCapabilities | None:
        """The VMX capabilities as after power-up; None on a model without VMX.

        `feature_control` is zero here: the MSR's current value is the vCPU's.
        """
        if not self.has("vmx"):
            return None
        return vmx_capabilities.capabilities(self.processor, self.cr4_supported)

    @cached_property
    def vmcs_fields(self) -> frozenset[VmcsField]:
        """The VMCS fields that VMREAD and VMWRITE know on this model."""
        return vmx_capabilities.vmcs_fields(self.features) if self.has("vmx") else frozenset()

    @cached_property
    def facts(self) -> ProcessorFacts:
        """What the rules of VM entry need to know beside the VMX MSRs."""
        return vmx_capabilities.facts(self.processor)

    @cached_property
    def cr4_supported(self) -> int:
        """The bits of CR4 that may be 1."""
        mask = Cr4.pce
        for name, bits in CR4_BITS.items():
            if self.has(name):
                mask |= bits
        return mask

    @property
    def xcr0_supported(self) -> int:
        """The bits of XCR0 that may be 1; 0 without XSAVE."""
        return XCR0_SUPPORTED if self.has("xsave") else 0

    def efer_supported(self, msrs: msr.Msrs) -> int:
        """The bits of EFER that may be 1 while the processor's MSRs are `msrs`."""
        return msr.efer_supported(self.processor, msrs)
