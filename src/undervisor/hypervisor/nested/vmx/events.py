"""Events that arrive while L2 runs: who gets them, in order of priority.

SDM 3A "Priority Among Concurrent Events"; SDM 3C "Other Causes of VM Exits".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from undervisor.arch.vmx.controls import ExitControls, PinBasedControls, PrimaryControls
from undervisor.arch.vmx.exits import ExitReason as R
from undervisor.hypervisor import events
from undervisor.hypervisor.nested import INIT_BLOCKED
from undervisor.hypervisor.nested.vmx import apic
from undervisor.hypervisor.nested.vmx.exit import leave
from undervisor.hypervisor.vcpu import IRET_MASK, Activity
from undervisor.hypervisor.verdict import Switched, Verdict
from undervisor.silicon.processor import RESUME

if TYPE_CHECKING:
    from undervisor.hypervisor.nested.vmx import NestedVmx
    from undervisor.hypervisor.vcpu import Vcpu

_NMI_INFORMATION: Final = 2 | 2 << 8 | 1 << 31
_EXTERNAL_INFORMATION: Final = 1 << 31
_IF: Final = 0x200


def _action(vcpu: Vcpu, verdict: Verdict) -> int:
    """The silicon's action after an exit that no handler started."""
    vcpu.machine.note(vcpu, verdict)
    return verdict.deliver if isinstance(verdict, Switched) else vcpu.machine.stop_with(verdict)


def take_init(vcpu: Vcpu, nested: NestedVmx) -> int | None:
    """SDM 3C "VMX Operation": INIT is blocked in root operation, and exits otherwise."""
    if not nested.vmx.in_operation:
        return None
    if not vcpu.in_l2:
        return INIT_BLOCKED
    if vcpu.activity is Activity.WAIT_FOR_SIPI:
        vcpu.init_pending = False  # blocked in that activity state, and not kept
        return INIT_BLOCKED
    vcpu.init_pending = False
    return _action(vcpu, leave(vcpu, nested, R.INIT_SIGNAL))


def deliver(vcpu: Vcpu, nested: NestedVmx) -> int:
    """What happens before L2's next instruction; the silicon's action."""
    if vcpu.activity is Activity.WAIT_FOR_SIPI:
        return _startup(vcpu, nested)
    if nested.trap_pending:
        nested.trap_pending = False
        return _action(vcpu, leave(vcpu, nested, R.MONITOR_TRAP_FLAG))
    below = apic.below_threshold(vcpu, nested)
    if below is not None:
        return _action(vcpu, below)
    deadline = nested.timer_deadline
    if deadline is not None and deadline <= vcpu.machine.now():
        return _action(vcpu, leave(vcpu, nested, R.PREEMPTION_TIMER_EXPIRED))
    verdict = _nmi(vcpu, nested) or _interrupt(vcpu, nested)
    if verdict is not None:
        return _action(vcpu, verdict)
    return _into_l2(vcpu, nested)


def _startup(vcpu: Vcpu, nested: NestedVmx) -> int:
    """In the wait-for-SIPI state only a SIPI (or an NMI, which is blocked) can do anything."""
    vector, vcpu.sipi_vector = vcpu.sipi_vector, None
    if vector is None:
        return RESUME
    return _action(vcpu, leave(vcpu, nested, R.STARTUP_IPI, vector))


def _nmi(vcpu: Vcpu, nested: NestedVmx) -> Verdict | None:
    """An NMI that exits, and the NMI window."""
    shadow = vcpu.state.interrupt_shadow
    exiting = nested.pin & PinBasedControls.nmi_exiting
    if vcpu.nmi_pending and exiting and not shadow and not _physically_blocked(vcpu, nested):
        vcpu.nmi_pending -= 1
        verdict = leave(vcpu, nested, R.EXCEPTION_OR_NMI, interruption=_NMI_INFORMATION)
        events.block_nmi(vcpu)
        return verdict
    if nested.primary & PrimaryControls.nmi_window_exiting and not nested.virtual_nmi_blocked:
        if not shadow and vcpu.activity is not Activity.SHUTDOWN:
            return leave(vcpu, nested, R.NMI_WINDOW)
        if shadow:
            vcpu.machine.step_blocks = 1
    return None


def _physically_blocked(vcpu: Vcpu, nested: NestedVmx) -> bool:
    """With virtual NMIs, L2's IRETs and injections say nothing about physical NMIs."""
    return vcpu.nmi_blocked and not nested.pin & PinBasedControls.virtual_nmis


def _interrupt(vcpu: Vcpu, nested: NestedVmx) -> Verdict | None:
    """An external interrupt that exits, and the interrupt window."""
    if vcpu.activity is Activity.SHUTDOWN:
        return None
    shadow = vcpu.state.interrupt_shadow
    open_window = vcpu.state.q[17] & _IF and not shadow
    if nested.primary & PrimaryControls.interrupt_window_exiting and open_window:
        return leave(vcpu, nested, R.INTERRUPT_WINDOW)
    if not nested.pin & PinBasedControls.external_interrupt_exiting:
        return None
    if vcpu.lapic.pending() is None:
        return None
    if shadow:
        vcpu.machine.step_blocks = 1
        return None
    return apic.external_interrupt(vcpu, nested)


def external_interrupt(vcpu: Vcpu, nested: NestedVmx) -> Verdict:
    """Exit for the local APIC's interrupt, acknowledged where L1 asks for it."""
    information = 0
    if nested.exit_controls & ExitControls.acknowledge_interrupt:
        information = vcpu.lapic.acknowledge() | _EXTERNAL_INFORMATION
    return leave(vcpu, nested, R.EXTERNAL_INTERRUPT, interruption=information)


def _into_l2(vcpu: Vcpu, nested: NestedVmx) -> int:
    """Events that L1 does not want go to L2 itself; windows that are still closed are watched."""
    exiting = nested.pin & PinBasedControls.nmi_exiting
    if vcpu.nmi_pending and not exiting and not vcpu.nmi_blocked:
        if not vcpu.state.interrupt_shadow:
            return events.inject_nmi(vcpu)
        vcpu.machine.step_blocks = 1
    virtual = apic.deliver_virtual_interrupt(vcpu, nested)
    if virtual != RESUME:
        return virtual
    if not nested.pin & PinBasedControls.external_interrupt_exiting:
        action = events.deliver_interrupt(vcpu)
        if action != RESUME:
            return action
    wanted = nested.primary & PrimaryControls.interrupt_window_exiting
    waiting = not nested.pin & PinBasedControls.external_interrupt_exiting and (
        vcpu.lapic.pending() is not None
    )
    vcpu.processor.request_window(
        bool(wanted) or waiting or apic.virtual_interrupt_waits(vcpu, nested)
    )
    _arm_trap(vcpu, nested)
    return RESUME


def _arm_trap(vcpu: Vcpu, nested: NestedVmx) -> None:
    """The monitor trap flag: one instruction, then an exit."""
    if nested.primary & PrimaryControls.monitor_trap_flag:
        vcpu.machine.step_instruction(vcpu)
        nested.trap_pending = True


def block_nmi(vcpu: Vcpu, nested: NestedVmx) -> None:
    """An NMI was injected into L2: blocking lasts until L2's IRET."""
    if not nested.pin & PinBasedControls.virtual_nmis:
        vcpu.nmi_blocked = True
    vcpu.state.intercepts |= IRET_MASK
