"""Small images for the tests, assembled from text."""

import struct

from undervisor.guest.asm import assemble
from undervisor.guest.elf_writer import note, write_elf
from undervisor.guest.placement import Segment

BASE = 0x100000

# Sends eax, ebx and 64 KiB of low memory from 8000h, then `tail` bytes from `BASE`, over COM1.
DUMP = """
.code32
header: .long 0x1badb002, FLAGS, -(0x1badb002 + FLAGS)
    .long header, header, end, end + 0x1234, start  # heeded where bit 16 of FLAGS is set
start:
    mov %eax, regs
    mov %ebx, regs + 4
    mov $stack, %esp
    mov $regs, %esi
    mov $8, %ecx
    call send
    mov $0x8000, %esi
    mov $0x8000, %ecx
    call send
    mov $header, %esi
    mov $tail, %ecx
    call send
    mov $0xf4, %dx
    mov $0, %eax
    out %eax, %dx
1:  hlt
    jmp 1b
send:
    mov $0x3fd, %dx
1:  in %dx, %al
    test $0x20, %al
    jz 1b
    mov $0x3f8, %dx
    outsb
    loop send
    ret
.balign 8
regs: .quad 0
.fill 256, 1, 0
stack:
end:
"""

HALT = ".code32\nheader: .long 0x1badb002, 3, -(0x1badb002 + 3)\nstart: hlt; jmp start"


def multiboot_elf(source=HALT, bss=0x100, bits=32, notes=b"", **symbols):
    code = assemble(source, BASE, {"FLAGS": 3} | symbols)
    segment = Segment(BASE, code.bytes, len(code) + bss)
    return write_elf([segment], code.labels["start"], notes, bits)


def dump_flat(tail):
    """`DUMP` as a flat file whose Multiboot header says where it belongs."""
    return assemble(DUMP, BASE, {"FLAGS": 1 << 16 | 3, "tail": tail}).bytes + b"not loaded"


def pvh_elf(bits=64, width=4, entry=BASE):
    value = entry.to_bytes(width, "little")
    segment = Segment(BASE, b"\xf4\xeb\xfd\x90", 0x2000)
    return write_elf([segment], BASE, note(b"Xen\0", 18, value), bits)


def multiboot_flat(load=BASE, load_end=None, bss_end=None, entry=None, header=None):
    """A flat file with Multiboot address fields; arguments replace the right ones."""
    end = load + 48 if load_end is None else load_end
    fields = [header or load, load, end, load + 0x1000 if bss_end is None else bss_end]
    flags = 1 << 16 | 3
    words = [0x1BADB002, flags, -(0x1BADB002 + flags) % (1 << 32), *fields, entry or load + 32]
    return struct.pack("<8I", *words) + b"\xf4" * 16
