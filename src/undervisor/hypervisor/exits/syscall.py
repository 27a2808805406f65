"""SYSCALL and SYSENTER, which the silicon cannot execute itself."""

from __future__ import annotations

from undervisor.arch.svm.vmcb import VmcbField
from undervisor.arch.x86.events import GP0, UD
from undervisor.arch.x86.registers import Cr0, Efer, Rflags
from undervisor.arch.x86.segments import Segment
from undervisor.hypervisor.exit import Exit
from undervisor.hypervisor.vcpu import Vcpu
from undervisor.hypervisor.verdict import RESUME, Inject, Verdict
from undervisor.silicon.processor import SiliconVmcb

_LENGTH = 2
_CODE64, _CODE32, _DATA = 0xA9B, 0xC9B, 0xC93
_FLAT = 0xFFFF_FFFF


def syscall(vcpu: Vcpu, exit: Exit) -> Verdict:
    """SYSCALL. SDM 2B "SYSCALL--Fast System Call"; APM 3 for legacy mode."""
    state = vcpu.state
    if not state.efer & Efer.sce or not state.cr0 & Cr0.pe:
        return Inject(UD)
    long_mode, code64 = bool(state.efer & Efer.lma), bool(state.hflags & 0x8000)
    if not code64 and not vcpu.is_amd:
        return Inject(UD)
    selector = state.star >> 32 & 0xFFFC
    rflags, after = state.rflags & ~Rflags.rf, state.rip + _LENGTH
    target = (state.lstar if code64 else state.cstar) if long_mode else state.star & _FLAT
    cleared = state.sfmask if long_mode else Rflags.vm | Rflags.if_ | Rflags.rf
    state.q[1] = after
    if long_mode:
        state.q[11] = rflags
    code = Segment(selector, 0, _FLAT, _CODE64 if long_mode else _CODE32)
    _enter_kernel(vcpu, code, selector + 8, target, rflags & ~cleared | 2, None)
    return RESUME


def sysenter(vcpu: Vcpu, exit: Exit) -> Verdict:
    """SYSENTER. SDM 2B "SYSENTER--Fast System Call"."""
    state = vcpu.state
    long_mode = bool(state.efer & Efer.lma)
    if long_mode and vcpu.is_amd:
        return Inject(UD)
    if not state.cr0 & Cr0.pe or not state.sysenter_cs & 0xFFFC:
        return Inject(GP0)
    selector = state.sysenter_cs & 0xFFFC
    mask = (1 << 64) - 1 if long_mode else _FLAT
    code = Segment(selector, 0, _FLAT, _CODE64 if long_mode else _CODE32)
    rflags = vcpu.rflags_without(Rflags.vm | Rflags.if_)
    rip, rsp = state.sysenter_eip & mask, state.sysenter_esp & mask
    _enter_kernel(vcpu, code, selector + 8, rip, rflags, rsp)
    return RESUME


def _enter_kernel(
    vcpu: Vcpu, code: Segment, stack: int, rip: int, rflags: int, rsp: int | None
) -> None:
    """Load flat ring-0 CS and SS, RIP, RFLAGS and perhaps RSP."""

    def change(vmcb: SiliconVmcb) -> None:
        vmcb.set_segment(VmcbField.CS_SELECTOR, code)
        vmcb.set_segment(VmcbField.SS_SELECTOR, Segment(stack, 0, _FLAT, _DATA))
        vmcb.cpl, vmcb.rip, vmcb.rflags = 0, rip, rflags
        vmcb.interrupt_shadow = 0
        if rsp is not None:
            vmcb.rsp = rsp

    vcpu.reload(change)
