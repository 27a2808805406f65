"""MOV to and from the debug registers, with reserved bits and CR4.DE."""

from __future__ import annotations

from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.x86.events import DB, UD, Fault
from undervisor.arch.x86.registers import Cr4, Dr6, Dr7, legalize_dr6, legalize_dr7
from undervisor.hypervisor import decode
from undervisor.hypervisor.exit import Exit
from undervisor.hypervisor.vcpu import Vcpu
from undervisor.hypervisor.verdict import ADVANCE, Inject, Verdict
from undervisor.silicon.layout import Env


def access(vcpu: Vcpu, exit: Exit) -> Verdict:
    """MOV DRn. SDM 2B "MOV--Move to/from Debug Registers"; DR4 and DR5 are DR6 and DR7."""
    state = vcpu.state
    number = exit.code & 0xF
    if number > 7 or (number in (4, 5) and state.cr4 & Cr4.de):
        return Inject(UD)
    number += 2 if number in (4, 5) else 0
    if state.dr7 & Dr7.gd:
        state.dr7 &= ~Dr7.gd
        vcpu.raise_debug(Dr6.bd)
        return Inject(DB)
    decoded = decode.instruction(vcpu)
    index = (Env.DR0 >> 3) + number
    if exit.code < ExitCode.DR0_WRITE:
        decode.write_register(vcpu, decoded.op0_register, state.q[index])
        return ADVANCE[decoded.len]
    value = decode.read_register(vcpu, decoded.op1_register)
    if number in _LEGALIZE:
        legal = _LEGALIZE[number](value)
        if isinstance(legal, Fault):
            return Inject(legal)
        value = legal
    state.q[index] = value
    if number == 6:
        vcpu.dr6_before = value
    return ADVANCE[decoded.len]


_LEGALIZE = {6: legalize_dr6, 7: legalize_dr7}
