"""Pending events while L2 runs: INIT, NMI, interrupts, virtual interrupts, in this order.

APM 2 "Interrupt and Local APIC Support", "Global Interrupt Flag", "INIT Support".
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from undervisor.arch.svm.exits import ExitCode, SmiInfo
from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.svm.vmcb import VirtualInterrupt
from undervisor.arch.x86.events import Fault, GuestFault, Vector
from undervisor.arch.x86.msr import Msr, VmCr
from undervisor.arch.x86.registers import Efer, Rflags
from undervisor.hypervisor import events
from undervisor.hypervisor.exits import windows
from undervisor.hypervisor.nested import INIT_BLOCKED, GuestExit
from undervisor.hypervisor.nested.svm import reflect
from undervisor.hypervisor.nested.svm.exit import leave
from undervisor.hypervisor.vcpu import Activity
from undervisor.hypervisor.verdict import Verdict
from undervisor.silicon.layout import Env
from undervisor.silicon.processor import RESUME

if TYPE_CHECKING:
    from undervisor.hypervisor.exit import Exit
    from undervisor.hypervisor.nested.svm.state import SvmState
    from undervisor.hypervisor.vcpu import Vcpu

_SX: Final = Fault(Vector.SX, 1)
_V_IRQ: Final = int(VirtualInterrupt.v_irq)
_V_IGN_TPR: Final = int(VirtualInterrupt.v_ign_tpr)


def take_init(vcpu: Vcpu, svm: SvmState) -> int | None:
    """An INIT. APM 2, table "INIT Handling in Different Operating Modes"."""
    if vcpu.activity is Activity.WAIT_FOR_SIPI:
        return None
    if not vcpu.gif:
        return INIT_BLOCKED
    if vcpu.in_l2 and svm.wanted >> Intercept.INIT & 1:
        return _exit(vcpu, svm, ExitCode.INIT)
    if not vcpu.msrs[Msr.VM_CR] & VmCr.r_init:
        return None
    vcpu.init_pending = False
    vcpu.activity = Activity.ACTIVE
    reflected = reflect.fault(vcpu, svm, 0, _SX) if vcpu.in_l2 else None
    if reflected is not None:
        vcpu.machine.note(vcpu, reflected)
        return reflected.deliver
    svm.owes_error_code = vcpu.attention = True
    return vcpu.inject(_SX)


def end_of_slice(svm: SvmState, vcpu: Vcpu, exit: Exit) -> Verdict:
    """A look between two blocks; the first in the handler of #SX completes its frame."""
    if svm.owes_error_code:
        _push_error_code(svm, vcpu)
    return windows.end_of_slice(vcpu, exit)


def _push_error_code(svm: SvmState, vcpu: Vcpu) -> None:
    """Push the error code of #SX, which the silicon takes for an exception without one.

    Nothing is pushed where the delivery ended elsewhere, in another exception's handler.
    GuestFault and GuestExit where the stack cannot be written.
    """
    svm.owes_error_code = False
    state = vcpu.state
    long_mode = bool(state.efer & Efer.lma)
    size = 16 if long_mode else 8
    gate = vcpu.read_gva_system(state.segment_base(Env.IDTR) + size * Vector.SX, size)
    low, attributes, high = struct.unpack_from("<H3xB2s", gate)
    if state.rip != low | int.from_bytes(high + gate[8:12], "little") << 16:
        return
    width = 8 if long_mode else 4 if attributes & 8 else 2
    base = 0 if long_mode else state.segment_base(Env.SS)
    where = base + state.q[4] - width
    fault = vcpu.write_gva(where, (_SX.error_code or 0).to_bytes(width, "little"))
    if fault is not None:
        raise GuestFault(fault)
    state.q[4] -= width


def _exit(vcpu: Vcpu, svm: SvmState, code: int, info1: int = 0) -> int:
    """An exit that no instruction of L2 caused; the silicon's action."""
    verdict = leave(vcpu, svm, code, info1)
    vcpu.machine.note(vcpu, verdict)
    return verdict.deliver


def deliver(vcpu: Vcpu, svm: SvmState) -> int:
    """What waits while L2 runs: an exit to L1 or an injection; the silicon's action."""
    if svm.owes_error_code:
        try:
            _push_error_code(svm, vcpu)
        except GuestFault as raised:
            return vcpu.machine.raise_trap(vcpu, raised.fault)
        except GuestExit:  # the switch to L1 has happened
            return RESUME
    window = False
    if vcpu.gif:
        if vcpu.smi_pending:
            vcpu.smi_pending = False
            if svm.wanted >> Intercept.SMI & 1:
                return _exit(vcpu, svm, ExitCode.SMI, SmiInfo.smisrc)
        if vcpu.nmi_pending and not vcpu.nmi_blocked:
            if svm.wanted >> Intercept.NMI & 1:
                return _exit(vcpu, svm, ExitCode.NMI)
            if not vcpu.state.interrupt_shadow:
                return events.inject_nmi(vcpu)
            vcpu.machine.step_block()
        if vcpu.lapic.pending() is not None:
            if _host_takes_interrupts(vcpu, svm):
                if svm.wanted >> Intercept.INTR & 1:
                    return _exit(vcpu, svm, ExitCode.INTR)
                if not vcpu.state.interrupt_shadow:
                    return _interrupt(vcpu, vcpu.lapic.acknowledge())
                vcpu.machine.step_block()
            elif not svm.masks_interrupts:
                window = True  # the host's own flag cannot change while L2 runs
    if svm.virtual & _V_IRQ and svm.gif(vcpu) and _has_priority(svm):
        if vcpu.interrupts_enabled:
            return _virtual_interrupt(vcpu, svm)
        window = True
    vcpu.processor.request_window(window)
    return RESUME


def _host_takes_interrupts(vcpu: Vcpu, svm: SvmState) -> bool:
    """Whether the flag that holds for physical interrupts is set; shadows do not stop an exit."""
    if svm.masks_interrupts:
        return svm.host_interrupts
    return bool(vcpu.state.q[17] & Rflags.if_)


def _has_priority(svm: SvmState) -> bool:
    """Whether the virtual interrupt's priority exceeds V_TPR, or does not matter."""
    virtual = svm.virtual
    return bool(virtual & _V_IGN_TPR) or (virtual >> 16 & 0xF) > (virtual & 0xF)


def _virtual_interrupt(vcpu: Vcpu, svm: SvmState) -> int:
    """V_IRQ can be taken: the VINTR exit comes before, and leaves it pending."""
    if svm.wanted >> Intercept.VINTR & 1:
        return _exit(vcpu, svm, ExitCode.VINTR)
    svm.virtual &= ~_V_IRQ
    return _interrupt(vcpu, svm.vector)


def _interrupt(vcpu: Vcpu, vector: int) -> int:
    """Deliver an interrupt to L2, and look again at what else waits."""
    vcpu.activity = Activity.ACTIVE
    vcpu.attention = True
    vcpu.processor.request_window(False)
    return vcpu.processor.inject_interrupt(vector)
