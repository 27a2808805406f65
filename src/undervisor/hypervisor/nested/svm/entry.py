"""VMRUN's work: host state away, vmcb12 merged into vmcb02, guest state loaded, event injected.

APM 2 "VMRUN Instruction".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.svm.vmcb import LbrControl, NestedControl
from undervisor.arch.svm.vmcb import VmcbField as F
from undervisor.arch.x86.events import EventType, Vector
from undervisor.arch.x86.msr import Msr
from undervisor.arch.x86.registers import DR7_FIXED_ONE, Rflags
from undervisor.hypervisor.nested.svm import controls
from undervisor.hypervisor.nested.svm.exit import host_goes_on, write_information
from undervisor.hypervisor.verdict import SWITCHED, Switched, Verdict
from undervisor.silicon.layout import Env
from undervisor.silicon.processor import RESUME, SiliconVmcb

if TYPE_CHECKING:
    from undervisor.hypervisor.nested.svm.state import SvmState
    from undervisor.hypervisor.vcpu import Vcpu

# This is the path of every entry: plain numbers, computed once, in place of the enumerations.
_CONTROLS_END, _TLB_CONTROL = int(F.TSC_OFFSET), int(F.TLB_CONTROL)
_VIRTUAL, _VECTOR, _ASID = F.V_INTR_CONTROL >> 2, F.V_INTR_VECTOR >> 2, F.GUEST_ASID >> 2
_PAUSES, _TSC_OFFSET, _NESTED = F.PAUSE_FILTER_COUNT >> 1, F.TSC_OFFSET >> 3, F.NESTED_CONTROL >> 3
_N_CR3, _LBR, _G_PAT = F.N_CR3 >> 3, F.LBR_CONTROL >> 3, F.G_PAT >> 3
_EVENTINJ, _NRIP, _RFLAGS_NOW = F.EVENTINJ >> 3, F.NRIP >> 3, Env.RFLAGS >> 3
_IF, _NOT_RF = int(Rflags.if_), (1 << 64) - 1 & ~int(Rflags.rf)
_NP_ENABLE, _PAT = int(NestedControl.np_enable), int(Msr.PAT)
_VIRTUAL_VMLOAD: Final = int(LbrControl.virtualized_vmload_vmsave_enable)
_EVENT_VALID, _HAS_ERROR = 1 << 31, 1 << 11
_SOFTWARE: Final = (Vector.BP, Vector.OF)


def enter(vcpu: Vcpu, svm: SvmState, vmcb12: SiliconVmcb, length: int) -> Verdict:
    """Enter L2 from a VMCB that breaks no rule; `length` is VMRUN's."""
    leave_vmrun(vcpu, svm, length)
    svm.vmcb12 = vmcb12
    _load_controls(vcpu, svm, vmcb12)
    _load_guest(vcpu, vmcb12)
    svm.reason, svm.software_rip = "VMRUN", None
    action = _inject(vcpu, svm, vmcb12)
    vcpu.attention = _something_waits(vcpu, svm)
    return SWITCHED if action == RESUME else Switched(action)


def fail(vcpu: Vcpu, svm: SvmState, vmcb12: SiliconVmcb, length: int) -> Verdict:
    """VMEXIT_INVALID: the host goes on behind VMRUN with GIF clear."""
    leave_vmrun(vcpu, svm, length)
    write_information(vmcb12, ExitCode.INVALID, 0, 0, 0)
    vcpu.state.dr7 = DR7_FIXED_ONE
    vcpu.gif = False
    vcpu.processor.request_window(False)
    svm.reason = "#VMEXIT(INVALID)"
    return host_goes_on(vcpu)


def leave_vmrun(vcpu: Vcpu, svm: SvmState, length: int) -> None:
    """The host's state as VMRUN saves it: behind the instruction, RFLAGS.RF clear."""
    vcpu.pass_over(length)
    live = vcpu.state.q
    rflags = live[_RFLAGS_NOW] & _NOT_RF
    live[_RFLAGS_NOW], svm.host_interrupts = rflags, bool(rflags & _IF)


def _load_controls(vcpu: Vcpu, svm: SvmState, vmcb12: SiliconVmcb) -> None:
    current = bytes(vmcb12.b[0:_CONTROLS_END])
    if current != svm.controls:
        controls.merge(vcpu, svm, vmcb12)
        svm.controls = current
    q, d = vmcb12.q, vmcb12.d
    svm.virtual, svm.vector = d[_VIRTUAL], d[_VECTOR] & 0xFF
    svm.pauses_left = vmcb12.w[_PAUSES]
    svm.virtual_vmload = bool(q[_LBR] & _VIRTUAL_VMLOAD)
    svm.monitor_armed = False
    vcpu.l2_tsc_offset = q[_TSC_OFFSET]
    svm.nested_paging = bool(q[_NESTED] & _NP_ENABLE)
    if svm.nested_paging:
        shadow = svm.shadows.select(vcpu, q[_N_CR3], d[_ASID], vmcb12.b[_TLB_CONTROL])
        vcpu.vmcb02.q[_N_CR3] = shadow.tables.root
        msrs = vcpu.msrs
        svm.host_pat, msrs[_PAT] = msrs[_PAT], q[_G_PAT]
    else:
        vcpu.vmcb02.q[_N_CR3] = vcpu.machine.npt01.root


def _load_guest(vcpu: Vcpu, vmcb12: SiliconVmcb) -> None:
    """Host state to vmcb01, guest state loaded; what VMLOAD loads stays as it is."""
    vmcb02 = vcpu.vmcb02
    vcpu.in_l2, vcpu.vmcb, vcpu.gif = True, vmcb02, True
    vcpu.processor.enter_svm(vcpu.vmcb01, vmcb12, vmcb02)
    if vcpu.nmi_blocked:
        vcpu.watch_iret()


def _inject(vcpu: Vcpu, svm: SvmState, vmcb12: SiliconVmcb) -> int:
    """EVENTINJ. APM 2 "Event Injection"; the silicon's action."""
    event = vmcb12.q[_EVENTINJ]
    if not event & _EVENT_VALID:
        return RESUME
    vector, kind, processor = event & 0xFF, event >> 8 & 7, vcpu.processor
    if kind == EventType.EXTERNAL_INTERRUPT:
        return processor.inject_interrupt(vector)
    if kind == EventType.NMI:
        return processor.inject_nmi()
    if kind == EventType.EXCEPTION and vector not in _SOFTWARE:
        return processor.inject_exception(vector, event >> 32 if event & _HAS_ERROR else None)
    # What INT n, INT3 and INTO push is nRIP, where the processor has it.
    rip, behind = vcpu.state.rip, vmcb12.q[_NRIP]
    svm.software_rip = rip
    length = behind - rip if behind and vcpu.has("nrip-save") else 0
    return processor.inject_software(vector, length, kind)


def _something_waits(vcpu: Vcpu, svm: SvmState) -> bool:
    """Whether an event must be looked at before L2's first instruction."""
    return bool(
        svm.virtual & 0x100
        or vcpu.nmi_pending
        or vcpu.init_pending
        or vcpu.lapic.pending() is not None
    )
