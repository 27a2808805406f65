"""Waiting: HLT, PAUSE, MONITOR and MWAIT."""

from __future__ import annotations

from undervisor.arch.x86.events import GP0, UD
from undervisor.arch.x86.registers import Rflags
from undervisor.hypervisor import decode
from undervisor.hypervisor.exit import Exit
from undervisor.hypervisor.vcpu import Vcpu
from undervisor.hypervisor.verdict import ADVANCE, Halt, Inject, Verdict, Yield

_INTERRUPTS_BREAK = 1


def hlt(vcpu: Vcpu, exit: Exit) -> Verdict:
    """HLT; the silicon has checked the privilege level."""
    return Halt(decode.length(vcpu))


def pause(vcpu: Vcpu, exit: Exit) -> Verdict:
    """PAUSE: a processor that spins lets the others run."""
    return Yield(decode.length(vcpu))


def monitor(vcpu: Vcpu, exit: Exit) -> Verdict:
    """MONITOR: the range is not watched; MWAIT then ends by itself."""
    if not vcpu.has("monitor"):
        return Inject(UD)
    if vcpu.state.q[1] & 0xFFFF_FFFF:
        return Inject(GP0)
    return ADVANCE[decode.length(vcpu)]


def mwait(vcpu: Vcpu, exit: Exit) -> Verdict:
    """MWAIT: as a store to the range may be missed, it may not wait for ever; it yields.

    An L1 that has one processor is stopped by its interrupts alone.
    """
    if not vcpu.has("monitor"):
        return Inject(UD)
    if vcpu.state.q[1] & 0xFFFF_FFFF & ~_INTERRUPTS_BREAK:
        return Inject(GP0)
    alone = len(vcpu.machine.vcpus) == 1 and not vcpu.in_l2
    if alone and vcpu.state.rflags & Rflags.if_:
        return Halt(decode.length(vcpu))
    return Yield(decode.length(vcpu))
