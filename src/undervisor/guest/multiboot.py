"""Multiboot 1: recognise an image and start it as `qemu-system-x86_64 -kernel` does.

Multiboot Specification 0.6.96, "OS image format" and "Boot information format".  Where the
specification leaves a choice (addresses, the order of things in memory, the command line with the
image's name first), it is made as QEMU makes it, since that is what images are tested with.
"""

from __future__ import annotations

import struct

from undervisor.arch.x86.boot import HIGH_RAM, BootMode, BootState, MemoryMap
from undervisor.errors import BadInput
from undervisor.guest.elf import is_elf, parse_elf
from undervisor.guest.placement import (
    Builder,
    Kernel,
    Machine,
    Placement,
    Segment,
    aligned,
    flat_gdt,
    text,
)

HEADER_MAGIC = 0x1BADB002
BOOT_MAGIC = 0x2BADB002
SEARCH = 8192
"""Bytes at the start of the file that hold the header, wholly, 4-byte aligned."""
HEADER_BYTES = 48
HAS_ADDRESSES = 1 << 16

TABLES = 0x9000
"""Where QEMU puts them too: the memory map, the information 500H and a GDT 600H above."""
INFORMATION, GDT, TABLES_SIZE = 0x500, 0x600, 0x620
STACK = 0x9000
"""No protocol promises a stack; images that use one before they set their own find RAM below."""
LOADER_NAME = "undervisor"
BOOT_DEVICE = 0x8000FFFF
"""First hard disk, no partition."""

MEMORY, DEVICE, COMMAND_LINE, MODULES, MEMORY_MAP, LOADER = (1 << bit for bit in (0, 1, 2, 3, 6, 9))


def find_header(data: bytes) -> int | None:
    """The file offset of the Multiboot header, None where there is none."""
    for at in range(0, min(SEARCH - HEADER_BYTES, len(data) - 11), 4):
        magic, flags, checksum = struct.unpack_from("<3I", data, at)
        if magic == HEADER_MAGIC and (magic + flags + checksum) % (1 << 32) == 0:
            return at
    return None


def recognise(data: bytes, name: str) -> Kernel | None:
    """The kernel of a Multiboot image; None where it is something else, BadInput if it lies.

    Images that are ELF64 are taken as well, which QEMU leaves to PVH or refuses.
    """
    at = find_header(data)
    if at is None:
        return None
    (flags,) = struct.unpack_from("<I", data, at + 4)
    if flags & HAS_ADDRESSES:
        return _by_addresses(data, name, at)
    if not is_elf(data):
        raise BadInput(
            f"{name}: a Multiboot header at {at:#x} without load addresses in a file that is not "
            "ELF",
            hint="set bit 16 of its flags and the address fields, or link an ELF file",
        )
    elf = parse_elf(data, name)
    return Kernel(name, elf.segments, elf.entry)


def _by_addresses(data: bytes, name: str, at: int) -> Kernel:
    """The header's address fields. "The address fields of Multiboot header"."""
    if len(data) < at + 32:
        raise BadInput(f"{name}: the Multiboot header at {at:#x} is truncated")
    header, load, load_end, bss_end, entry = struct.unpack_from("<5I", data, at + 12)
    offset = at - (header - load)
    if header < load or offset < 0:
        raise BadInput(
            f"{name}: Multiboot header_addr {header:#x} and load_addr {load:#x} do not fit a "
            f"header at {at:#x} in the file"
        )
    size = load_end - load if load_end else len(data) - offset
    if size <= 0 or offset + size > len(data):
        raise BadInput(
            f"{name}: Multiboot load_end_addr {load_end:#x} is not within the file's "
            f"{len(data) - offset:#x} bytes from load_addr {load:#x}",
            hint="the file is truncated or its header lies",
        )
    if bss_end and bss_end < load + size:
        raise BadInput(
            f"{name}: Multiboot bss_end_addr {bss_end:#x} is below the loaded end {load + size:#x}"
        )
    whole = bss_end - load if bss_end else size
    return Kernel(name, (Segment(load, data[offset : offset + size], whole),), entry)


def place(kernel: Kernel, machine: Machine) -> Placement:
    """The kernel, the boot information and the modules in memory, and the registers."""
    builder = Builder(kernel.name, machine.memory)
    builder.load(kernel)
    block = aligned(kernel.end)
    words = [module.words for module in machine.modules]
    strings = [*words, f"{kernel.name} {machine.append}", LOADER_NAME]
    at, addresses = block + 16 * len(machine.modules), []
    for string in strings:
        addresses.append(at)
        at += len(text(string))
    table, where = [], aligned(at)
    for module, address in zip(machine.modules, addresses, strict=False):
        end = where + len(module.data)
        table.append(struct.pack("<4I", *(v & 0xFFFFFFFF for v in (where, end, address)), 0))
        builder.put(f"module {module.name}", where, module.data)
        where = aligned(end)
    builder.put("boot information", block, b"".join(table) + b"".join(map(text, strings)))
    tables = builder.low_room(TABLES, TABLES_SIZE)
    information = _information(machine, tables, block, addresses[-2], addresses[-1])
    builder.put("boot information", tables, information)
    return builder.done(
        BootState(
            BootMode.PROTECTED32,
            kernel.entry,
            eax=BOOT_MAGIC,
            ebx=tables + INFORMATION,
            esp=STACK,
            gdt=(tables + GDT, len(flat_gdt()) - 1),
        )
    )


def _information(machine: Machine, at: int, modules: int, cmdline: int, loader: int) -> bytes:
    """The memory map, the information structure and the GDT, for the address `at`."""
    memory_map = b"".join(
        struct.pack("<IQQI", 20, part.start, part.size, part.kind) for part in machine.memory.ranges
    )
    lower, upper = _lower_and_upper(machine.memory)
    information = struct.pack(
        "<7I16x2I12xI20x",
        MEMORY | DEVICE | COMMAND_LINE | MODULES | MEMORY_MAP | LOADER,
        lower,
        upper,
        BOOT_DEVICE,
        cmdline,
        len(machine.modules),
        modules,
        len(memory_map),
        at,
        loader,
    )
    if len(memory_map) > INFORMATION:
        raise ValueError(f"{len(machine.memory.ranges)} ranges are too many for a memory map")
    return memory_map.ljust(INFORMATION, b"\0") + information.ljust(0x100, b"\0") + flat_gdt()


def _lower_and_upper(memory: MemoryMap) -> tuple[int, int]:
    """mem_lower and mem_upper: KiB of RAM from 0, and from 1 MiB up to the first hole."""
    sizes = {part.start: part.size >> 10 for part in memory.ram}
    return min(sizes.get(0, 0), 640), sizes.get(HIGH_RAM, 0)
