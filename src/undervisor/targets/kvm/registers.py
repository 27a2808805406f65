"""A processor's registers as KVM passes them: what they are at the start, and in words."""

from __future__ import annotations

import struct
from typing import Final

from undervisor.arch.kvm import (
    CONTROLS,
    CONTROLS_ORDER,
    REGS,
    REGS_ORDER,
    SEGMENT,
    SREGS_SEGMENTS,
    SREGS_TABLES,
    TABLE,
)
from undervisor.arch.x86.boot import BootMode, BootState
from undervisor.arch.x86.registers import Cr0

TABLES_AT: Final = SEGMENT.size * len(SREGS_SEGMENTS)
CONTROLS_AT: Final = TABLES_AT + TABLE.size * len(SREGS_TABLES)
CODE, DATA = 0xB, 0x3
"""Segment types: execute/read and read/write, accessed."""
REAL_LIMIT, FLAT_LIMIT = 0xFFFF, 0xFFFFFFFF
FIRMWARE_MSRS: Final = {0x2FF: 0xC06}
"""What firmware has set when an image starts. IA32_MTRR_DEF_TYPE: memory is write-back."""

General = dict[str, int]


def general(raw: bytes) -> General:
    """The general-purpose registers, RIP and RFLAGS of a `kvm_regs`."""
    return dict(zip(REGS_ORDER, REGS.unpack(raw), strict=True))


def packed(registers: General) -> bytes:
    """A `kvm_regs`; what is not named is zero."""
    return REGS.pack(*(registers.get(name, 0) for name in REGS_ORDER))


def controls(special: bytes | bytearray) -> dict[str, int]:
    """The control registers, EFER and IA32_APIC_BASE of a `kvm_sregs`."""
    values = CONTROLS.unpack_from(special, CONTROLS_AT)
    return dict(zip(CONTROLS_ORDER, values, strict=True))


def boot_general(boot: BootState) -> General:
    """What a boot protocol puts into the general-purpose registers."""
    names = ("eax", "ebx", "ecx", "edx", "esi", "edi", "ebp", "esp")
    values = {f"r{name[1:]}": getattr(boot, name) for name in names}
    return values | {"rip": boot.eip, "rflags": 2}


def boot_special(boot: BootState, reset: bytes) -> bytes:
    """The special registers at an image's start, from those after reset."""
    special = bytearray(reset)
    protected = boot.mode is BootMode.PROTECTED32
    for place, name in enumerate(SREGS_SEGMENTS[:6]):
        code = name == "cs"
        selector = boot.cs if code else boot.data if protected else 0
        base = 0 if protected or not code else boot.cs << 4
        limit = FLAT_LIMIT if protected else REAL_LIMIT
        rights = (CODE if code else DATA, 1, 0, protected, 1, 0, protected, 0, 0, 0)
        SEGMENT.pack_into(special, place * SEGMENT.size, base, limit, selector, *rights)
    if boot.gdt:
        TABLE.pack_into(special, TABLES_AT, *boot.gdt)
    cr0 = controls(special)["cr0"] & ~(Cr0.pe | Cr0.pg) | (Cr0.pe if protected else 0)
    struct.pack_into("<Q", special, CONTROLS_AT, cr0)
    return bytes(special)


def in_words(raw: bytes, special: bytes) -> str:
    """Registers as QEMU prints them, so that `undervisor explain` reads them."""
    values = general(raw)
    names = [name.upper().ljust(3) for name in REGS_ORDER[:16]]
    cells = [f"{n}={v:016x}" for n, v in zip(names, list(values.values())[:16], strict=True)]
    lines = [" ".join(cells[at : at + 4]) for at in range(0, 16, 4)]
    lines.append(f"RIP={values['rip']:016x} RFL={values['rflags']:08x}")
    for place, name in enumerate(SREGS_SEGMENTS):
        base, limit, selector, *rest = SEGMENT.unpack_from(special, place * SEGMENT.size)
        kind, present, dpl, db, s, long, g, avl, _, _ = rest
        flags = kind | s << 4 | dpl << 5 | present << 7
        flags |= avl << 12 | long << 13 | db << 14 | g << 15
        lines.append(
            f"{name.upper()[:3].ljust(3)}={selector:04x} {base:016x} {limit:08x} {flags << 8:08x}"
        )
    for place, name in enumerate(SREGS_TABLES):
        base, limit = TABLE.unpack_from(special, TABLES_AT + place * TABLE.size)
        lines.append(f"{name.upper()}=     {base:016x} {limit:08x}")
    control = controls(special)
    lines.append(
        f"CR0={control['cr0']:08x} CR2={control['cr2']:016x} CR3={control['cr3']:016x} "
        f"CR4={control['cr4']:08x}"
    )
    lines.append(f"EFER={control['efer']:016x}")
    return "\n".join(lines)
