"""Events that wait for the processor: INIT, SIPI, NMI and interrupts, in order of priority.

SDM 3A "Priority Among Concurrent Events"; APM 2 "Priorities".  While L2 runs, the vendor's
`Nested.deliver` decides who gets them.
"""

from __future__ import annotations

from undervisor.hypervisor.nested import INIT_BLOCKED
from undervisor.hypervisor.vcpu import IRET_MASK, Activity, Vcpu
from undervisor.silicon.processor import RESUME


def deliver(vcpu: Vcpu) -> int:
    """Deliver what waits, or arrange for an exit when it can be delivered; an action."""
    vcpu.attention = False
    if vcpu.init_pending:
        action = vcpu.nested.take_init(vcpu)
        if action is None:
            vcpu.init_pending = False
            vcpu.reset_by_init()
        elif action != INIT_BLOCKED:
            return action
    if vcpu.in_l2:
        return vcpu.nested.deliver(vcpu)
    if vcpu.activity is Activity.WAIT_FOR_SIPI:
        _take_sipi(vcpu)
        return RESUME
    vcpu.sipi_vector = None  # lost: the processor is not waiting for it
    if not vcpu.gif:
        vcpu.processor.request_window(False)
        return RESUME
    vcpu.smi_pending = False  # there is no system-management mode to enter
    if vcpu.nmi_pending and not vcpu.nmi_blocked and not vcpu.state.interrupt_shadow:
        return inject_nmi(vcpu)
    return deliver_interrupt(vcpu)


def _take_sipi(vcpu: Vcpu) -> None:
    if vcpu.sipi_vector is not None:
        vector, vcpu.sipi_vector = vcpu.sipi_vector, None
        vcpu.start_by_sipi(vector)


def inject_nmi(vcpu: Vcpu) -> int:
    """Deliver an NMI to the running world and block others until IRET."""
    vcpu.nmi_pending -= 1
    vcpu.activity = Activity.ACTIVE
    block_nmi(vcpu)
    return vcpu.processor.inject_nmi()


def block_nmi(vcpu: Vcpu) -> None:
    """Block NMIs and watch for the IRET that unblocks them."""
    vcpu.nmi_blocked = True
    vcpu.state.intercepts |= IRET_MASK


def unblock_nmi(vcpu: Vcpu) -> None:
    """NMIs are no longer blocked."""
    vcpu.nmi_blocked = False
    vcpu.state.intercepts &= ~IRET_MASK


def deliver_interrupt(vcpu: Vcpu) -> int:
    """Deliver the local APIC's interrupt to the running world now, or when its window opens."""
    vector = vcpu.lapic.pending()
    if vector is None:
        vcpu.processor.request_window(False)
        return RESUME
    if not vcpu.interrupts_enabled:
        vcpu.processor.request_window(True)
        return RESUME
    vcpu.activity = Activity.ACTIVE
    vector = vcpu.lapic.acknowledge()
    vcpu.processor.request_window(vcpu.lapic.pending() is not None)
    return vcpu.processor.inject_interrupt(vector)


def can_wake(vcpu: Vcpu) -> bool:
    """Whether a halted or waiting processor has something to do."""
    if vcpu.init_pending and vcpu.attention:
        return True
    if vcpu.activity is Activity.WAIT_FOR_SIPI:
        return vcpu.sipi_vector is not None
    if vcpu.in_l2:
        return vcpu.attention
    if vcpu.activity is Activity.SHUTDOWN:
        return bool(vcpu.nmi_pending)
    nmi = vcpu.nmi_pending and not vcpu.nmi_blocked
    return bool(nmi) or (vcpu.interrupts_enabled and vcpu.lapic.pending() is not None)
