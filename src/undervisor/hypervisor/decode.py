"""The instruction at an exit: its bytes, its length, its operands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import iced_x86
from iced_x86 import Code, Decoder, Instruction, OpKind, Register

from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.x86.events import GP0, SS0, Fault, GuestFault
from undervisor.arch.x86.paging import FETCH, is_canonical
from undervisor.arch.x86.registers import Rflags
from undervisor.silicon.layout import Env
from undervisor.silicon.memory import PAGE

if TYPE_CHECKING:
    from undervisor.hypervisor.vcpu import Vcpu

MAX_LENGTH: Final = 15
_MASK64: Final = (1 << 64) - 1

# The usual encoding of instructions that exit, so that most need no decoder.
_PLAIN: Final[dict[int, bytes]] = {
    ExitCode.CPUID: b"\x0f\xa2",
    ExitCode.HLT: b"\xf4",
    ExitCode.RDTSC: b"\x0f\x31",
    ExitCode.VMMCALL: b"\x0f\x01\xd9",
    ExitCode.VMRUN: b"\x0f\x01\xd8",
    ExitCode.VMLOAD: b"\x0f\x01\xda",
    ExitCode.VMSAVE: b"\x0f\x01\xdb",
    ExitCode.STGI: b"\x0f\x01\xdc",
    ExitCode.CLGI: b"\x0f\x01\xdd",
    ExitCode.PAUSE: b"\xf3\x90",
}


def bitness(vcpu: Vcpu) -> int:
    """The default operating mode of the code segment: 16, 32 or 64."""
    hflags = vcpu.state.hflags
    if hflags & 0x8000:
        return 64
    return 32 if hflags & 0x10 else 16


def fetch(vcpu: Vcpu) -> bytes:
    """The bytes at the instruction pointer: 15, or fewer before a page that cannot be fetched."""
    data = vcpu.processor.instruction_bytes()
    if data:
        return data
    gva = vcpu.linear_rip()
    hpa = vcpu.translate(gva, FETCH)
    if isinstance(hpa, Fault):
        raise GuestFault(hpa)
    room = PAGE - gva % PAGE
    if room >= MAX_LENGTH:
        return vcpu.memory.read(hpa, MAX_LENGTH)
    data = vcpu.memory.read(hpa, room)
    rest = vcpu.translate(gva + room & _MASK64, FETCH)
    return data if isinstance(rest, Fault) else data + vcpu.memory.read(rest, MAX_LENGTH - room)


# Guests exit at few places: what was decoded once is remembered by its bytes.
_decoded: dict[tuple[bytes, int], Instruction] = {}
_MOST_DECODED: Final = 4096


def instruction(vcpu: Vcpu) -> Instruction:
    """The instruction at the instruction pointer; `code` is `Code.INVALID` where it is none."""
    key = fetch(vcpu), bitness(vcpu)
    known = _decoded.get(key)
    if known is not None:
        return known
    found = Decoder(key[1], key[0], ip=vcpu.state.rip).decode()
    if not found.is_ip_rel_memory_operand:  # that one's address depends on where it is
        if len(_decoded) >= _MOST_DECODED:
            _decoded.clear()
        _decoded[key] = found
    return found


def length(vcpu: Vcpu) -> int:
    """The length in bytes of the instruction at the instruction pointer."""
    plain = _PLAIN.get(vcpu.exit.code)
    if plain is not None:
        data = vcpu.processor.instruction.raw
        if data.startswith(plain) and data[MAX_LENGTH]:
            return len(plain)
    return int(instruction(vcpu).len)


def follows_mov_ss(vcpu: Vcpu) -> bool:
    """Whether the shadow on this instruction comes from MOV SS or POP SS, not from STI.

    The silicon keeps one flag for both; STI is the one byte FBH before the instruction.
    """
    before = vcpu.read_gva(vcpu.linear_rip() - 1 & _MASK64, 1)
    return before != b"\xfb"


# iced's general registers as our indices: encoding order, and how to reach a part of one.
_GPR: Final[dict[int, tuple[int, int, int]]] = {}
_NAMES: Final = ["AX", "CX", "DX", "BX", "SP", "BP", "SI", "DI"]
for _i in range(16):
    _long = f"R{_NAMES[_i]}" if _i < 8 else f"R{_i}"
    _double = f"E{_NAMES[_i]}" if _i < 8 else f"R{_i}D"
    _word = _NAMES[_i] if _i < 8 else f"R{_i}W"
    _byte = ["AL", "CL", "DL", "BL", "SPL", "BPL", "SIL", "DIL"][_i] if _i < 8 else f"R{_i}L"
    _GPR[getattr(Register, _long)] = (_i, 8, 0)
    _GPR[getattr(Register, _double)] = (_i, 4, 0)
    _GPR[getattr(Register, _word)] = (_i, 2, 0)
    _GPR[getattr(Register, _byte)] = (_i, 1, 0)
for _i, _name in enumerate(["AH", "CH", "DH", "BH"]):
    _GPR[getattr(Register, _name)] = (_i, 1, 8)


def register_index(register: int) -> int:
    """The number of a general register, in encoding order, by iced's number."""
    return _GPR[register][0]


def is_general(register: int) -> bool:
    """Whether iced's number is that of a general register or of a part of one."""
    return register in _GPR


def read_register(vcpu: Vcpu, register: int) -> int:
    """The value of a general register or of a part of one, by iced's number."""
    index, size, shift = _GPR[register]
    return vcpu.state.q[index] >> shift & (1 << 8 * size) - 1


def write_register(vcpu: Vcpu, register: int, value: int) -> None:
    """Write a general register as the architecture does: 32 bits clear the upper half."""
    index, size, shift = _GPR[register]
    q = vcpu.state.q
    if size >= 4:
        q[index] = value & (1 << 8 * size) - 1
        return
    mask = ((1 << 8 * size) - 1) << shift
    q[index] = q[index] & ~mask & _MASK64 | value << shift & mask


_SEGMENTS: Final = {
    Register.ES: Env.ES,
    Register.CS: Env.CS,
    Register.SS: Env.SS,
    Register.DS: Env.DS,
    Register.FS: Env.FS,
    Register.GS: Env.GS,
}


# The implied memory operands of string instructions: the index register's number and its width.
_STRING: Final = {
    OpKind.MEMORY_SEG_SI: (6, 16),
    OpKind.MEMORY_SEG_ESI: (6, 32),
    OpKind.MEMORY_SEG_RSI: (6, 64),
    OpKind.MEMORY_ESDI: (7, 16),
    OpKind.MEMORY_ESEDI: (7, 32),
    OpKind.MEMORY_ESRDI: (7, 64),
}


def effective_address(vcpu: Vcpu, decoded: Instruction, operand: int) -> tuple[Env, int]:
    """The segment and the offset in it of a memory operand."""
    implied = _STRING.get(decoded.op_kind(operand))
    if implied is not None:
        index, width = implied
        segment = Env.ES if index == 7 else _SEGMENTS[decoded.memory_segment]
        return segment, vcpu.state.q[index] & (1 << width) - 1
    offset = decoded.memory_displacement
    if decoded.is_ip_rel_memory_operand:
        offset = decoded.ip_rel_memory_address
    else:
        if decoded.memory_base != Register.NONE:
            offset += read_register(vcpu, decoded.memory_base)
        if decoded.memory_index != Register.NONE:
            offset += read_register(vcpu, decoded.memory_index) * decoded.memory_index_scale
    size = _address_size(vcpu, decoded)
    return _SEGMENTS[decoded.memory_segment], offset & (1 << size) - 1


def linear_address(vcpu: Vcpu, decoded: Instruction, operand: int) -> int:
    """The linear address of a memory operand; segment limits are the caller's to check."""
    segment, offset = effective_address(vcpu, decoded, operand)
    if vcpu.state.hflags & 0x8000:
        base = vcpu.state.segment_base(segment) if segment in (Env.FS, Env.GS) else 0
        return base + offset & _MASK64
    return vcpu.state.segment_base(segment) + offset & 0xFFFF_FFFF


def data_address(
    vcpu: Vcpu, decoded: Instruction, operand: int, size: int, *, write: bool = False
) -> int | Fault:
    """The linear address of a memory operand, or the fault of its segment or of its form.

    SDM 3A "Limit Checking", "Type Checking"; SDM 1 "Canonical Addressing".
    """
    segment, offset = effective_address(vcpu, decoded, operand)
    stack = segment is Env.SS
    if vcpu.state.hflags & 0x8000:
        base = vcpu.state.segment_base(segment) if segment in (Env.FS, Env.GS) else 0
        gva = base + offset & _MASK64
        if is_canonical(gva) and is_canonical(gva + size - 1 & _MASK64):
            return gva
        return SS0 if stack else GP0
    _, attributes, limit, base = vcpu.state.segment(segment)
    if not _segment_allows(attributes, limit, offset, size, write=write):
        return SS0 if stack else GP0
    return base + offset & 0xFFFF_FFFF


def _segment_allows(attributes: int, limit: int, offset: int, size: int, *, write: bool) -> bool:
    """Whether a data access fits a segment's type and limit."""
    code, writable = attributes & 8, attributes & 2
    if not attributes & 0x80 or (code and (write or not attributes & 2)):
        return False
    if write and not writable:
        return False
    last = offset + size - 1
    if not code and attributes & 4:  # expand down: what lies above the limit is inside
        top = 0xFFFF_FFFF if attributes & 0x400 else 0xFFFF
        return offset > limit and last <= top
    return last <= limit


def _address_size(vcpu: Vcpu, decoded: Instruction) -> int:
    """The address size in bits, from the registers used or the mode and the prefix."""
    for register in (decoded.memory_base, decoded.memory_index):
        if register in _GPR:
            return _GPR[register][1] * 8
        if register in (Register.RIP, Register.EIP):
            return 64 if register == Register.RIP else 32
    return {2: 16, 4: 32, 8: 64}.get(decoded.memory_displ_size, bitness(vcpu))


def memory_size(decoded: Instruction) -> int:
    """The size in bytes of the memory operand."""
    return int(iced_x86.MemorySizeExt.size(decoded.memory_size))


def is_memory(decoded: Instruction, operand: int) -> bool:
    """Whether an operand is in memory, explicit or implied by a string instruction."""
    kind = decoded.op_kind(operand)
    return bool(kind == OpKind.MEMORY or kind in _STRING)


def is_string(decoded: Instruction) -> bool:
    """Whether the instruction has an implied memory operand."""
    return any(decoded.op_kind(i) in _STRING for i in range(decoded.op_count))


def string_address_mask(vcpu: Vcpu, decoded: Instruction) -> int:
    """The mask of the index and count registers of a string instruction."""
    for operand in range(decoded.op_count):
        implied = _STRING.get(decoded.op_kind(operand))
        if implied is not None:
            return (1 << implied[1]) - 1
    raise ValueError("not a string instruction")


def merge(old: int, new: int, mask: int) -> int:
    """A register after a write of the width of `mask`: 32 bits clear the upper half."""
    if mask == 0xFFFF:
        return old & ~mask & _MASK64 | new & mask
    return new & mask


def step_index(vcpu: Vcpu, decoded: Instruction, index: int, size: int) -> None:
    """Move RSI (6) or RDI (7) on by one element, as RFLAGS.DF says."""
    q, mask = vcpu.state.q, string_address_mask(vcpu, decoded)
    step = -size if vcpu.state.rflags & Rflags.df else size
    q[index] = merge(q[index], q[index] + step, mask)


def string_source(vcpu: Vcpu, decoded: Instruction) -> int:
    """The linear address that a string instruction reads."""
    return _string_address(vcpu, decoded, 6)


def string_target(vcpu: Vcpu, decoded: Instruction) -> int:
    """The linear address that a string instruction writes."""
    return _string_address(vcpu, decoded, 7)


def _string_address(vcpu: Vcpu, decoded: Instruction, index: int) -> int:
    for operand in range(decoded.op_count):
        implied = _STRING.get(decoded.op_kind(operand))
        if implied is not None and implied[0] == index:
            return linear_address(vcpu, decoded, operand)
    raise ValueError("no such operand")


__all__ = [
    "Code",
    "Instruction",
    "OpKind",
    "bitness",
    "effective_address",
    "fetch",
    "iced_x86",
    "instruction",
    "length",
    "linear_address",
    "read_register",
    "write_register",
]
