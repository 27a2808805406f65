"""What a processor lets a hypervisor do: the VMX capability MSRs, or the SVM leaf.

A `CapabilitySet` is one machine's, wherever it was read; `capability_texts` reads saved ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from undervisor.arch.svm.capabilities import ANY_PROCESSOR, SvmCapabilities
from undervisor.arch.vmx.capabilities import ProcessorFacts, VmxCapabilities, VmxMsr
from undervisor.explain.dump import SVM, VMX

MSRS = frozenset(int(msr) for msr in VmxMsr)
MOST = 4096
"""Processors of a machine."""


@dataclass(slots=True)
class CapabilitySet:
    """One machine's capabilities.

    `cpus` has the VMX MSRs of each processor, in their order; one entry where only one is known.
    `svm` are EAX, EBX, ECX and EDX of CPUID 8000_000AH.  `physical_width` and `linear_width` are
    0 where they are unknown.  `notes` say what could not be read.
    """

    name: str
    cpus: list[dict[int, int]] = field(default_factory=list)
    svm: tuple[int, int, int, int] | None = None
    physical_width: int = 0
    linear_width: int = 0
    cpuid: dict[str, bool] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def vendor(self) -> str:
        """VMX, SVM, or nothing."""
        if any(self.cpus):
            return VMX
        return SVM if self.svm is not None else ""

    @property
    def msrs(self) -> dict[int, int]:
        """What every processor reports; of those that differ, the first one's."""
        return self.cpus[0] if self.cpus else {}

    def differing(self) -> dict[int, dict[int, list[int]]]:
        """MSRs that the processors do not agree on: for each value, the processors with it."""
        found: dict[int, dict[int, list[int]]] = {}
        for index in sorted({index for cpu in self.cpus for index in cpu}):
            values: dict[int, list[int]] = {}
            for cpu, msrs in enumerate(self.cpus):
                if index in msrs:
                    values.setdefault(msrs[index], []).append(cpu)
            if len(values) > 1:
                found[index] = values
        return found

    def vmx(self) -> VmxCapabilities | None:
        """For the rules of VM entry; None without IA32_VMX_BASIC."""
        if VmxMsr.IA32_VMX_BASIC not in self.msrs:
            return None
        plain = ProcessorFacts()
        facts = replace(
            plain,
            physical_address_width=self.physical_width or plain.physical_address_width,
            linear_address_width=self.linear_width or plain.linear_address_width,
        )
        return VmxCapabilities.from_msrs(self.msrs, facts)

    def for_vmrun(self) -> SvmCapabilities | None:
        """For the rules of VMRUN; the bits of CR4 and EFER are taken to be all there."""
        if self.svm is None:
            return None
        _, asids, ecx, edx = self.svm
        width = self.physical_width or ANY_PROCESSOR.physical_width
        return replace(
            ANY_PROCESSOR, features=edx, features2=ecx, asids=asids, physical_width=width
        )

    def as_json(self) -> dict[str, object]:
        """What `parse` reads back."""
        data: dict[str, object] = {"name": self.name}
        if self.physical_width:
            data["physical_address_width"] = self.physical_width
        if self.linear_width:
            data["linear_address_width"] = self.linear_width
        if self.cpus:
            data["cpus"] = [{f"{i:#x}": f"{v:#x}" for i, v in sorted(c.items())} for c in self.cpus]
        if self.svm is not None:
            data["svm"] = dict(zip(("eax", "ebx", "ecx", "edx"), map(hex, self.svm), strict=True))
        if self.cpuid:
            data["cpuid"] = self.cpuid
        return data


def from_msrs(name: str, msrs: Mapping[int, int]) -> CapabilitySet:
    """A set of one processor."""
    return CapabilitySet(name, [{int(i): int(v) for i, v in msrs.items() if i in MSRS}])
