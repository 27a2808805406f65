"""RDTSC, RDTSCP and RDPMC: the TSC derives from the deterministic clock."""

from __future__ import annotations

from undervisor.arch.x86.events import GP0
from undervisor.arch.x86.msr import Msr
from undervisor.hypervisor import decode
from undervisor.hypervisor.exit import Exit
from undervisor.hypervisor.vcpu import Vcpu
from undervisor.hypervisor.verdict import ADVANCE, Inject, Verdict

_RDTSCP = b"\x0f\x01\xf9"


def rdtsc(vcpu: Vcpu, exit: Exit) -> Verdict:
    """RDTSC, and RDTSCP, which the silicon reports alike; CR4.TSD has been checked."""
    value = vcpu.tsc()
    q = vcpu.state.q
    data = decode.fetch(vcpu)
    length = 2
    if data.startswith(_RDTSCP):
        q[1], length = vcpu.msrs[Msr.TSC_AUX] & 0xFFFF_FFFF, 3
    elif not data.startswith(b"\x0f\x31"):
        decoded = decode.instruction(vcpu)
        length = decoded.len
        if decoded.code == decode.Code.RDTSCP:
            q[1] = vcpu.msrs[Msr.TSC_AUX] & 0xFFFF_FFFF
    q[0], q[2] = value & 0xFFFF_FFFF, value >> 32
    return ADVANCE[length]


def rdpmc(vcpu: Vcpu, exit: Exit) -> Verdict:
    """RDPMC: no model has performance counters, so every index is out of range."""
    return Inject(GP0)
