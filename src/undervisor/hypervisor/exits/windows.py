"""Exits that L0 asked for to look again: an interrupt window, an IRET, the end of a slice."""

from __future__ import annotations

from undervisor.hypervisor import events
from undervisor.hypervisor.exit import Exit
from undervisor.hypervisor.vcpu import Vcpu
from undervisor.hypervisor.verdict import RESUME, Verdict


def interrupt_window(vcpu: Vcpu, exit: Exit) -> Verdict:
    """The guest can take an interrupt now."""
    vcpu.processor.request_window(False)
    vcpu.attention = True
    return RESUME


def iret(vcpu: Vcpu, exit: Exit) -> Verdict:
    """IRET is about to end an NMI's handler: run it alone, then look for the next NMI."""
    events.unblock_nmi(vcpu)
    vcpu.machine.step_block()
    return RESUME


def end_of_slice(vcpu: Vcpu, exit: Exit) -> Verdict:
    """A slice or a timer's time is over, or somebody kicked the processor."""
    vcpu.machine.look_outside()
    vcpu.attention = True
    return RESUME
