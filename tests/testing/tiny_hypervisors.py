"""Hypervisors of a few instructions, for what a suite of somebody's own looks like."""

from undervisor.guest.asm import assemble
from undervisor.guest.elf_writer import write_elf
from undervisor.guest.placement import Segment

BASE = 0x100000
_HEADER = ".code32\n.long 0x1badb002, 3, -(0x1badb002 + 3)\nstart:\n"
_PRINT = "mov $0x3f8, %dx; mov $text, %esi; 1: lodsb; out %al, %dx; test %al, %al; jnz 1b;"
_END = "mov $0xf4, %dx; mov $3, %al; out %al, %dx\n"

# EFER.SVME, VM_HSAVE_PA, and a VMCB that is all zero
_VMRUN_OF_NOTHING = """
    mov $0xc0000080, %ecx; rdmsr; or $0x1000, %eax; wrmsr
    mov $0xc0010117, %ecx; mov $0x200000, %eax; xor %edx, %edx; wrmsr
    mov $0x201000, %eax; vmrun %eax
"""
# IA32_FEATURE_CONTROL, CR4.VMXE, CR0.NE, paging by a 4-MiB page; then a VMLAUNCH without a VMCS
_VMLAUNCH_OF_NOTHING = """
    mov $0x3a, %ecx; rdmsr; test $1, %al; jnz 2f; or $5, %eax; wrmsr
2:  mov %cr4, %eax; or $0x2010, %eax; mov %eax, %cr4
    movl $0x83, 0x202000; mov $0x202000, %eax; mov %eax, %cr3
    mov %cr0, %eax; or $0x80000021, %eax; mov %eax, %cr0
    mov $0x480, %ecx; rdmsr; and $0x7fffffff, %eax; mov %eax, 0x200000
    vmxon region; vmlaunch
"""
BODIES = {
    "says": _PRINT + _END,
    "svm": _VMRUN_OF_NOTHING + _END,
    "vmx": _VMLAUNCH_OF_NOTHING + _END,
    "dies": _PRINT + "lidt none; ud2\n",
    "hangs": _PRINT + "3: jmp 3b\n",
    "waits": _PRINT + "cli; 3: hlt; jmp 3b\n",
    "floods": "mov $0x3f8, %dx; mov $65, %al; 3: out %al, %dx; jmp 3b\n",
}
_DATA = 'text: .asciz "hello"\nnone: .word 0; .long 0\nregion: .quad 0x200000\n'


def hypervisor(name):
    """The ELF image of one of `BODIES`."""
    code = assemble(_HEADER + BODIES[name] + _DATA, BASE)
    return write_elf([Segment(BASE, code.bytes, len(code))], code.labels["start"])
