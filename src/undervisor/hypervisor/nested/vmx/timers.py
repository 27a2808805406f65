"""What counts while L2 runs: the VMX-preemption timer and loops of PAUSE."""

from __future__ import annotations

from typing import TYPE_CHECKING

from undervisor.arch.vmx.controls import ExitControls, PinBasedControls, SecondaryControls
from undervisor.arch.vmx.fields import VmcsField as F

if TYPE_CHECKING:
    from undervisor.hypervisor.nested.vmx import NestedVmx
    from undervisor.hypervisor.vcpu import Vcpu


def start(vcpu: Vcpu, nested: NestedVmx, value: int) -> None:
    """SDM 3C "VMX-Preemption Timer": it counts down when bit X of the TSC changes."""
    if not nested.pin & PinBasedControls.preemption_timer:
        nested.timer_deadline = None
        return
    shift = nested.capabilities.misc.preemption_timer_shift
    now = vcpu.machine.now()
    nested.timer_deadline = (now >> shift) + value << shift


def remaining(vcpu: Vcpu, nested: NestedVmx) -> int:
    """What the timer's field would hold now."""
    if nested.timer_deadline is None:
        return 0
    shift = nested.capabilities.misc.preemption_timer_shift
    return max(0, (nested.timer_deadline >> shift) - (vcpu.machine.now() >> shift))


def save(vcpu: Vcpu, nested: NestedVmx, fields: dict[int, int]) -> None:
    """The timer stops at a VM exit."""
    if nested.timer_deadline is None:
        return
    if nested.exit_controls & ExitControls.save_preemption_timer:
        fields[F.PREEMPTION_TIMER_VALUE] = remaining(vcpu, nested)
    nested.timer_deadline = None


def is_pause_loop(vcpu: Vcpu, nested: NestedVmx) -> bool:
    """Whether this PAUSE at CPL 0 is one too many. SDM 3C, on PLE_Gap and PLE_Window.

    Between two PAUSEs only L2's own time counts, not what the exit takes here.
    """
    if not nested.secondary & SecondaryControls.pause_loop_exiting or vcpu.state.cpl:
        return False
    after, fields = vcpu.tsc01(), nested.fields
    now = after - vcpu.machine.exit_cost
    if now - nested.pause_last > fields[F.PLE_GAP]:
        nested.pause_first = now
    nested.pause_last = after
    return now - nested.pause_first > fields[F.PLE_WINDOW]
