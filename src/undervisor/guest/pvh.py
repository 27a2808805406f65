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

START_INFO = 0x9000
GDT = 0x9040
TABLES = 0x9080
STACK = 0x9000
START_MAGIC = 0x336EC578
MODULE_BYTES = 32
LOW_RAM = 0x80000
"""The tables and command lines stay below; their sum is bounded by that."""


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
    ranges = machine.memory.ranges
    memory_map = b"".join(
        struct.pack("<QQII", part.start, part.size, part.kind, 0) for part in ranges
    )
    strings = [text(machine.append), *(text(module.cmdline) for module in machine.modules)]
    modules_at = TABLES + len(memory_map)
    strings_at = modules_at + MODULE_BYTES * len(machine.modules)
    if strings_at + total(strings) > LOW_RAM:
        raise BadInput(f"{kernel.name}: {total(strings)} bytes of command lines are too many")
    rows = []
    for number, module in enumerate(machine.modules):
        gpa = builder.put_high(f"module {module.name}", module.data)
        cmdline = strings_at + total(strings[: number + 1])
        rows.append(struct.pack("<4Q", gpa, len(module.data), cmdline, 0))
    start_info = struct.pack(
        "<4I4Q2I",
        START_MAGIC,
        1,
        0,
        len(rows),
        modules_at if rows else 0,
        strings_at,
        machine.rsdp,
        TABLES,
        len(ranges),
        0,
    )
    builder.put("boot information", START_INFO, start_info)
    builder.put("boot information", GDT, flat_gdt())
    builder.put("boot information", TABLES, memory_map + b"".join(rows) + b"".join(strings))
    gdt = (GDT, len(flat_gdt()) - 1)
    return builder.done(
        BootState(BootMode.PROTECTED32, kernel.entry, ebx=START_INFO, esp=STACK, gdt=gdt)
    )
