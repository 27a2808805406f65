"""A ROM in place of a BIOS: the processor's reset leads straight into an image.

For machines that take a ROM and can fill their RAM before they start.  The ROM of 64 KiB ends at
4 GiB, and a PC shows it below 1 MiB, too, where it runs.  It zeroes what is to be zero and enters
the image with exactly the registers of its boot state.  Nothing else of a PC's firmware is there:
no services, no tables, devices as after power-up.  A reset does not start the image a second time:
it asks for the end of the run by the word "Shutdown" at port 8900H, and halts where nobody hears.
"""

from __future__ import annotations

from undervisor.arch.x86.boot import BootMode
from undervisor.errors import BadInput
from undervisor.guest.asm import assemble
from undervisor.guest.placement import FLAT_CODE, FLAT_DATA, Placement

SIZE = 0x10000
WHERE = 0xF0000
RESET = 0xFFF0
"""Where the processor begins, in the ROM. SDM 3A, "First Instruction Executed"."""
JUMP = bytes.fromhex("ea000000f0")
"""JMP F000:0000, the same ROM below 1 MiB."""

SOURCE = """
.code16
    cli
    cld
    mov $MARK_AT, %al               # the CMOS RAM, which no reset clears and no image uses
    out %al, $0x70
    in $0x71, %al
    cmp $MARK, %al
    je again
    mov $MARK, %al
    out %al, $0x71
    lgdtl %cs:(gdtr - rom)
    mov %cr0, %eax
    or $1, %al
    mov %eax, %cr0
    ljmpl $0x08, $flat
again:
    mov $(word - rom), %si
    mov $8, %cx
    mov $0x8900, %dx
    rep outsb %cs:(%si), %dx
1:  hlt
    jmp 1b
word:   .ascii "Shutdown"
.code32
flat:
    mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %fs
    mov %eax, %gs
    mov %eax, %ss
    in $0x92, %al                   # A20
    or $2, %al
    and $0xfe, %al
    out %al, $0x92
    mov $rows, %ebp
1:  cmp $rows_end, %ebp
    je enter
    mov (%ebp), %edi
    mov 4(%ebp), %ecx
    xor %eax, %eax
    mov %ecx, %edx
    shr $2, %ecx
    rep stosl
    mov %edx, %ecx
    and $3, %ecx
    rep stosb
    add $8, %ebp
    jmp 1b

.balign 8
gdt:    .quad 0, FLAT_CODE, FLAT_DATA, REAL_CODE, REAL_DATA
gdtr:   .word gdtr - gdt - 1
        .long gdt
enter:
"""

REGISTERS = """
    mov $EAX, %eax
    mov $EBX, %ebx
    mov $ECX, %ecx
    mov $EDX, %edx
    mov $ESI, %esi
    mov $EDI, %edi
    mov $EBP, %ebp
    mov $ESP, %esp
"""

ENTER = {
    BootMode.PROTECTED32: """
    lgdt boot_gdtr
    mov $DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %fs
    mov %eax, %gs
    mov %eax, %ss
"""
    + REGISTERS
    + """
    ljmp $CS, $EIP
boot_gdtr: .word GDT_LIMIT
    .long GDT_BASE
""",
    # SDM 3A, "Switching Back to Real-Address Mode"
    BootMode.REAL: """
    ljmp $0x18, $(1f - rom)
.code16
1:  mov $0x20, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %fs
    mov %eax, %gs
    mov %eax, %ss
    mov %cr0, %eax
    and $0xfe, %al
    mov %eax, %cr0
    ljmp $(ROM >> 4), $(2f - rom)
2:  lidtl %cs:(vectors - rom)
    xor %ax, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %fs
    mov %ax, %gs
    mov %ax, %ss
"""
    + REGISTERS
    + """
    ljmp $CS, $EIP
vectors: .word 0x3ff
    .long 0
""",
}
REAL_CODE, REAL_DATA = 0x00009B000000FFFF | WHERE << 16, 0x000093000000FFFF
"""16-bit segments of 64 KiB: the ROM, and the first data."""


def boot_rom(placement: Placement) -> bytes:
    """The ROM that starts what is placed; the machine has put the pieces into its RAM."""
    boot = placement.boot
    registers = ("eax", "ebx", "ecx", "edx", "esi", "edi", "ebp", "esp", "eip", "cs", "data")
    symbols = {name.upper(): getattr(boot, name) for name in registers}
    symbols |= {"FLAT_CODE": FLAT_CODE, "FLAT_DATA": FLAT_DATA, "ROM": WHERE}
    symbols |= {"MARK_AT": 0x7E, "MARK": 0x5A}
    symbols |= {"REAL_CODE": REAL_CODE, "REAL_DATA": REAL_DATA}
    base, limit = boot.gdt or (None, 23)
    symbols["GDT_LIMIT"] = limit
    source = f"rom:\n{SOURCE}{ENTER[boot.mode]}.set GDT_BASE, {'gdt' if base is None else base}\n"
    source += ".balign 4\nrows:\n"
    source += "".join(f".long {gpa}, {size}\n" for gpa, size in placement.clear) + "rows_end:\n"
    code = assemble(source, WHERE, symbols).bytes
    if len(code) > RESET:
        raise BadInput(
            f"the image has {len(placement.clear)} areas to clear, more than fit in a boot ROM",
            hint="link it with fewer segments",
        )
    return (code.ljust(RESET, b"\0") + JUMP).ljust(SIZE, b"\0")
