"""Flat binaries: bytes at an address, started there; no header says so, the user does."""

from __future__ import annotations

from undervisor.arch.x86.boot import BootMode, BootState
from undervisor.errors import BadInput
from undervisor.guest.placement import Builder, Kernel, Machine, Placement, Segment, flat_gdt

GDT = 0x500
"""The first bytes that neither interrupt vectors nor BIOS data take on a PC."""
STACK = 0x7C00
SEGMENT_REACH = 0x10000
REAL_END = 0x100000


def kernel(data: bytes, name: str, address: int, entry: int | None = None) -> Kernel:
    """`data` to be put at `address` and started at `entry`, its first byte if None."""
    if not data:
        raise BadInput(f"{name}: an empty file cannot be started")
    return Kernel(name, (Segment(address, data, len(data)),), address if entry is None else entry)


def place_real(kernel: Kernel, machine: Machine) -> Placement:
    """Started in real-address mode; CS is the entry's 64 KiB-aligned segment."""
    _refuse_extras(kernel, machine)
    builder = Builder(kernel.name, machine.memory)
    builder.load(kernel)
    if kernel.entry >= REAL_END:
        raise BadInput(
            f"{kernel.name}: the entry {kernel.entry:#x} is beyond real-address mode's 1 MiB",
            hint="start it in 32-bit mode, or lower",
        )
    cs = (kernel.entry & -SEGMENT_REACH) >> 4
    offset = kernel.entry % SEGMENT_REACH
    return builder.done(BootState(BootMode.REAL, offset, cs=cs, data=0, esp=STACK))


def place_protected(kernel: Kernel, machine: Machine) -> Placement:
    """Started in flat 32-bit protected mode."""
    _refuse_extras(kernel, machine)
    builder = Builder(kernel.name, machine.memory)
    builder.load(kernel)
    builder.put("boot information", GDT, flat_gdt())
    gdt = (GDT, len(flat_gdt()) - 1)
    return builder.done(BootState(BootMode.PROTECTED32, kernel.entry, esp=STACK, gdt=gdt))


def _refuse_extras(kernel: Kernel, machine: Machine) -> None:
    """A flat binary has no way to learn of them: better said than dropped."""
    if machine.append or machine.modules:
        raise BadInput(
            f"{kernel.name}: a raw image takes neither a command line nor modules",
            hint="leave out --append and --module, or give the image a Multiboot header",
        )
