"""Segments: descriptors in memory, and the attributes as the VMCB and the VMCS hold them.

SDM 3A "Segment Descriptors", "System Descriptor Types" and "Task Management"; APM 2 "Segment
State in the VMCB"; SDM 3C "Guest Register State" (access rights).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from undervisor.arch.bits import Bits, Register


class Attributes(Register):
    """Segment attributes, 12 bits, as in the VMCB: descriptor bits 55:52 and 47:40."""

    WIDTH = 16

    type = Bits(3, 0)
    s = Bits(4, about="code or data; 0: system")
    dpl = Bits(6, 5, about="Descriptor Privilege Level")
    p = Bits(7, about="present")
    avl = Bits(8, about="available to software")
    l = Bits(9, about="64-bit code segment")  # noqa: E741  the manual's name
    db = Bits(10, about="default operand size, big")
    g = Bits(11, about="granularity of the limit")


class AccessRights(Register):
    """Segment access rights as in the VMCS: a gap where the descriptor has limit 19:16."""

    WIDTH = 32

    type = Bits(3, 0)
    s = Bits(4, about="code or data; 0: system")
    dpl = Bits(6, 5, about="Descriptor Privilege Level")
    p = Bits(7, about="present")
    avl = Bits(12, about="available to software")
    l = Bits(13, about="64-bit code segment")  # noqa: E741  the manual's name
    db = Bits(14, about="default operand size, big")
    g = Bits(15, about="granularity of the limit")
    unusable = Bits(16, about="segment unusable")


UNUSABLE: Final = AccessRights.unusable


def access_rights_of(attributes: int) -> int:
    """VMCB attributes as VMCS access rights; a segment that is not present becomes unusable."""
    rights = attributes & 0xFF | (attributes & 0xF00) << 4
    return rights if attributes & Attributes.p else rights | UNUSABLE


def attributes_of(access_rights: int) -> int:
    """VMCS access rights as VMCB attributes; an unusable segment becomes one not present."""
    attributes = access_rights & 0xFF | access_rights >> 4 & 0xF00
    return attributes & ~Attributes.p if access_rights & UNUSABLE else attributes


class SystemType(IntEnum):
    """Types of system descriptors (S = 0). SDM 3A "System Descriptor Types"."""

    TSS16_AVAILABLE = 1
    LDT = 2
    TSS16_BUSY = 3
    CALL_GATE16 = 4
    TASK_GATE = 5
    INTERRUPT_GATE16 = 6
    TRAP_GATE16 = 7
    TSS_AVAILABLE = 9
    TSS_BUSY = 11
    CALL_GATE = 12
    INTERRUPT_GATE = 14
    TRAP_GATE = 15


CODE: Final = 8
CODE_CONFORMING: Final = 4
CODE_READABLE: Final = 2
DATA_EXPAND_DOWN: Final = 4
DATA_WRITABLE: Final = 2
ACCESSED: Final = 1


class SegmentRegister(IntEnum):
    """The segment registers in the order that instructions encode them."""

    ES = 0
    CS = 1
    SS = 2
    DS = 3
    FS = 4
    GS = 5


SELECTOR_RPL: Final = 3
SELECTOR_LDT: Final = 4


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment register with its hidden part; `limit` in bytes, `attributes` as in the VMCB."""

    selector: int
    base: int
    limit: int
    attributes: int

    @property
    def access_rights(self) -> int:
        """The attributes in VMCS form."""
        return access_rights_of(self.attributes)

    @property
    def dpl(self) -> int:
        """Descriptor privilege level, 0 to 3."""
        return self.attributes >> 5 & 3

    @property
    def is_present(self) -> bool:
        """The P bit; in VMX's words, a segment that is not present is unusable."""
        return bool(self.attributes & Attributes.p)

    @property
    def is_code(self) -> bool:
        """Whether this is a code segment (S = 1 and the type's bit 3 is set)."""
        return self.attributes & 0x18 == 0x18

    def descriptor(self) -> bytes:
        """The 8 bytes that describe this segment; base bits above 31 are not in them."""
        limit = self.limit >> 12 if self.attributes & Attributes.g else self.limit
        low = (limit & 0xFFFF) | (self.base & 0xFF_FFFF) << 16
        high = (self.attributes & 0xFF) << 40 | (limit >> 16 & 0xF) << 48
        high |= (self.attributes >> 8 & 0xF) << 52 | (self.base >> 24 & 0xFF) << 56
        return (low | high).to_bytes(8, "little")

    def system_descriptor(self) -> bytes:
        """The 16 bytes that describe a TSS or an LDT in long mode."""
        return self.descriptor() + (self.base >> 32).to_bytes(8, "little")


def null_segment(selector: int = 0) -> Segment:
    """What loading a null selector leaves: nothing present."""
    return Segment(selector, 0, 0, 0)


def real_mode_segment(selector: int, *, code: bool = False) -> Segment:
    """What loading a selector in real mode leaves after reset: 64 KiB at sixteen times it."""
    return Segment(selector, selector << 4, 0xFFFF, 0x9B if code else 0x93)


def parse_descriptor(data: bytes, selector: int) -> Segment:
    """The segment that a descriptor describes: of 8 bytes, or 16 for a TSS or LDT in long mode."""
    if len(data) not in (8, 16):
        raise ValueError(f"a descriptor has 8 or 16 bytes, not {len(data)}")
    low = int.from_bytes(data[:8], "little")
    base = low >> 16 & 0xFF_FFFF | low >> 56 << 24
    if len(data) == 16:
        base |= int.from_bytes(data[8:12], "little") << 32
    attributes = low >> 40 & 0xFF | low >> 44 & 0xF00
    limit = low & 0xFFFF | low >> 32 & 0xF_0000
    if attributes & Attributes.g:
        limit = limit << 12 | 0xFFF
    return Segment(selector, base, limit, attributes)


@dataclass(frozen=True, slots=True)
class Gate:
    """A call, interrupt, trap or task gate; `ist` is 0 where the gate has none."""

    selector: int
    offset: int
    type: int
    dpl: int
    present: bool
    ist: int = 0

    def descriptor(self, *, long_mode: bool = True) -> bytes:
        """The gate's bytes: 16 in long mode, 8 outside."""
        low = self.offset & 0xFFFF | self.selector << 16
        low |= (self.type | self.dpl << 5 | self.present << 7) << 40 | self.ist << 32
        low |= (self.offset >> 16 & 0xFFFF) << 48
        tail = (self.offset >> 32).to_bytes(8, "little") if long_mode else b""
        return low.to_bytes(8, "little") + tail


def parse_gate(data: bytes) -> Gate:
    """The gate in 16 bytes of a long-mode IDT, or in 8 bytes of any other table."""
    if len(data) not in (8, 16):
        raise ValueError(f"a gate has 8 or 16 bytes, not {len(data)}")
    low = int.from_bytes(data[:8], "little")
    offset = low & 0xFFFF | low >> 32 & 0xFFFF_0000
    ist = 0
    if len(data) == 16:
        offset |= int.from_bytes(data[8:12], "little") << 32
        ist = low >> 32 & 7
    return Gate(
        selector=low >> 16 & 0xFFFF,
        offset=offset,
        type=low >> 40 & 0xF,
        dpl=low >> 45 & 3,
        present=bool(low >> 47 & 1),
        ist=ist,
    )


@dataclass(frozen=True, slots=True)
class TssField:
    """One field of a task-state segment: byte offset and width in bytes."""

    offset: int
    width: int


def _row(names: str, offset: int, width: int, step: int) -> dict[str, TssField]:
    """Fields `names`, each `width` bytes wide, `step` bytes apart."""
    return {name: TssField(offset + i * step, width) for i, name in enumerate(names.split())}


# SDM 3A "Task Management in 64-bit Mode"
TSS64: Final[dict[str, TssField]] = {
    **_row("rsp0 rsp1 rsp2", 4, 8, 8),
    **_row("ist1 ist2 ist3 ist4 ist5 ist6 ist7", 36, 8, 8),
    "io_map_base": TssField(102, 2),
}
TSS64_LIMIT: Final = 103

# SDM 3A "Task-State Segment (TSS)"
TSS32: Final[dict[str, TssField]] = {
    "link": TssField(0, 2),
    **_row("esp0 esp1 esp2", 4, 4, 8),
    **_row("ss0 ss1 ss2", 8, 2, 8),
    **_row("cr3 eip eflags eax ecx edx ebx esp ebp esi edi", 28, 4, 4),
    **_row("es cs ss ds fs gs ldt", 72, 2, 4),
    "trap": TssField(100, 2),
    "io_map_base": TssField(102, 2),
    "ssp": TssField(104, 4),
}
TSS32_LIMIT: Final = 103

# SDM 3A "16-Bit Task-State Segment (TSS)"
TSS16: Final[dict[str, TssField]] = {
    "link": TssField(0, 2),
    **_row("sp0 sp1 sp2", 2, 2, 4),
    **_row("ss0 ss1 ss2", 4, 2, 4),
    **_row("ip flags ax cx dx bx sp bp si di es cs ss ds ldt", 14, 2, 2),
}
TSS16_LIMIT: Final = 43
