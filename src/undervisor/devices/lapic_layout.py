"""The local APIC's registers as the manual lays them out.

Intel SDM, "Local APIC Register Address Map", "Interrupt Command Register (ICR)", "Local Vector
Table", "x2APIC Register Address Space".  A register's number is its xAPIC offset divided by 16,
which is also its x2APIC MSR minus 0x800.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from undervisor.arch.bits import Bits, Register

DEFAULT_BASE: Final = 0xFEE00000
FIRST_X2APIC_MSR: Final = 0x800
VERSION: Final = 0x50014  # six LVT entries, integrated APIC; no EOI-broadcast suppression
BROADCAST: Final = 0xFFFFFFFF


class Reg(IntEnum):
    """Register numbers."""

    ID = 0x02
    VERSION = 0x03
    TPR = 0x08
    APR = 0x09
    PPR = 0x0A
    EOI = 0x0B
    RRD = 0x0C
    LDR = 0x0D
    DFR = 0x0E
    SVR = 0x0F
    ISR = 0x10
    TMR = 0x18
    IRR = 0x20
    ESR = 0x28
    ICR = 0x30
    ICR_HIGH = 0x31
    LVT_TIMER = 0x32
    LVT_THERMAL = 0x33
    LVT_PERFORMANCE = 0x34
    LVT_LINT0 = 0x35
    LVT_LINT1 = 0x36
    LVT_ERROR = 0x37
    INITIAL_COUNT = 0x38
    CURRENT_COUNT = 0x39
    DIVIDE = 0x3E
    SELF_IPI = 0x3F


class DeliveryMode(IntEnum):
    """How an interrupt message acts on the processor that takes it."""

    FIXED = 0
    LOWEST_PRIORITY = 1
    SMI = 2
    RESERVED = 3
    NMI = 4
    INIT = 5
    STARTUP = 6
    EXTINT = 7


class Shorthand(IntEnum):
    """Destination shorthands of the ICR."""

    NONE = 0
    SELF = 1
    ALL = 2
    OTHERS = 3


class TimerMode(IntEnum):
    """LVT timer modes."""

    ONE_SHOT = 0
    PERIODIC = 1
    TSC_DEADLINE = 2
    RESERVED = 3


class Lvt(Register):
    """An entry of the local vector table; each entry has a part of these fields."""

    WIDTH = 32
    vector = Bits(7, 0)
    delivery_mode = Bits(10, 8)
    delivery_status = Bits(12)
    polarity = Bits(13)
    remote_irr = Bits(14)
    level = Bits(15)
    mask = Bits(16)
    timer_mode = Bits(18, 17)


class Icr(Register):
    """The interrupt command register as x2APIC's 64-bit MSR; xAPIC has bits 63:56 only."""

    vector = Bits(7, 0)
    delivery_mode = Bits(10, 8)
    logical = Bits(11)
    delivery_status = Bits(12)
    level = Bits(14)
    level_triggered = Bits(15)
    shorthand = Bits(19, 18)
    destination = Bits(63, 32)


class Spurious(Register):
    """SVR."""

    WIDTH = 32
    vector = Bits(7, 0)
    enable = Bits(8)
    focus_checking_disabled = Bits(9)


class ApicBase(Register):
    """IA32_APIC_BASE; bits 35:12 and up are the base, within the physical-address width."""

    bsp = Bits(8)
    x2apic = Bits(10)
    enable = Bits(11)
    base = Bits(51, 12)


class ApicError(IntEnum):
    """Bits of the error status register that this APIC can set."""

    SEND_ILLEGAL_VECTOR = 1 << 5
    RECEIVE_ILLEGAL_VECTOR = 1 << 6
    ILLEGAL_REGISTER = 1 << 7


# The bits that software may write, per LVT entry.
LVT_WRITABLE: Final[dict[Reg, int]] = {
    Reg.LVT_TIMER: Lvt.vector | Lvt.mask | Lvt.timer_mode,
    Reg.LVT_THERMAL: Lvt.vector | Lvt.delivery_mode | Lvt.mask,
    Reg.LVT_PERFORMANCE: Lvt.vector | Lvt.delivery_mode | Lvt.mask,
    Reg.LVT_LINT0: Lvt.vector | Lvt.delivery_mode | Lvt.polarity | Lvt.level | Lvt.mask,
    Reg.LVT_LINT1: Lvt.vector | Lvt.delivery_mode | Lvt.polarity | Lvt.level | Lvt.mask,
    Reg.LVT_ERROR: Lvt.vector | Lvt.mask,
}
LVT_READ_ONLY: Final = Lvt.delivery_status | Lvt.remote_irr

# x2APIC: the bits that WRMSR may set (#GP on others), for the registers that it may write.
X2APIC_WRITABLE: Final[dict[int, int]] = {
    Reg.TPR: 0xFF,
    Reg.EOI: 0,
    Reg.SVR: Spurious.DECLARED,
    Reg.ESR: 0,
    Reg.ICR: Icr.DECLARED,
    **{reg: mask | LVT_READ_ONLY for reg, mask in LVT_WRITABLE.items()},
    Reg.INITIAL_COUNT: 0xFFFFFFFF,
    Reg.DIVIDE: 0b1011,
    Reg.SELF_IPI: 0xFF,
}
# Registers that RDMSR cannot read in x2APIC mode although MMIO can in xAPIC mode.
X2APIC_UNREADABLE: Final = frozenset({Reg.APR, Reg.RRD, Reg.EOI, Reg.DFR, Reg.ICR_HIGH})
