"""Where Unicorn 2.1.4 keeps the processor's state: offsets into `CPUX86State`, in bytes.

They are checked at start-up by writing through the public interface and looking here (`verify`).
"""

from __future__ import annotations

import ctypes
from enum import IntEnum

import unicorn.x86_const as public
from unicorn import Uc

from undervisor.arch.bits import plain_members
from undervisor.errors import SiliconDied

# From the engine's handle to its CPU, and from there to the architectural state.
ENGINE_CPU = 440
CPU_ENV_POINTER = 296
CPU_NEXT_BLOCK_FLAGS = 24
CPU_INTERRUPT_REQUEST = 28
CPU_HALTED = 33176
CPU_EXCEPTION_INDEX = 33184
STATE_SIZE = 5568


@plain_members
class Env(IntEnum):
    """Offsets into `CPUX86State`."""

    REGS = 0
    RIP = 128
    RFLAGS = 136
    CC_DST = 144
    CC_SRC = 152
    CC_OP = 168
    DF = 172
    HFLAGS = 176
    HFLAGS2 = 180
    ES = 184
    CS = 208
    SS = 232
    DS = 256
    FS = 280
    GS = 304
    LDTR = 328
    TR = 352
    GDTR = 376
    IDTR = 400
    CR0 = 424
    CR2 = 440
    CR3 = 448
    CR4 = 456
    XCR0 = 4904
    EFER = 592
    XMM = 824
    SYSENTER_CS = 4800
    SYSENTER_ESP = 4808
    SYSENTER_EIP = 4816
    STAR = 4824
    LSTAR = 4840
    CSTAR = 4848
    SFMASK = 4856
    KERNEL_GS_BASE = 4864
    ERROR_CODE = 5384
    EXCEPTION_IS_INT = 5388
    EXCEPTION_NEXT_RIP = 5392
    DR0 = 5400
    DR6 = 5448
    DR7 = 5456
    OLD_EXCEPTION = 5496
    VMCB = 5504
    TSC_OFFSET = 5512
    INTERCEPT = 5520
    INTERCEPT_CR_READ = 5528
    INTERCEPT_CR_WRITE = 5530
    INTERCEPT_DR_READ = 5532
    INTERCEPT_DR_WRITE = 5534
    INTERCEPT_EXCEPTIONS = 5536
    NESTED_CR3 = 5544
    NESTED_PAGING_MODE = 5552
    V_TPR = 5556


# Words of CPUID beyond the parked state: what the translator takes an instruction for.
VENDOR = 5616  # the first of CPUID's three words of four letters
FEATURES_1_ECX = 5640
FEATURES_7_EBX = 5648
_RDRAND = 1 << 30
_EXPECTED_FEATURES = ((FEATURES_1_ECX, 0xC6D8_220B), (FEATURES_7_EBX, 0x0098_0189))

# A cached segment register: its parts' offsets from `Env.ES` and so on.
SEGMENT_SELECTOR = 0
SEGMENT_SPARE = 4  # padding that the emulator never touches
SEGMENT_BASE = 8
SEGMENT_LIMIT = 16
SEGMENT_FLAGS = 20


class Hflags(IntEnum):
    """Bit positions in `Env.HFLAGS`: what translation depends on."""

    CPL = 0
    INTERRUPT_SHADOW = 3
    CS32 = 4
    SS32 = 5
    ADDSEG = 6
    PE = 7
    MP = 9
    EM = 10
    TS = 11
    LMA = 14
    CS64 = 15
    SVME = 20
    GUEST = 21
    OSFXSR = 22
    SMAP = 23


# The emulator's TLB: a mask and a table for each of three modes lie just below the state, and an
# entry holds the page's tag for fetches and what to add to an address to find the host's.
TLB_MASK = -0x40
TLB_TABLE = -0x38
TLB_ENTRY_BITS = 6
TLB_CODE = 0x10
TLB_ADDEND = 0x20

HFLAGS2_GIF = 1 << 0
HFLAGS2_NESTED_PAGING = 1 << 6
NESTED_PAGING_LONG_NX = 0b111  # PAE, long mode, no-execute

INTERRUPT_VIRTUAL = 0x100

# How the next block is to be translated, once: -1 as ever, else flags with the number of
# instructions in their low bits.
NEXT_BLOCK_AS_EVER = 0xFFFF_FFFF
NEXT_BLOCK_ONE_INSTRUCTION = 1

_REINSTALL = "the layout is that of the unicorn 2.1.4 wheel for Linux x86_64; reinstall it"

_PROBES = (
    # public register, offset, a value that only it would hold
    (public.UC_X86_REG_RAX, Env.REGS, 0x1111_2222_3333_0001),
    (public.UC_X86_REG_R15, Env.REGS + 8 * 15, 0x1111_2222_3333_0002),
    (public.UC_X86_REG_RIP, Env.RIP, 0x0000_2222_3333_0003),
    (public.UC_X86_REG_CR2, Env.CR2, 0x1111_2222_3333_0004),
    (public.UC_X86_REG_DR0, Env.DR0, 0x1111_2222_3333_0005),
    (public.UC_X86_REG_DR7, Env.DR7, 0x400),
)
_MSR_PROBES = (
    (0xC000_0102, Env.KERNEL_GS_BASE, 0x7FFF_0000_0001),
    (0xC000_0082, Env.LSTAR, 0x7FFF_0000_0002),
    (0xC000_0083, Env.CSTAR, 0x7FFF_0000_0003),
    (0xC000_0081, Env.STAR, 0x0008_0010_0000_0000),
    (0xC000_0084, Env.SFMASK, 0x4700),
    (0x174, Env.SYSENTER_CS, 0x10),
    (0x175, Env.SYSENTER_ESP, 0x7FFF_0000_0005),
    (0x176, Env.SYSENTER_EIP, 0x7FFF_0000_0006),
)


def verify(engine: Uc, state: memoryview) -> None:
    """Raise `SiliconDied` unless `state` holds what the public interface writes."""
    for register, offset, value in _PROBES:
        engine.reg_write(register, value)
        _expect(state, offset, value)
    for msr, offset, value in _MSR_PROBES:
        engine.msr_write(msr, value)
        _expect(state, offset, value)
    _expect_flags(engine)
    engine.reg_write(public.UC_X86_REG_GDTR, (0, 0x1234_5000, 0x7F, 0))
    _expect(state, Env.GDTR + SEGMENT_BASE, 0x1234_5000)


def _expect_flags(engine: Uc) -> None:
    handle = engine._uch
    handle = int(handle.value if hasattr(handle, "value") else handle)
    cpu = ctypes.c_uint64.from_address(handle + ENGINE_CPU).value
    found = ctypes.c_uint32.from_address(cpu + CPU_NEXT_BLOCK_FLAGS).value
    if found != NEXT_BLOCK_AS_EVER:
        raise SiliconDied(
            f"the flags of the next block are not where they should be: {found:#x}",
            hint=_REINSTALL,
        )


def hide_random_numbers(env: int) -> None:
    """Let RDRAND and RDSEED raise #UD: the host's own randomness would make each run another.

    The translator asks for one feature bit for both.  SiliconDied where the words of features are
    not those of the processor that we chose.
    """
    for offset, expected in _EXPECTED_FEATURES:
        found = ctypes.c_uint64.from_address(env + offset).value
        if found != expected:
            raise SiliconDied(
                f"the processor's features are not where they should be: offset {offset} holds "
                f"{found:#x}, not {expected:#x}",
                hint=_REINSTALL,
            )
    ctypes.c_uint64.from_address(env + FEATURES_1_ECX).value &= ~_RDRAND


def be_intel(env: int) -> None:
    """Let SYSENTER and SYSEXIT exist in long mode, as on Intel's processors."""
    vendor = (ctypes.c_char * 4).from_address(env + VENDOR)
    if vendor.raw != b"Auth":
        raise SiliconDied(
            f"the vendor is not where it should be: offset {VENDOR} holds {vendor.raw!r}",
            hint=_REINSTALL,
        )
    vendor.raw = b"Genu"


def _expect(state: memoryview, offset: int, value: int) -> None:
    found = int.from_bytes(state[offset : offset + 8], "little")
    if found != value:
        raise SiliconDied(
            f"the processor's state is not where it should be: offset {offset} holds {found:#x}, "
            f"not {value:#x}",
            hint=_REINSTALL,
        )
