"""Events that arrive while L2 runs: who gets them, in order of priority.

SDM 3A "Priority Among Concurrent Events"; SDM 3C "Other Causes of VM Exits".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from undervisor.arch.vmx.controls import (
    ActivityState,
    ExitControls,
    InterruptibilityState,
    InterruptionType,
    PendingDebugExceptions,
    PinBasedControls,
    PrimaryControls,
)
from undervisor.arch.vmx.exits import ExitReason as R
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.events import DB, Vector
from undervisor.arch.x86.paging import Translation, walk
from undervisor.arch.x86.registers import Dr6
from undervisor.hypervisor import events
from undervisor.hypervisor.exit import Exit
from undervisor.hypervisor.nested import INIT_BLOCKED
from undervisor.hypervisor.nested.vmx import apic, virtual_interrupts
from undervisor.hypervisor.nested.vmx.exit import leave
from undervisor.hypervisor.vcpu import IRET_MASK, Activity
from undervisor.hypervisor.verdict import RESUME as GO_ON
from undervisor.hypervisor.verdict import Switched, Verdict
from undervisor.silicon.processor import RESUME

if TYPE_CHECKING:
    from undervisor.hypervisor.nested.vmx import NestedVmx
    from undervisor.hypervisor.vcpu import Vcpu

_NMI_INFORMATION: Final = 2 | 2 << 8 | 1 << 31
_EXTERNAL_INFORMATION: Final = 1 << 31
_MASK64: Final = (1 << 64) - 1
_IF: Final = 0x200
_TF: Final = 0x100
_STI: Final = 0xFB
_BLOCKING_BY_NMI: Final = int(InterruptibilityState.blocking_by_nmi)
_VIRTUAL_NMIS: Final = int(PinBasedControls.virtual_nmis)
_DB_MASK: Final = 1 << Vector.DB
_BREAKPOINTS: Final = int(Dr6.b0 | Dr6.b1 | Dr6.b2 | Dr6.b3)
_VECTORED_LOSE: Final = frozenset(
    {
        InterruptionType.EXTERNAL_INTERRUPT,
        InterruptionType.NMI,
        InterruptionType.HARDWARE_EXCEPTION,
        InterruptionType.PRIVILEGED_SOFTWARE_EXCEPTION,
    }
)


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
    vcpu.init_pending = False
    if vcpu.activity is Activity.WAIT_FOR_SIPI:
        return INIT_BLOCKED  # in that activity state it is blocked, and not kept
    return _action(vcpu, leave(vcpu, nested, R.INIT_SIGNAL))


def deliver(vcpu: Vcpu, nested: NestedVmx) -> int:
    """What happens before L2's next instruction; the silicon's action."""
    if vcpu.activity is Activity.WAIT_FOR_SIPI:
        return _startup(vcpu, nested)
    vcpu.sipi_vector = None  # discarded in any other state
    stepped, vcpu.stepped = vcpu.stepped, False
    nested.iret_unblocked = nested.iret_unblocked and not stepped
    traps = nested.primary & PrimaryControls.monitor_trap_flag
    if nested.exit_behind is not None:
        (reason, qualification), nested.exit_behind = nested.exit_behind, None
        return _action(vcpu, leave(vcpu, nested, reason, qualification))
    if nested.trap_pending or (stepped and traps):
        return _action(vcpu, leave(vcpu, nested, R.MONITOR_TRAP_FLAG))
    if nested.pending_debug:
        return _deliver_pending_debug(vcpu, nested)
    deadline = nested.timer_deadline
    if deadline is not None and deadline <= vcpu.machine.now():
        return _action(vcpu, leave(vcpu, nested, R.PREEMPTION_TIMER_EXPIRED))
    verdict = _nmi(vcpu, nested) or _interrupt(vcpu, nested)
    if verdict is not None:
        return _action(vcpu, verdict)
    action = _into_l2(vcpu, nested)
    if action != RESUME:
        delivered(vcpu, nested)
    elif traps and vcpu.activity is Activity.ACTIVE:
        _arm_trap(vcpu, nested)
    return action


def delivered(vcpu: Vcpu, nested: NestedVmx) -> None:
    """An event goes to L2 before its next instruction: the monitor trap flag is due behind it."""
    vcpu.attention = True
    if nested.primary & PrimaryControls.monitor_trap_flag:
        vcpu.end_step()


def _startup(vcpu: Vcpu, nested: NestedVmx) -> int:
    """In the wait-for-SIPI state only a SIPI does anything."""
    vector, vcpu.sipi_vector = vcpu.sipi_vector, None
    if vector is None:
        return RESUME
    return _action(vcpu, leave(vcpu, nested, R.STARTUP_IPI, vector))


# -- debug exceptions and the monitor trap flag -------------------------------------------------


def load_pending_debug(vcpu: Vcpu, nested: NestedVmx, fields: dict[int, int]) -> None:
    """The debug exceptions that an entry leaves pending."""
    nested.pending_debug = _pending_at_entry(fields)
    vcpu.attention |= bool(nested.pending_debug)


def _pending_at_entry(fields: dict[int, int]) -> int:
    """SDM 3C "Delivery of Pending Debug Exceptions after VM Entry"."""
    information = fields[F.ENTRY_INTERRUPTION_INFORMATION]
    state = fields[F.GUEST_ACTIVITY_STATE]
    shadow = fields[F.GUEST_INTERRUPTIBILITY_STATE] & InterruptibilityState.blocking_by_mov_ss
    if information >> 31:
        kind = information >> 8 & 7
        if kind in _VECTORED_LOSE or (kind != InterruptionType.OTHER_EVENT and not shadow):
            return 0
    elif state in (ActivityState.SHUTDOWN, ActivityState.WAIT_FOR_SIPI):
        return 0
    pending = fields[F.GUEST_PENDING_DEBUG_EXCEPTIONS]
    valid = PendingDebugExceptions.bs | PendingDebugExceptions.enabled_breakpoint
    return pending if pending & valid else 0


def take_pending(nested: NestedVmx) -> int:
    """The conditions of the pending debug exceptions, in DR6's form; they are pending no more."""
    pending, nested.pending_debug = nested.pending_debug, 0
    return pending & (_BREAKPOINTS | Dr6.bs)


def deliver_debug(vcpu: Vcpu, nested: NestedVmx) -> None:
    """A #DB goes to L2: with it goes what was pending while MOV SS blocked it."""
    if nested.pending_debug:
        vcpu.state.dr6 |= take_pending(nested)


def _deliver_pending_debug(vcpu: Vcpu, nested: NestedVmx) -> int:
    """#DB for what is pending, or wait while MOV SS blocks it."""
    state = vcpu.state
    if state.interrupt_shadow and shadow_is_mov_ss(vcpu, nested):
        vcpu.begin_step()
        state.intercept_exceptions |= _DB_MASK
        return RESUME
    vcpu.activity = Activity.ACTIVE
    vcpu.raise_debug(take_pending(nested))
    reflected = vcpu.nested.reflect_fault(vcpu, vcpu.exit, DB)
    if reflected is not None:
        return _action(vcpu, reflected)
    delivered(vcpu, nested)
    return vcpu.inject(DB)


def _arm_trap(vcpu: Vcpu, nested: NestedVmx) -> None:
    """The monitor trap flag: one instruction, then an exit; its #DB for RFLAGS.TF stays pending."""
    vcpu.begin_step()
    if vcpu.state.q[17] & _TF:
        vcpu.dr6_before = vcpu.state.dr6
        vcpu.state.intercept_exceptions |= _DB_MASK


def hold_debug_trap(vcpu: Vcpu, nested: NestedVmx) -> Verdict | None:
    """A #DB behind an instruction: the monitor trap flag has priority, and keeps it pending."""
    traps = nested.primary & PrimaryControls.monitor_trap_flag
    steps = vcpu.step is not None and traps
    if not (steps or nested.exit_behind is not None) or vcpu.debug_raised & Dr6.bd:
        return None
    conditions = vcpu.take_back_debug()
    if conditions & _BREAKPOINTS:
        conditions |= PendingDebugExceptions.enabled_breakpoint
    nested.pending_debug |= conditions
    if steps:
        vcpu.end_step()
    return GO_ON


# -- NMIs ---------------------------------------------------------------------------------------


def load_blocking(vcpu: Vcpu, nested: NestedVmx, fields: dict[int, int]) -> None:
    """Blocking by NMI at entry: of virtual NMIs where they are on, else of the processor's own."""
    nested.exit_behind, nested.virtual_pending = None, False
    vcpu.dr6_before = vcpu.state.dr6
    nested.pause_last = 0  # the first PAUSE behind an entry begins a loop
    blocking = fields[F.GUEST_INTERRUPTIBILITY_STATE]
    if blocking:
        nested.shadow_rip = fields[F.GUEST_RIP]
    blocked, virtual = bool(blocking & _BLOCKING_BY_NMI), bool(nested.pin & _VIRTUAL_NMIS)
    nested.virtual_nmi_blocked = blocked and virtual
    vcpu.nmi_blocked = blocked and not virtual


def shadow_is_mov_ss(vcpu: Vcpu, nested: NestedVmx) -> bool:
    """The silicon has one flag for both shadows: the entry's word holds where L2 has not moved,
    else the byte before the instruction tells, read without side effects.
    """
    if vcpu.state.q[16] == nested.shadow_rip:
        return nested.blocking_by_mov_ss
    address = vcpu.linear_rip() - 1 & _MASK64
    found = walk(
        vcpu.paging_rules(), vcpu.state.cr3, address, 0, lambda at: nested.peek_gpa(vcpu, at)
    )
    if not isinstance(found, Translation):
        return False
    quadword = nested.peek_gpa(vcpu, found.gpa & -8)
    return quadword >> 8 * (found.gpa & 7) & 0xFF != _STI


def block_nmi(vcpu: Vcpu, nested: NestedVmx) -> None:
    """An NMI was injected into L2: blocking lasts until L2's IRET."""
    if nested.pin & _VIRTUAL_NMIS:
        nested.virtual_nmi_blocked = True
    else:
        vcpu.nmi_blocked = True
    watch_iret(vcpu, nested)


def watch_iret(vcpu: Vcpu, nested: NestedVmx) -> None:
    """After vmcb02 was loaded: IRET is watched where it unblocks something.

    SDM 3C "Changes to Instruction Behavior in VMX Non-Root Operation".
    """
    unblocks = vcpu.nmi_blocked and not nested.pin & PinBasedControls.nmi_exiting
    if unblocks or nested.virtual_nmi_blocked:
        vcpu.state.intercepts |= IRET_MASK
    else:
        vcpu.state.intercepts &= ~IRET_MASK


def iret(vcpu: Vcpu, exit: Exit) -> Verdict:
    """IRET of L2: it unblocks NMIs, or virtual NMIs, even if it faults then."""
    nested = _nested(vcpu)
    if nested.pin & _VIRTUAL_NMIS:
        nested.iret_unblocked = nested.virtual_nmi_blocked
        nested.virtual_nmi_blocked = False
    elif not nested.pin & PinBasedControls.nmi_exiting:
        nested.iret_unblocked = vcpu.nmi_blocked
        vcpu.nmi_blocked = False
    vcpu.state.intercepts &= ~IRET_MASK
    if vcpu.step is None:
        vcpu.begin_step()
    return GO_ON


def _nested(vcpu: Vcpu) -> NestedVmx:
    nested: NestedVmx = vcpu.nested  # type: ignore[assignment]
    return nested


def _nmi(vcpu: Vcpu, nested: NestedVmx) -> Verdict | None:
    """An NMI that exits, and the NMI window."""
    window = nested.primary & PrimaryControls.nmi_window_exiting
    exiting = nested.pin & PinBasedControls.nmi_exiting
    waits = bool(vcpu.nmi_pending and exiting and not vcpu.nmi_blocked)
    opens = bool(window and not nested.virtual_nmi_blocked)
    if not waits and not opens:
        return None
    if vcpu.state.interrupt_shadow:
        vcpu.begin_step()
        return None
    if not waits:
        return leave(vcpu, nested, R.NMI_WINDOW)
    vcpu.nmi_pending -= 1
    verdict = leave(vcpu, nested, R.EXCEPTION_OR_NMI, interruption=_NMI_INFORMATION)
    events.block_nmi(vcpu)
    return verdict


# -- interrupts ---------------------------------------------------------------------------------


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
        vcpu.begin_step()
        return None
    return apic.external_interrupt(vcpu, nested)


def external_interrupt(vcpu: Vcpu, nested: NestedVmx) -> Verdict:
    """Exit for the local APIC's interrupt, acknowledged where L1 asks for it."""
    if nested.exit_controls & ExitControls.acknowledge_interrupt:
        return interrupt_exit(vcpu, nested, vcpu.lapic.acknowledge())
    return leave(vcpu, nested, R.EXTERNAL_INTERRUPT)


def interrupt_exit(vcpu: Vcpu, nested: NestedVmx, vector: int) -> Verdict:
    """Exit for an interrupt that has been acknowledged."""
    information = vector | _EXTERNAL_INFORMATION
    return leave(vcpu, nested, R.EXTERNAL_INTERRUPT, interruption=information)


def _into_l2(vcpu: Vcpu, nested: NestedVmx) -> int:
    """Events that L1 does not want go to L2 itself; windows that are still closed are watched."""
    exiting = nested.pin & PinBasedControls.nmi_exiting
    if vcpu.nmi_pending and not exiting and not vcpu.nmi_blocked:
        if not vcpu.state.interrupt_shadow:
            return events.inject_nmi(vcpu)
        vcpu.begin_step()
    if vcpu.activity is Activity.SHUTDOWN:
        return RESUME
    action = virtual_interrupts.deliver(vcpu, nested)
    if action != RESUME:
        return action
    external = nested.pin & PinBasedControls.external_interrupt_exiting
    if not external:
        action = events.deliver_interrupt(vcpu)
        if action != RESUME:
            return action
    waiting = not external and vcpu.lapic.pending() is not None
    wanted = nested.primary & PrimaryControls.interrupt_window_exiting
    vcpu.processor.request_window(bool(wanted) or waiting or nested.virtual_pending)
    return RESUME
