"""VM-exit instruction information and the qualifications that an instruction's encoding gives.

SDM 3C "Information for VM Exits Due to Instruction Execution".
"""

from __future__ import annotations

from typing import Final

from iced_x86 import Code, Instruction, Mnemonic, OpKind, Register

from undervisor.arch.vmx.exits import MemoryOperandInformation as M

_SCALES: Final = {1: 0, 2: 1, 4: 2, 8: 3}
_SEGMENTS: Final = {
    Register.ES: 0,
    Register.CS: 1,
    Register.SS: 2,
    Register.DS: 3,
    Register.FS: 4,
    Register.GS: 5,
}
_MASK64: Final = (1 << 64) - 1
_BANKS: Final = (Register.AX, Register.EAX, Register.RAX)
_ADDRESS_SIZES: Final = {Register.AX: 0, Register.EAX: 1, Register.RAX: 2}


def gpr(register: int) -> int:
    """The number of a general register of 16, 32 or 64 bits in encoding order."""
    bank = next(bank for bank in _BANKS if bank <= register < bank + 16)
    return int(register - bank)


def _address_size(instruction: Instruction, bitness: int) -> int:
    for register in (instruction.memory_base, instruction.memory_index):
        for bank, size in _ADDRESS_SIZES.items():
            if bank <= register < bank + 16:
                return size
    return {2: 0, 4: 1, 8: 2}.get(instruction.memory_displ_size, {16: 0, 32: 1, 64: 2}[bitness])


def memory_operand(instruction: Instruction, bitness: int) -> int:
    """Bits that describe the memory operand: scaling, address size, segment, index, base."""
    value = _address_size(instruction, bitness) << 7
    value |= _SEGMENTS[instruction.memory_segment] << 15
    index, base = instruction.memory_index, instruction.memory_base
    if index != Register.NONE:
        value |= _SCALES[instruction.memory_index_scale] | gpr(index) << 18
    else:
        value |= M.index_invalid
    if base not in (Register.NONE, Register.RIP, Register.EIP):
        value |= gpr(base) << 23
    else:
        value |= M.base_invalid
    return int(value)


def vmx_instruction(instruction: Instruction, bitness: int) -> int:
    """Instruction information of any VMX instruction, INVPCID, XSAVES or XRSTORS."""
    kinds = [instruction.op_kind(i) for i in range(instruction.op_count)]
    memory = OpKind.MEMORY in kinds
    value = memory_operand(instruction, bitness) if memory else 1 << 10
    registers = [
        gpr(instruction.op_register(i)) for i, k in enumerate(kinds) if k == OpKind.REGISTER
    ]
    if memory and registers:
        return value | registers[0] << 28
    if len(registers) == 2:
        field, operand = _field_and_operand(instruction, registers)
        return value | operand << 3 | field << 28
    return value


def _field_and_operand(instruction: Instruction, registers: list[int]) -> tuple[int, int]:
    """Register forms of VMREAD (operand, field) and VMWRITE (field, operand)."""
    first, second = registers
    is_write = instruction.mnemonic == Mnemonic.VMWRITE
    return (first, second) if is_write else (second, first)


def displacement(instruction: Instruction) -> int:
    """The exit qualification of an instruction with a memory operand: its displacement.

    For RIP-relative addressing it is the address itself ("the sum of the displacement and RIP").
    """
    if OpKind.MEMORY not in (instruction.op_kind(i) for i in range(instruction.op_count)):
        return 0
    return int(instruction.memory_displacement) & _MASK64


def table_instruction(instruction: Instruction, bitness: int, identity: int) -> int:
    """Instruction information of an access to GDTR, IDTR, LDTR or TR; `identity` in bits 29:28."""
    value = identity << 28
    if instruction.op0_kind == OpKind.REGISTER:
        return value | 1 << 10 | gpr(instruction.op0_register) << 3
    value |= memory_operand(instruction, bitness)
    return value | (1 << 11 if instruction.code in _WIDE_TABLES else 0)


# SGDT, SIDT, LGDT and LIDT with an operand size of 32 bits (or 64, where the bit is undefined).
_WIDE_TABLES: Final = frozenset(
    {
        Code.SGDT_M1632,
        Code.SIDT_M1632,
        Code.LGDT_M1632,
        Code.LIDT_M1632,
        Code.SGDT_M1664,
        Code.SIDT_M1664,
        Code.LGDT_M1664,
        Code.LIDT_M1664,
    }
)


def string_io(instruction: Instruction, bitness: int) -> int:
    """Instruction information of INS and OUTS."""
    size = _STRING_SIZES.get(instruction.op0_kind, _STRING_SIZES.get(instruction.op1_kind, 2))
    return size << 7 | _SEGMENTS.get(instruction.memory_segment, 3) << 15


_STRING_SIZES: Final = {
    OpKind.MEMORY_ESDI: 0,
    OpKind.MEMORY_ESEDI: 1,
    OpKind.MEMORY_ESRDI: 2,
    OpKind.MEMORY_SEG_SI: 0,
    OpKind.MEMORY_SEG_ESI: 1,
    OpKind.MEMORY_SEG_RSI: 2,
}


def random_instruction(instruction: Instruction) -> int:
    """Instruction information of RDRAND and RDSEED."""
    register = instruction.op0_register
    size = next(i for i, bank in enumerate(_BANKS) if bank <= register < bank + 16)
    return gpr(register) << 3 | size << 11
