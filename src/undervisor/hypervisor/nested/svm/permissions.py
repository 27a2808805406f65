"""L1's permission maps as they lie in its memory.

APM 2 "IOIO Intercept" (IOPM) and "MSR Intercepts" (MSRPM).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from undervisor.arch.svm.permissions import msr_bit

if TYPE_CHECKING:
    from undervisor.hypervisor.nested.svm.state import SvmState
    from undervisor.hypervisor.vcpu import Vcpu


def wants_port(vcpu: Vcpu, svm: SvmState, port: int, size: int) -> bool:
    """Whether an access of `size` bytes at `port` exits by the map."""
    pair = vcpu.memory.read(svm.iopm + (port >> 3), 2)
    return bool(int.from_bytes(pair, "little") >> (port & 7) & (1 << size) - 1)


def wants_msr(vcpu: Vcpu, svm: SvmState, number: int, *, write: bool) -> bool:
    """Whether RDMSR or WRMSR exits by the map; MSRs that it does not cover always do."""
    bit = msr_bit(number)
    if bit is None:
        return True
    byte = vcpu.memory.read(svm.msrpm + (bit >> 3), 1)[0]
    return bool(byte >> ((bit & 7) + write) & 1)
