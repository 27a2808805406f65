"""The x87 and SSE state of the running processor, in the form of FXSAVE's 512 bytes."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

import unicorn.x86_const as public

if TYPE_CHECKING:
    from undervisor.silicon.processor import Processor

_TOP = 604
_STATUS = 608
_TAGS = 612  # a byte a register, 1: empty
_REGISTERS = 624  # 16 bytes a register, physical order
_OPCODE = 752
_INSTRUCTION = 760
_DATA = 768
_MXCSR = 816
_XMM = 824
_XMM_STRIDE = 64

# FXSAVE's image, 64-bit form. SDM 1 "FXSAVE and FXRSTOR".
_HEAD: Final = struct.Struct("<HHBxHQQII")
_ST, _XMM0, SIZE = 32, 160, 512
_INITIAL_FCW, INITIAL_MXCSR, _MXCSR_MASK = 0x37F, 0x1F80, 0xFFFF
MXCSR_RESERVED: Final = ~_MXCSR_MASK & 0xFFFF_FFFF
_INITIAL_X87: Final = _HEAD.pack(_INITIAL_FCW, 0, 0, 0, 0, 0, INITIAL_MXCSR, _MXCSR_MASK)


class Fpu:
    """Reads and writes x87 and SSE registers where the emulator keeps them."""

    def __init__(self, processor: Processor) -> None:
        self._bytes = processor.state.bytes
        self._engine = processor.engine

    def save(self) -> bytes:
        """The image that FXSAVE64 would store."""
        b = self._bytes
        top = b[_TOP] & 7
        status = int.from_bytes(b[_STATUS : _STATUS + 2], "little") & ~0x3800 | top << 11
        tags = sum(1 << i for i in range(8) if not b[_TAGS + i])
        image = bytearray(SIZE)
        _HEAD.pack_into(
            image,
            0,
            int.from_bytes(b[_STATUS + 2 : _STATUS + 4], "little"),
            status,
            tags,
            int.from_bytes(b[_OPCODE : _OPCODE + 2], "little"),
            int.from_bytes(b[_INSTRUCTION : _INSTRUCTION + 8], "little"),
            int.from_bytes(b[_DATA : _DATA + 8], "little"),
            int.from_bytes(b[_MXCSR : _MXCSR + 4], "little"),
            _MXCSR_MASK,
        )
        for i in range(8):
            register = _REGISTERS + 16 * ((top + i) & 7)
            image[_ST + 16 * i : _ST + 16 * i + 10] = b[register : register + 10]
        for i in range(16):
            register = _XMM + _XMM_STRIDE * i
            image[_XMM0 + 16 * i : _XMM0 + 16 * i + 16] = b[register : register + 16]
        return bytes(image)

    def restore_x87(self, image: bytes | None) -> None:
        """Load the x87 part of an image, or the initial state."""
        b = self._bytes
        source = image if image is not None else _INITIAL_X87 + bytes(SIZE - _HEAD.size)
        control, status, tags, opcode, instruction, data, _, _ = _HEAD.unpack_from(source)
        top = status >> 11 & 7
        b[_TOP] = top
        b[_STATUS : _STATUS + 2] = (status & ~0x3800).to_bytes(2, "little")
        for i in range(8):
            b[_TAGS + i] = 0 if tags >> i & 1 else 1
            register = _REGISTERS + 16 * ((top + i) & 7)
            b[register : register + 10] = source[_ST + 16 * i : _ST + 16 * i + 10]
        b[_OPCODE : _OPCODE + 2] = (opcode & 0x7FF).to_bytes(2, "little")
        b[_INSTRUCTION : _INSTRUCTION + 8] = instruction.to_bytes(8, "little")
        b[_DATA : _DATA + 8] = data.to_bytes(8, "little")
        self._engine.reg_write(public.UC_X86_REG_FPCW, control)

    def restore_sse(self, image: bytes | None) -> None:
        """Load XMM registers from an image, or zero them; MXCSR is `set_mxcsr`."""
        source = image if image is not None else bytes(SIZE)
        for i in range(16):
            register = _XMM + _XMM_STRIDE * i
            self._bytes[register : register + 16] = source[_XMM0 + 16 * i : _XMM0 + 16 * i + 16]

    def set_mxcsr(self, value: int) -> None:
        """Load MXCSR; the caller has refused `MXCSR_RESERVED` bits."""
        self._engine.reg_write(public.UC_X86_REG_MXCSR, value)

    @staticmethod
    def mxcsr_of(image: bytes) -> int:
        """MXCSR in an image."""
        return int(_HEAD.unpack_from(image)[6])

    @staticmethod
    def in_use(image: bytes) -> int:
        """XINUSE: bit 0 where x87 state, bit 1 where SSE state is not initial."""
        x87 = image[:24] != _INITIAL_X87[:24] or any(image[_ST:_XMM0])
        return int(x87) | int(any(image[_XMM0 : _XMM0 + 256])) << 1
