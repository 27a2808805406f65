"""Memory-mapped I/O: the instruction at the exit is carried out with devices in place of memory.

Only what drivers and hypervisors use on device registers is here: moves, string moves and
read-modify-write arithmetic.  Anything else stops the run and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from iced_x86 import Mnemonic, OpKind, Register

from undervisor.arch.x86.events import UD, Fault, GuestFault
from undervisor.arch.x86.paging import WRITE
from undervisor.arch.x86.registers import Rflags
from undervisor.hypervisor import decode, describe
from undervisor.hypervisor.verdict import ADVANCE, Ending, Inject, Outcome, Stop, Verdict
from undervisor.silicon.memory import PAGE

if TYPE_CHECKING:
    from undervisor.hypervisor.vcpu import Vcpu

_MASK64: Final = (1 << 64) - 1
_MOST_ITERATIONS: Final = 4096
_IMMEDIATES: Final = {
    OpKind.IMMEDIATE8,
    OpKind.IMMEDIATE16,
    OpKind.IMMEDIATE32,
    OpKind.IMMEDIATE64,
    OpKind.IMMEDIATE8TO16,
    OpKind.IMMEDIATE8TO32,
    OpKind.IMMEDIATE8TO64,
    OpKind.IMMEDIATE32TO64,
}


def load(vcpu: Vcpu, gva: int, size: int) -> int:
    """A load of `size` bytes at a linear address, from memory or a device."""
    if gva % PAGE + size > PAGE:
        first = PAGE - gva % PAGE
        return load(vcpu, gva, first) | load(vcpu, gva + first, size - first) << 8 * first
    hpa = vcpu.translate(gva)
    if isinstance(hpa, Fault):
        raise GuestFault(hpa)
    if _in_window(vcpu, hpa):
        return vcpu.window.load(hpa, size)  # type: ignore[union-attr]
    if vcpu.memory.is_ram(hpa, size) and not _is_device(vcpu, hpa):
        return int.from_bytes(vcpu.memory.read(hpa, size), "little")
    return vcpu.machine.platform.mmio[vcpu.index].read(hpa, size)


def store(vcpu: Vcpu, gva: int, size: int, value: int) -> None:
    """A store of `size` bytes at a linear address, to memory or a device; ROM swallows it."""
    if gva % PAGE + size > PAGE:
        check_store(vcpu, gva, size)
        first = PAGE - gva % PAGE
        store(vcpu, gva, first, value & (1 << 8 * first) - 1)
        store(vcpu, gva + first, size - first, value >> 8 * first)
        return
    hpa = vcpu.translate(gva, WRITE)
    if isinstance(hpa, Fault):
        raise GuestFault(hpa)
    if _in_window(vcpu, hpa):
        vcpu.window.store(hpa, size, value)  # type: ignore[union-attr]
    elif not vcpu.memory.is_ram(hpa, size) or _is_device(vcpu, hpa):
        vcpu.machine.platform.mmio[vcpu.index].write(hpa, size, value)
    elif not vcpu.machine.is_rom(hpa):
        vcpu.memory.write(hpa, value.to_bytes(size, "little"))


def plain_memory(vcpu: Vcpu, gva: int, *, write: bool) -> int | None:
    """Where a byte of RAM is, all of whose page is plain memory; None where it is not or faults."""
    hpa = vcpu.translate(gva, WRITE if write else 0)
    if isinstance(hpa, Fault) or _in_window(vcpu, hpa) or (write and vcpu.machine.is_rom(hpa)):
        return None
    page = hpa & -PAGE
    return hpa if vcpu.memory.is_ram(page, PAGE) and not _is_device(vcpu, hpa) else None


def check_store(vcpu: Vcpu, gva: int, size: int) -> None:
    """GuestFault where a store would fault: nothing may be half done."""
    for at in (gva, gva + size - 1 & _MASK64):
        hpa = vcpu.translate(at, WRITE)
        if isinstance(hpa, Fault):
            raise GuestFault(hpa)


def _in_window(vcpu: Vcpu, hpa: int) -> bool:
    return vcpu.in_l2 and vcpu.window is not None and hpa & -PAGE == vcpu.window.page


def _is_device(vcpu: Vcpu, hpa: int) -> bool:
    return 0xA0000 <= hpa < 0xC0000 or vcpu.machine.platform.mmio[vcpu.index].covers(hpa)


def knows(decoded: decode.Instruction) -> bool:
    """Whether `emulate` can carry the instruction out."""
    return decoded.mnemonic in _OPERATIONS


def emulate(vcpu: Vcpu) -> Verdict:
    """Carry out the instruction at the instruction pointer."""
    decoded = decode.instruction(vcpu)
    operation = _OPERATIONS.get(decoded.mnemonic)
    if operation is None and decoded.code == decode.Code.INVALID:
        return Inject(UD)  # fetched from where no memory is: all ones
    if operation is None or not _has_general_registers(decoded):
        text = f"{decoded} on device memory is not emulated\n{describe.registers(vcpu)}"
        return Stop(Outcome(Ending.UNKNOWN_EXIT, text))
    return operation(vcpu, decoded)


def _has_general_registers(decoded: decode.Instruction) -> bool:
    """Whether the register operands are general ones: no segment, control or vector register."""
    return all(
        decode.is_general(decoded.op_register(operand))
        for operand in range(decoded.op_count)
        if decoded.op_kind(operand) == OpKind.REGISTER
    )


# -- operands ----------------------------------------------------------------------------------


def _size(decoded: decode.Instruction) -> int:
    """The size in bytes of the memory operand."""
    return int(decode.memory_size(decoded))


def _get(vcpu: Vcpu, decoded: decode.Instruction, operand: int) -> int:
    kind = decoded.op_kind(operand)
    if kind == OpKind.REGISTER:
        return decode.read_register(vcpu, decoded.op_register(operand))
    if kind in _IMMEDIATES:
        return int(decoded.immediate(operand)) & _MASK64
    return load(vcpu, decode.linear_address(vcpu, decoded, operand), _size(decoded))


def _put(vcpu: Vcpu, decoded: decode.Instruction, operand: int, value: int) -> None:
    if decoded.op_kind(operand) == OpKind.REGISTER:
        decode.write_register(vcpu, decoded.op_register(operand), value)
        return
    size = _size(decoded)
    where = decode.linear_address(vcpu, decoded, operand)
    store(vcpu, where, size, value & (1 << 8 * size) - 1)


# -- operations --------------------------------------------------------------------------------


def _move(vcpu: Vcpu, decoded: decode.Instruction) -> Verdict:
    _put(vcpu, decoded, 0, _get(vcpu, decoded, 1))
    return ADVANCE[decoded.len]


def _move_signed(vcpu: Vcpu, decoded: decode.Instruction) -> Verdict:
    bits = 8 * _size(decoded)
    value = _get(vcpu, decoded, 1)
    if value >> (bits - 1):
        value |= _MASK64 ^ ((1 << bits) - 1)
    decode.write_register(vcpu, decoded.op0_register, value)
    return ADVANCE[decoded.len]


def _exchange(vcpu: Vcpu, decoded: decode.Instruction) -> Verdict:
    first, second = _get(vcpu, decoded, 0), _get(vcpu, decoded, 1)
    _put(vcpu, decoded, 0, second)
    _put(vcpu, decoded, 1, first)
    return ADVANCE[decoded.len]


def _parity(value: int) -> int:
    return Rflags.pf if not (value & 0xFF).bit_count() & 1 else 0


def _set_flags(
    vcpu: Vcpu, result: int, bits: int, carry: int, overflow: int, auxiliary: int
) -> None:
    """The six status flags of an arithmetic result."""
    flags = carry * Rflags.cf | overflow * Rflags.of_ | auxiliary * Rflags.af
    flags |= Rflags.zf if not result else 0
    flags |= Rflags.sf if result >> (bits - 1) else 0
    state = vcpu.state
    state.rflags = state.rflags & ~0x8D5 | flags | _parity(result)


Logic = Callable[[int, int], int]


def _logical(operation: Logic, *, keep: bool = True) -> Callable[..., Verdict]:
    def run(vcpu: Vcpu, decoded: decode.Instruction) -> Verdict:
        bits = 8 * _size(decoded)
        mask = (1 << bits) - 1
        result = operation(_get(vcpu, decoded, 0), _get(vcpu, decoded, 1)) & mask
        if keep:
            _put(vcpu, decoded, 0, result)
        _set_flags(vcpu, result, bits, 0, 0, 0)
        return ADVANCE[decoded.len]

    return run


def _arithmetic(sign: int, *, keep: bool = True) -> Callable[..., Verdict]:
    def run(vcpu: Vcpu, decoded: decode.Instruction) -> Verdict:
        bits = 8 * _size(decoded)
        mask, top = (1 << bits) - 1, bits - 1
        left, right = _get(vcpu, decoded, 0) & mask, _get(vcpu, decoded, 1) & mask
        total = left + sign * right
        result = total & mask
        if keep:
            _put(vcpu, decoded, 0, result)
        other = right if sign > 0 else ~right
        overflow = (left ^ result) & (other ^ result) >> 0
        _set_flags(
            vcpu,
            result,
            bits,
            int(total != result),
            overflow >> top & 1,
            (left ^ right ^ result) >> 4 & 1,
        )
        return ADVANCE[decoded.len]

    return run


def _bit_test(change: Callable[[int, int], int]) -> Callable[..., Verdict]:
    def run(vcpu: Vcpu, decoded: decode.Instruction) -> Verdict:
        size = _size(decoded)
        index = _get(vcpu, decoded, 1)
        where = decode.linear_address(vcpu, decoded, 0)
        if decoded.op1_kind == OpKind.REGISTER:
            signed = index - (1 << 8 * size) if index >> (8 * size - 1) else index
            where = where + (signed >> 3 & -size) & _MASK64
        bit = 1 << index % (8 * size)
        value = load(vcpu, where, size)
        new = change(value, bit)
        if new != value:
            store(vcpu, where, size, new)
        flags = vcpu.state.rflags & ~Rflags.cf
        vcpu.state.rflags = flags | (Rflags.cf if value & bit else 0)
        return ADVANCE[decoded.len]

    return run


def _string(vcpu: Vcpu, decoded: decode.Instruction) -> Verdict:
    """MOVS, STOS and LODS with or without REP."""
    size = _size(decoded)
    repeated = decoded.has_rep_prefix or decoded.has_repne_prefix
    mask = decode.string_address_mask(vcpu, decoded)
    q = vcpu.state.q
    for _ in range(_MOST_ITERATIONS if repeated else 1):
        if repeated and not q[1] & mask:
            return ADVANCE[decoded.len]
        _string_once(vcpu, decoded, size)
        if repeated:
            q[1] = decode.merge(q[1], q[1] - 1, mask)
        if vcpu.stops_after_iteration(0):
            break
    if not repeated or not q[1] & mask:
        return ADVANCE[decoded.len]
    return vcpu.interrupted_iteration()


def _string_once(vcpu: Vcpu, decoded: decode.Instruction, size: int) -> None:
    accumulator = {1: Register.AL, 2: Register.AX, 4: Register.EAX, 8: Register.RAX}[size]
    loads = decoded.mnemonic in _LOADS
    if loads:
        value = load(vcpu, decode.string_source(vcpu, decoded), size)
    else:
        value = decode.read_register(vcpu, accumulator)
    if decoded.mnemonic in _STORES:
        store(vcpu, decode.string_target(vcpu, decoded), size, value)
        decode.step_index(vcpu, decoded, 7, size)
    else:
        decode.write_register(vcpu, accumulator, value)
    if loads:
        decode.step_index(vcpu, decoded, 6, size)


_MOVS = {Mnemonic.MOVSB, Mnemonic.MOVSW, Mnemonic.MOVSD, Mnemonic.MOVSQ}
_STOS = {Mnemonic.STOSB, Mnemonic.STOSW, Mnemonic.STOSD, Mnemonic.STOSQ}
_LODS = {Mnemonic.LODSB, Mnemonic.LODSW, Mnemonic.LODSD, Mnemonic.LODSQ}
_LOADS = _MOVS | _LODS
_STORES = _MOVS | _STOS

_OPERATIONS: Final[dict[int, Callable[..., Verdict]]] = {
    Mnemonic.MOV: _move,
    Mnemonic.MOVZX: _move,
    Mnemonic.MOVNTI: _move,
    Mnemonic.MOVSX: _move_signed,
    Mnemonic.MOVSXD: _move_signed,
    Mnemonic.XCHG: _exchange,
    Mnemonic.AND: _logical(lambda a, b: a & b),
    Mnemonic.OR: _logical(lambda a, b: a | b),
    Mnemonic.XOR: _logical(lambda a, b: a ^ b),
    Mnemonic.TEST: _logical(lambda a, b: a & b, keep=False),
    Mnemonic.ADD: _arithmetic(1),
    Mnemonic.SUB: _arithmetic(-1),
    Mnemonic.CMP: _arithmetic(-1, keep=False),
    Mnemonic.BT: _bit_test(lambda value, bit: value),
    Mnemonic.BTS: _bit_test(lambda value, bit: value | bit),
    Mnemonic.BTR: _bit_test(lambda value, bit: value & ~bit),
    Mnemonic.BTC: _bit_test(lambda value, bit: value ^ bit),
    **dict.fromkeys(_MOVS | _STOS | _LODS, _string),
}
