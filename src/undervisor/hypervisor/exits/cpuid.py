"""CPUID: the model's answer."""

from __future__ import annotations

from undervisor.hypervisor import decode
from undervisor.hypervisor.exit import Exit
from undervisor.hypervisor.vcpu import Vcpu
from undervisor.hypervisor.verdict import ADVANCE, Verdict


def cpuid(vcpu: Vcpu, exit: Exit) -> Verdict:
    """CPUID. SDM 2A "CPUID--CPU Identification"."""
    q = vcpu.state.q
    eax, ebx, ecx, edx = vcpu.cpuid(q[0] & 0xFFFF_FFFF, q[1] & 0xFFFF_FFFF)
    length = decode.length(vcpu)
    q[0], q[1], q[2], q[3] = eax, ecx, edx, ebx
    return ADVANCE[length]
