"""PVH: start an ELF image by its Xen note, as `qemu-system-x86_64 -kernel` starts a vmlinux.

Xen, "x86/HVM direct boot ABI" and `struct hvm_start_info` of xen/include/public/arch-x86/hvm.
"""

from __future__ import annotations

import struct

from undervisor.arch.x86.boot import BootMode, BootState
from undervisor.errors import BadInput
from undervisor.guest.elf import find_note, is_elf, parse_elf
from undervisor.guest.placement import (
    Builder,
    Kernel,
    Machine,
    Placement,
    flat_gdt,
    text,
    total,
)

NOTE_OWNER = b"Xen\0"
PHYS32_ENTRY = 18
"""XEN_ELFNOTE_PHYS32_ENTRY: the physical address of a 32-bit entry point."""

TABLES = 0x9000
"""hvm_start_info, then a GDT, the memory map, the module list and the command lines."""
GDT, MEMORY_MAP = 0x40, 0x80
STACK = 0x9000
START_MAGIC = 0x336EC578
MODULE_BYTES, RANGE_BYTES = 32, 24


def recognise(data: bytes, name: str) -> Kernel | None:
    """The kernel of an ELF image with a PVH entry; None where it is no ELF file or has none."""
    if not is_elf(data):
        return None
    elf = parse_elf(data, name)
    note = find_note(elf, NOTE_OWNER, PHYS32_ENTRY)
    if note is None:
        return None
    if len(note) not in (4, 8):
        raise BadInput(f"{name}: the PVH entry note holds {len(note)} bytes, not 4 or 8")
    return Kernel(name, elf.segments, int.from_bytes(note, "little"))


def place(kernel: Kernel, machine: Machine) -> Placement:
    """The kernel, hvm_start_info and the modules in memory, and the registers."""
    builder = Builder(kernel.name, machine.memory)
    builder.load(kernel)
    strings = [text(machine.append), *(text(module.cmdline) for module in machine.modules)]
    modules_at = MEMORY_MAP + RANGE_BYTES * len(machine.memory.ranges)
    strings_at = modules_at + MODULE_BYTES * len(machine.modules)
    at = builder.low_room(TABLES, strings_at + total(strings))
    rows = b""
    for number, module in enumerate(machine.modules):
        gpa = builder.put_high(f"module {module.name}", module.data)
        cmdline = at + strings_at + total(strings[: number + 1])
        rows += struct.pack("<4Q", gpa, len(module.data), cmdline, 0)
    head = _start_info(machine, at, modules_at, strings_at).ljust(GDT, b"\0") + flat_gdt()
    tables = head.ljust(MEMORY_MAP, b"\0") + _memory_map(machine) + rows + b"".join(strings)
    builder.put("boot information", at, tables)
    gdt = (at + GDT, len(flat_gdt()) - 1)
    return builder.done(BootState(BootMode.PROTECTED32, kernel.entry, ebx=at, esp=STACK, gdt=gdt))


def _start_info(machine: Machine, at: int, modules_at: int, strings_at: int) -> bytes:
    """`struct hvm_start_info` of version 1, for tables at the address `at`."""
    count = len(machine.modules)
    return struct.pack(
        "<4I4Q2I",
        START_MAGIC,
        1,
        0,
        count,
        at + modules_at if count else 0,
        at + strings_at,
        machine.rsdp,
        at + MEMORY_MAP,
        len(machine.memory.ranges),
        0,
    )


def _memory_map(machine: Machine) -> bytes:
    """An `hvm_memmap_table_entry` for each range."""
    return b"".join(
        struct.pack("<QQII", part.start, part.size, part.kind, 0) for part in machine.memory.ranges
    )
