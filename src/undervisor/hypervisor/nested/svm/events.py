"""Pending events while L2 runs: INIT, NMI, interrupts, virtual interrupts, in this order.

APM 2 "Interrupt and Local APIC Support", "Global Interrupt Flag", "INIT Support".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from undervisor.arch.svm.exits import ExitCode, SmiInfo
from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.svm.vmcb import VirtualInterrupt
from undervisor.arch.x86.events import Fault, Vector
from undervisor.arch.x86.msr import Msr, VmCr
from undervisor.arch.x86.registers import Rflags
from undervisor.hypervisor import events
from undervisor.hypervisor.nested import INIT_BLOCKED
from undervisor.hypervisor.nested.svm import reflect
from undervisor.hypervisor.nested.svm.exit import leave
from undervisor.hypervisor.vcpu import Activity
from undervisor.silicon.processor import RESUME

if TYPE_CHECKING:
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
        return leave(vcpu, svm, ExitCode.INIT).deliver
    if not vcpu.msrs[Msr.VM_CR] & VmCr.r_init:
        return None
    vcpu.init_pending = False
    vcpu.activity = Activity.ACTIVE
    reflected = reflect.fault(vcpu, svm, 0, _SX) if vcpu.in_l2 else None
    return vcpu.inject(_SX) if reflected is None else reflected.deliver


def deliver(vcpu: Vcpu, svm: SvmState) -> int:
    """What waits while L2 runs: an exit to L1 or an injection; the silicon's action."""
    window = False
    if vcpu.gif:
        if vcpu.smi_pending:
            vcpu.smi_pending = False
            if svm.wanted >> Intercept.SMI & 1:
                return leave(vcpu, svm, ExitCode.SMI, SmiInfo.smisrc).deliver
        if vcpu.nmi_pending and not vcpu.nmi_blocked:
            if svm.wanted >> Intercept.NMI & 1:
                return leave(vcpu, svm, ExitCode.NMI).deliver
            if not vcpu.state.interrupt_shadow:
                return events.inject_nmi(vcpu)
            vcpu.machine.step_blocks = 1
        if vcpu.lapic.pending() is not None:
            if _host_takes_interrupts(vcpu, svm):
                if svm.wanted >> Intercept.INTR & 1:
                    return leave(vcpu, svm, ExitCode.INTR).deliver
                if not vcpu.state.interrupt_shadow:
                    return _interrupt(vcpu, vcpu.lapic.acknowledge())
            window = True
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
        return leave(vcpu, svm, ExitCode.VINTR).deliver
    svm.virtual &= ~_V_IRQ
    return _interrupt(vcpu, svm.vector)


def _interrupt(vcpu: Vcpu, vector: int) -> int:
    """Deliver an interrupt to L2, and look again at what else waits."""
    vcpu.activity = Activity.ACTIVE
    vcpu.attention = True
    vcpu.processor.request_window(False)
    return vcpu.processor.inject_interrupt(vector)
