"""Disks that boot like a PC: the same placement on a BIOS disk or an El Torito ISO.

For machines that have a BIOS and no `-kernel`.  The first 2 KiB of the medium hold a loader that
reads the pieces through INT 13H, zeroes what is to be zero and enters the image with exactly the
registers of its boot state.
"""

from __future__ import annotations

import io
import struct

import pycdlib

from undervisor.arch.x86.boot import BootMode
from undervisor.errors import BadInput
from undervisor.guest.asm import Code, assemble
from undervisor.guest.placement import Placement, flat_gdt

LOADER = 0x7C00
LOADER_BYTES = 2048
BUFFER = 0x10000
BUFFER_BYTES = 0x8000
TAKEN = ((0, LOADER + LOADER_BYTES), (BUFFER, BUFFER + BUFFER_BYTES))
"""Interrupt vectors, BIOS data, stack and loader; the loader's buffer."""
ZEROS = 0xFFFFFFFF
"""In place of a sector: nothing to read, the row is to be cleared."""

DISK_SECTOR, CD_SECTOR = 512, 2048
CYLINDER = 16 * 63 * DISK_SECTOR
"""Disks end on a whole cylinder: emulators derive a geometry from the size."""

SOURCE = """
.code16
loader:
    jmp begin
    .org 8
information:                        # El Torito boot information table
    .long 0
    .long 0                         # first sector of this file on a CD; 0 on a disk
    .fill 48, 1, 0
begin:
    ljmp $0, $here
here:
    cli
    xor %ax, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    mov $loader, %sp
    sti
    cld
    mov %dl, drive
    cmpw $512, sector_size
    jne whole
    movl $1, lba                    # the rest of this loader
    movw $3, count
    movl $(loader + 512), buffer    # segment 0
    call read
whole:
    mov $0x2401, %ax                # A20, by the BIOS and by hand
    int $0x15
    in $0x92, %al
    or $2, %al
    and $0xfe, %al
    out %al, $0x92
    jmp load

read:                               # `count` sectors from `lba` to `buffer`
    mov $0x42, %ah
    mov drive, %dl
    mov $packet, %si
    int $0x13
    jc failed
    ret
failed:
    mov $words, %si
1:  mov $0x3fd, %dx
    in %dx, %al
    test $0x20, %al
    jz 1b
    mov $0x3f8, %dx
    lodsb
    out %al, %dx
    test %al, %al
    jnz 1b
2:  hlt
    jmp 2b

words:  .asciz "loader: INT 13H cannot read the disk\\r\\n"
drive:  .byte 0
sector_size: .word SECTOR
.balign 4
packet: .byte 16, 0
count:  .word 0
buffer: .long 0                     # offset, segment
lba:    .quad 0
    .org 510
    .byte 0x55, 0xaa

load:
    mov $rows, %bp
next_row:
    cmp $rows_end, %bp
    je enter
    mov (%bp), %edi                 # where
    mov 4(%bp), %ecx                # bytes
    mov 8(%bp), %eax                # sector in the file, or ZEROS
    add $12, %bp
    cmp $ZEROS, %eax
    je clear
    add information + 4, %eax
    mov %eax, lba
next_chunk:
    test %ecx, %ecx
    jz next_row
    movw $CHUNK, count
    movl $(BUFFER << 12), buffer
    push %ecx
    push %edi
    push %bp
    call read
    pop %bp
    pop %edi
    pop %ecx
    call reach
    mov $BUFFER, %esi
    mov $(CHUNK * SECTOR), %edx
    cmp %edx, %ecx
    jae 1f
    mov %ecx, %edx
1:  sub %edx, %ecx
    xchg %ecx, %edx
    rep movsb (%esi), %es:(%edi)
    mov %edx, %ecx
    addl $CHUNK, lba
    sti
    jmp next_chunk
clear:
    call reach
    xor %eax, %eax
    mov %ecx, %edx
    shr $2, %ecx
    rep stosl %eax, %es:(%edi)
    mov %edx, %ecx
    and $3, %ecx
    rep stosb %al, %es:(%edi)
    sti
    jmp next_row

reach:                              # DS and ES reach 4 GiB; interrupts off
    cli
    lgdt gdtr
    mov %cr0, %eax
    or $1, %al
    mov %eax, %cr0
    mov $0x10, %bx
    mov %bx, %ds
    mov %bx, %es
    and $0xfe, %al
    mov %eax, %cr0
    xor %bx, %bx
    mov %bx, %ds
    mov %bx, %es
    ret

.balign 8
gdt:    .quad 0, FLAT_CODE, FLAT_DATA
gdtr:   .word 23
        .long gdt
"""

ENTER = {
    BootMode.PROTECTED32: """
enter:
    cli
    lgdtl boot_gdtr
    mov %cr0, %eax
    or $1, %al
    mov %eax, %cr0
    ljmpl $CS, $protected
boot_gdtr: .word GDT_LIMIT
    .long GDT_BASE
.code32
protected:
    mov $DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %fs
    mov %eax, %gs
    mov %eax, %ss
    mov $EAX, %eax
    mov $EBX, %ebx
    mov $ECX, %ecx
    mov $EDX, %edx
    mov $ESI, %esi
    mov $EDI, %edi
    mov $EBP, %ebp
    mov $ESP, %esp
    jmp *target
.balign 4
target: .long EIP
""",
    BootMode.REAL: """
enter:
    cli
    mov $EAX, %eax
    mov $EBX, %ebx
    mov $ECX, %ecx
    mov $EDX, %edx
    mov $ESI, %esi
    mov $EDI, %edi
    mov $EBP, %ebp
    mov $ESP, %esp
    ljmp $CS, $EIP
""",
}


def disk_image(placement: Placement) -> bytes:
    """A hard disk image, no partitions, whole cylinders."""
    loader, body = _medium(placement, DISK_SECTOR)
    data = loader + body
    return data.ljust(-(-len(data) // CYLINDER) * CYLINDER, b"\0")


def iso_image(placement: Placement, label: str = "UNDERVISOR") -> bytes:
    """An ISO 9660 image with a no-emulation El Torito boot entry."""
    loader, body = _medium(placement, CD_SECTOR)
    iso, out = pycdlib.PyCdlib(), io.BytesIO()
    iso.new(interchange_level=1, vol_ident=label)
    iso.add_fp(io.BytesIO(loader + body), len(loader + body), "/BOOT.IMG;1")
    iso.add_eltorito(
        "/BOOT.IMG;1",
        bootcatfile="/BOOT.CAT;1",
        boot_load_size=LOADER_BYTES // DISK_SECTOR,
        boot_info_table=True,
    )
    iso.write_fp(out)
    iso.close()
    return out.getvalue()


def _medium(placement: Placement, sector: int) -> tuple[bytes, bytes]:
    """The loader's 2 KiB and, from the sector after it, the pieces."""
    rows, body = [], b""
    chunk = BUFFER_BYTES
    for gpa, data in sorted(placement.pieces):
        _refuse_overlap(gpa, len(data))
        rows.append((gpa, len(data), (LOADER_BYTES + len(body)) // sector))
        body += data.ljust(-(-len(data) // sector) * sector, b"\0")
    for gpa, size in placement.clear:
        _refuse_overlap(gpa, size)
        rows.append((gpa, size, ZEROS))
    loader = _loader(placement, rows, sector)
    if len(loader) > LOADER_BYTES:
        raise BadInput(
            f"the image has {len(rows)} pieces, more than fit in a boot loader of 2 KiB",
            hint="link it with fewer segments",
        )
    # Reads are whole chunks: the last one must find something to read.
    return loader.bytes.ljust(LOADER_BYTES, b"\0"), body + bytes(chunk)


def _loader(placement: Placement, rows: list[tuple[int, int, int]], sector: int) -> Code:
    boot = placement.boot
    registers = ("eax", "ebx", "ecx", "edx", "esi", "edi", "ebp", "esp", "eip", "cs", "data")
    symbols = {name.upper(): getattr(boot, name) for name in registers}
    code, data = struct.unpack("<2Q", flat_gdt()[8:])
    symbols |= {
        "SECTOR": sector,
        "CHUNK": BUFFER_BYTES // sector,
        "BUFFER": BUFFER,
        "ZEROS": ZEROS,
        "FLAT_CODE": code,
        "FLAT_DATA": data,
    }
    source = SOURCE + ENTER[boot.mode]
    base, limit = boot.gdt or (None, 23)
    symbols["GDT_LIMIT"] = limit
    source += f".set GDT_BASE, {'gdt' if base is None else base}\n.balign 4\nrows:\n"
    source += "".join(f".long {gpa}, {size}, {at}\n" for gpa, size, at in rows)
    return assemble(source + "rows_end:\n", LOADER, symbols)


def _refuse_overlap(gpa: int, size: int) -> None:
    for start, end in TAKEN:
        if gpa < end and start < gpa + size:
            raise BadInput(
                f"{gpa:#x}-{gpa + size:#x} of the image overlaps the boot loader's memory at "
                f"{start:#x}-{end:#x}",
                hint="load the image at 0x100000 or above",
            )
