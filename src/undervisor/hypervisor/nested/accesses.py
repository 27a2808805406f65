"""Which linear addresses an instruction touches, as far as its form tells.

The silicon names the guest-physical address of a nested page fault and not the linear one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from iced_x86 import Code, Decoder, OpKind

from undervisor.hypervisor import decode
from undervisor.silicon.layout import Env

if TYPE_CHECKING:
    from undervisor.hypervisor.vcpu import Vcpu

_MASK64: Final = (1 << 64) - 1
_MEMORY: Final = frozenset(
    {
        OpKind.MEMORY,
        OpKind.MEMORY_SEG_SI,
        OpKind.MEMORY_SEG_ESI,
        OpKind.MEMORY_SEG_RSI,
        OpKind.MEMORY_ESDI,
        OpKind.MEMORY_ESEDI,
        OpKind.MEMORY_ESRDI,
    }
)
# What delivering an event pushes at most, in 64-bit mode: SS, RSP, RFLAGS, CS, RIP, error code.
_FRAME: Final = 6 * 8


def linear_addresses(vcpu: Vcpu, code: bytes) -> Iterator[int]:
    """First and last byte of each memory operand of the instruction `code`, then its stack.

    Where an event was being delivered, also its gate and the frame that it pushes.
    """
    decoded = Decoder(decode.bitness(vcpu), code, ip=vcpu.state.rip).decode()
    if decoded.code != Code.INVALID:
        size = max(1, decode.memory_size(decoded))
        for operand in range(decoded.op_count):
            if decoded.op_kind(operand) in _MEMORY:
                start = decode.linear_address(vcpu, decoded, operand)
                yield start
                yield start + size - 1 & _MASK64
    base = 0 if vcpu.state.hflags & 0x8000 else vcpu.state.segment_base(Env.SS)
    top = base + vcpu.state.q[4]
    yield top & _MASK64
    yield top - 8 & _MASK64
    event = vcpu.exit.event
    if event:
        yield vcpu.state.segment_base(Env.IDTR) + 16 * (event & 0xFF) & _MASK64
        yield vcpu.state.segment_base(Env.TR)
        yield (top & -16) - _FRAME & _MASK64
