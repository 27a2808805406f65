"""What an exit tells L1 of the instruction: next RIP, operands, ports, vectors.

APM 2 "State Saved on Exit", "Decode Assists", "IOIO Intercept".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from iced_x86 import Code, Register

from undervisor.arch.svm.exits import IoInfo
from undervisor.arch.x86.events import Vector
from undervisor.hypervisor import decode
from undervisor.silicon.layout import Env, Hflags

if TYPE_CHECKING:
    from undervisor.hypervisor.vcpu import Vcpu

_MASK64: Final = (1 << 64) - 1
_RIP, _HFLAGS, _CS64 = Env.RIP >> 3, Env.HFLAGS >> 2, 1 << Hflags.CS64


def next_rip(vcpu: Vcpu) -> int:
    """nRIP: the address behind the instruction."""
    state = vcpu.state
    rip: int = state.q[_RIP] + decode.length(vcpu)
    return rip & (_MASK64 if state.d[_HFLAGS] & _CS64 else 0xFFFF_FFFF)


def software_vector(vcpu: Vcpu) -> tuple[int, int]:
    """The vector of the INT n, INT3 or INTO at the instruction pointer, and its length."""
    decoded = decode.instruction(vcpu)
    if decoded.code == Code.INT3:
        return Vector.BP, decoded.len
    if decoded.code == Code.INTO:
        return Vector.OF, decoded.len
    return int(decoded.immediate(0)) & 0xFF, decoded.len


_SEGMENTS: Final = {
    register: number
    for number, register in enumerate(
        (Register.ES, Register.CS, Register.SS, Register.DS, Register.FS, Register.GS)
    )
}


def io_details(vcpu: Vcpu, decoded: decode.Instruction) -> int:
    """The bits of EXITINFO1 beside port, size and direction."""
    if not decoded.is_string_instruction:
        bits = decode.bitness(vcpu)
        return int(_ADDRESS_BITS[(1 << bits) - 1])
    info = int(IoInfo.string) | int(_ADDRESS_BITS[decode.string_address_mask(vcpu, decoded)])
    if decoded.has_rep_prefix or decoded.has_repne_prefix:
        info |= IoInfo.rep
    reads_memory = decoded.op_kind(1) != decode.OpKind.REGISTER
    segment = decoded.memory_segment if reads_memory else Register.ES
    return info | _SEGMENTS[segment] << 10


_ADDRESS_BITS: Final = {
    (1 << 16) - 1: IoInfo.address16,
    (1 << 32) - 1: IoInfo.address32,
    (1 << 64) - 1: IoInfo.address64,
}


_GPR_NUMBERS: Final = {
    register: number
    for number, names in enumerate(
        (
            ("RAX", "EAX"),
            ("RCX", "ECX"),
            ("RDX", "EDX"),
            ("RBX", "EBX"),
            ("RSP", "ESP"),
            ("RBP", "EBP"),
            ("RSI", "ESI"),
            ("RDI", "EDI"),
            *((f"R{n}", f"R{n}D") for n in range(8, 16)),
        )
    )
    for register in (getattr(Register, name) for name in names)
}


def register_number(register: int) -> int:
    """The encoding of a general register, by iced's number."""
    return _GPR_NUMBERS[register]
