"""What a vCPU's SVM keeps: the VMCB that L2 runs from, and what VMRUN took out of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from undervisor.arch.svm.capabilities import SvmCapabilities
from undervisor.arch.svm.checks import SvmVerdict, VmrunChecker
from undervisor.arch.svm.vmcb import VirtualInterrupt, Vmcb
from undervisor.arch.x86.cpuid import Leaf
from undervisor.arch.x86.registers import Cr0, Efer
from undervisor.hypervisor.models.leaves import CpuidState
from undervisor.hypervisor.nested.svm.paging import Shadows
from undervisor.silicon.memory import PAGE, Memory
from undervisor.silicon.processor import SiliconVmcb

if TYPE_CHECKING:
    from undervisor.hypervisor.vcpu import Vcpu

_MOST_VMCBS: Final = 1024
_DEVICES: Final = (0xA0000, 0x100000)


class GuestVmcb(SiliconVmcb):
    """A VMCB of L1's, used in place: the silicon saves straight into it."""

    __slots__ = ()

    def __init__(self, memory: Memory, gpa: int) -> None:
        self.hpa = gpa
        self.pointer = memory.host_pointer(gpa)
        Vmcb.__init__(self, memory.view(gpa))


class SvmState:
    """One vCPU's nested SVM.

    `software_rip` is where INT n, INT3, INTO or an injection of one was, while it is delivered.
    `wanted` has L1's intercepts as one number: bit n is exit code n.  `virtual` is
    V_INTR_CONTROL as the processor holds it while L2 runs.  `controls` are the bytes of vmcb12
    that `wanted` and the intercepts of vmcb02 were made of.  `broken` says what the last VMRUN
    that gave VMEXIT_INVALID was about.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._vmcbs: dict[int, GuestVmcb] = {}
        self._absent: SiliconVmcb | None = None
        self._checkers: dict[bool, VmrunChecker] = {}
        self.shadows = Shadows(memory)
        self.vmcb12: SiliconVmcb | None = None
        self.broken: SvmVerdict | None = None
        self.controls = b""
        self.owes_error_code = False
        self.reason = ""
        # Each VMRUN sets these.
        self.wanted = self.iopm = self.msrpm = 0
        self.virtual = self.vector = self.host_pat = self.pauses_left = 0
        self.host_interrupts = self.nested_paging = self.virtual_vmload = False
        self.monitor_armed = False
        self.software_rip: int | None = None

    def at(self, gpa: int) -> SiliconVmcb:
        """The VMCB at a guest-physical address of L1, one of zeros where there is no RAM."""
        known = self._vmcbs.get(gpa)
        if known is not None:
            return known
        inside_devices = _DEVICES[0] <= gpa < _DEVICES[1]
        if inside_devices or not self._memory.is_ram(gpa, PAGE):
            return self._no_memory()
        if len(self._vmcbs) >= _MOST_VMCBS:
            self._vmcbs.clear()
        found = self._vmcbs[gpa] = GuestVmcb(self._memory, gpa)
        return found

    def _no_memory(self) -> SiliconVmcb:
        """What VMRUN finds where nothing answers: no rule allows such a VMCB."""
        if self._absent is None:
            self._absent = SiliconVmcb(self._memory)
        return self._absent

    def checker(self, vcpu: Vcpu) -> VmrunChecker:
        """The rules of VMRUN for the hypervisor as it is now."""
        paging = bool(vcpu.state.cr0 & Cr0.pg)
        known = self._checkers.get(paging)
        if known is None:
            known = self._checkers[paging] = VmrunChecker(capabilities(vcpu))
        return known

    @property
    def masks_interrupts(self) -> bool:
        """V_INTR_MASKING: the host's IF and TPR hold for physical interrupts."""
        return bool(self.virtual & VirtualInterrupt.v_intr_masking)

    def gif(self, vcpu: Vcpu) -> bool:
        """The global interrupt flag that holds for L2's virtual interrupts."""
        if self.virtual & VirtualInterrupt.v_gif_enable:
            return bool(self.virtual & VirtualInterrupt.v_gif)
        return vcpu.gif


def capabilities(vcpu: Vcpu) -> SvmCapabilities:
    """What the rules of VMRUN need to know of the vCPU's model and of L1."""
    model = vcpu.model
    _, asids, features2, features = model.cpuid(Leaf.SVM, 0, CpuidState())
    return SvmCapabilities(
        features=features,
        features2=features2,
        asids=asids,
        physical_width=model.physical_width,
        cr4=model.cr4_supported,
        efer=model.efer_supported(vcpu.all_msrs()) | Efer.svme | Efer.lma,
        long_mode=model.has("lm"),
        host_cr0=vcpu.state.cr0,
        host_efer=vcpu.state.efer,
    )
