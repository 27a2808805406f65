"""The ROM in place of a BIOS, on QEMU: RAM that is not clear, every register, a reset."""

import struct

import pytest
from guest_machines import needs_qemu, qemu, read_all

from undervisor.arch.x86.boot import BootMode, BootState
from undervisor.errors import BadInput
from undervisor.guest.asm import assemble
from undervisor.guest.placement import Placement, flat_gdt
from undervisor.guest.rom import SIZE, boot_rom

BASE, DIRTY, CLEAN = 0x20000, 0x300000, 0x1003
NAMES = ("eax", "ebx", "ecx", "edx", "esi", "edi", "ebp", "esp")
VALUES = {name: 0x12340 * number + 0x7C000 for number, name in enumerate(NAMES, 1)}

SEND = """
    jmp 9f
send:
1:  mov $0x3fd, %dx
    in %dx, %al
    test $0x20, %al
    jz 1b
    mov $0x3f8, %dx
    outsb
    loop send
    ret
9:
"""
TELL = {
    BootMode.PROTECTED32: f"""
    pushal
    mov %esp, %esi; mov $32, %ecx; call send
    mov ${DIRTY - 1}, %esi; mov ${CLEAN + 2}, %ecx; call send
    lea -64(%esp), %esi; sgdtl (%esi); mov $6, %ecx; call send
    """,
    BootMode.REAL: """
    pushal
    push %cs
    mov %sp, %si; mov $34, %cx; call send
    """,
}
WIDTH = {BootMode.PROTECTED32: ".code32\n", BootMode.REAL: ".code16\n"}
END = "mov $0xf4, %dx; out %al, %dx"


def sent(boot):
    """What the code in `TELL` sends on a machine whose RAM is full of ones where it matters."""
    code = assemble(WIDTH[boot.mode] + SEND + TELL[boot.mode] + END).bytes
    rom = boot_rom(Placement(((BASE, code),), ((DIRTY, CLEAN),), boot))
    files = {"rom": rom, "code": code, "ones": b"\xff" * (CLEAN + 2), "gdt": flat_gdt()}
    options = ["-bios", "rom", "-device", "isa-debug-exit,iobase=0xf4,iosize=4"]
    for name, where in (("code", BASE), ("ones", DIRTY - 1), ("gdt", 0x30000)):
        options += ["-device", f"loader,file={name},addr={where:#x},force-raw=on"]
    with qemu(options, files) as running:
        return read_all(running)


pytestmark = [pytest.mark.qemu, needs_qemu]


def test_protected_mode_begins_with_the_boot_states_registers_and_clear_memory():
    boot = BootState(BootMode.PROTECTED32, BASE, gdt=(0x30000, 23), **VALUES)
    data = sent(boot)
    assert struct.unpack("<8I", data[:32])[::-1] == pushed()
    assert data[32 : 32 + CLEAN + 2] == b"\xff" + bytes(CLEAN) + b"\xff"
    assert struct.unpack("<HI", data[-6:]) == (23, 0x30000)


def test_without_a_table_of_the_images_own_the_roms_is_loaded():
    data = sent(BootState(BootMode.PROTECTED32, BASE, **VALUES))
    limit, base = struct.unpack("<HI", data[-6:])
    assert limit == 23
    assert 0xF0000 <= base < 0x100000


def test_real_mode_begins_with_the_boot_states_registers():
    small = {name: value & 0xFFFF if name == "esp" else value for name, value in VALUES.items()}
    data = sent(BootState(BootMode.REAL, 0, cs=BASE >> 4, **small))
    assert struct.unpack("<H8I", data)[:0:-1] == pushed(small)
    assert data[:2] == struct.pack("<H", BASE >> 4)


def pushed(values=VALUES):
    """The order of PUSHAD."""
    order = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")
    return tuple(values[name] for name in order)


def test_it_is_64_kib_and_refuses_more_than_fits():
    boot = BootState(BootMode.PROTECTED32, BASE)
    assert len(boot_rom(Placement((), (), boot))) == SIZE
    with pytest.raises(BadInput, match="9000 areas"):
        boot_rom(Placement((), ((DIRTY, 1),) * 9000, boot))
