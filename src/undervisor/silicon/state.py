"""The running processor's state, seen through memory views: the registers that Python may touch."""

from __future__ import annotations

import ctypes
from typing import Any

from undervisor.silicon import library
from undervisor.silicon.layout import (
    CPU_ENV_POINTER,
    CPU_EXCEPTION_INDEX,
    CPU_INTERRUPT_REQUEST,
    CPU_NEXT_BLOCK_FLAGS,
    ENGINE_CPU,
    SEGMENT_BASE,
    SEGMENT_FLAGS,
    SEGMENT_LIMIT,
    SEGMENT_SELECTOR,
    SEGMENT_SPARE,
    STATE_SIZE,
    Env,
    Hflags,
)

_SHADOW = 1 << Hflags.INTERRUPT_SHADOW
_MASK64 = (1 << 64) - 1


def _quad(offset: int) -> Any:
    index = offset // 8

    def get(self: State) -> int:
        return self.q[index]

    def put(self: State, value: int) -> None:
        self.q[index] = value

    return property(get, put)


def _word(offset: int) -> Any:
    index = offset // 4

    def get(self: State) -> int:
        return self.d[index]

    def put(self: State, value: int) -> None:
        self.d[index] = value

    return property(get, put)


class State:
    """The live `CPUX86State` of one engine.

    `q` and `d` are views of it as 64- and 32-bit values; `q[0:16]` are the general registers in
    encoding order.  Control registers and segments are for reading: changing them takes effect
    through `Processor.load`, which recomputes what depends on them.
    """

    rip = _quad(Env.RIP)
    cr0 = _quad(Env.CR0)
    cr2 = _quad(Env.CR2)
    cr3 = _quad(Env.CR3)
    cr4 = _quad(Env.CR4)
    efer = _quad(Env.EFER)
    xcr0 = _quad(Env.XCR0)
    dr6 = _quad(Env.DR6)
    dr7 = _quad(Env.DR7)
    star = _quad(Env.STAR)
    lstar = _quad(Env.LSTAR)
    cstar = _quad(Env.CSTAR)
    sfmask = _quad(Env.SFMASK)
    kernel_gs_base = _quad(Env.KERNEL_GS_BASE)
    sysenter_cs = _word(Env.SYSENTER_CS)
    sysenter_esp = _quad(Env.SYSENTER_ESP)
    sysenter_eip = _quad(Env.SYSENTER_EIP)
    hflags = _word(Env.HFLAGS)
    error_code = _word(Env.ERROR_CODE)
    is_int = _word(Env.EXCEPTION_IS_INT)
    next_rip = _quad(Env.EXCEPTION_NEXT_RIP)
    old_exception = _word(Env.OLD_EXCEPTION)
    intercepts = _quad(Env.INTERCEPT)
    intercept_exceptions = _word(Env.INTERCEPT_EXCEPTIONS)

    def __init__(self, engine_handle: int) -> None:
        self.cpu = ctypes.c_uint64.from_address(engine_handle + ENGINE_CPU).value
        self.env = ctypes.c_uint64.from_address(self.cpu + CPU_ENV_POINTER).value
        raw = (ctypes.c_ubyte * STATE_SIZE).from_address(self.env)
        self.bytes = memoryview(raw).cast("B")
        self.q = self.bytes.cast("Q")
        self.d = self.bytes.cast("I")
        self.interrupt_request = ctypes.c_uint32.from_address(self.cpu + CPU_INTERRUPT_REQUEST)
        self.next_block_flags = ctypes.c_uint32.from_address(self.cpu + CPU_NEXT_BLOCK_FLAGS)
        self.exception_index = ctypes.c_uint32.from_address(self.cpu + CPU_EXCEPTION_INDEX)
        self._read_eflags = library.function("helper_read_eflags")

    @property
    def rflags(self) -> int:
        """RFLAGS as the guest would push it."""
        return int(self._read_eflags(self.env))

    @rflags.setter
    def rflags(self, value: int) -> None:
        self.q[Env.CC_SRC // 8] = value & 0x8D5
        self.q[Env.CC_DST // 8] = 0
        self.d[Env.CC_OP // 4] = 1
        self.d[Env.DF // 4] = 0xFFFF_FFFF if value & 0x400 else 1
        self.q[Env.RFLAGS // 8] = value & ~0xCD5 & _MASK64 | 2

    def set_status(self, flags: int) -> None:
        """Replace the six status flags by `flags`."""
        self.q[Env.CC_SRC // 8] = flags
        self.q[Env.CC_DST // 8] = 0
        self.d[Env.CC_OP // 4] = 1

    @property
    def cpl(self) -> int:
        """The current privilege level."""
        return self.d[Env.HFLAGS // 4] & 3

    @property
    def interrupt_shadow(self) -> bool:
        """Whether the next instruction is in the shadow of STI, MOV SS or POP SS."""
        return bool(self.d[Env.HFLAGS // 4] & _SHADOW)

    def end_interrupt_shadow(self) -> None:
        """An instruction has completed: the shadow is over."""
        self.d[Env.HFLAGS // 4] &= ~_SHADOW

    def segment(self, offset: Env) -> tuple[int, int, int, int]:
        """`(selector, attributes in VMCB form, limit, base)` of a segment register."""
        flags = self.d[(offset + SEGMENT_FLAGS) // 4]
        attributes = flags >> 8 & 0xFF | flags >> 12 & 0xF00
        if offset is Env.TR:
            attributes = self.d[(offset + SEGMENT_SPARE) // 4]
        return (
            self.d[(offset + SEGMENT_SELECTOR) // 4],
            attributes,
            self.d[(offset + SEGMENT_LIMIT) // 4],
            self.q[(offset + SEGMENT_BASE) // 8],
        )

    def segment_base(self, offset: Env) -> int:
        """The base of a segment register."""
        return self.q[(offset + SEGMENT_BASE) // 8]

    def set_segment_base(self, offset: Env, base: int) -> None:
        """Write FS.base or GS.base, which no cached flag depends on in 64-bit mode."""
        self.q[(offset + SEGMENT_BASE) // 8] = base
