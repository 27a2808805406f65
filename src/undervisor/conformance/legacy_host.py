"""An L1 that leaves IA-32e mode for a while: the way out, the way back, and tables for it.

SDM 3A "Switching Out of IA-32e Mode Operation"; APM 2 "Leaving Long Mode".
"""

from __future__ import annotations

from typing import Final

from undervisor.arch.x86.msr import Msr
from undervisor.arch.x86.registers import Cr0, Efer
from undervisor.conformance.lab import Lab
from undervisor.guest.probe.l1 import L1State

CALL: Final = "push $0x18; push %rbx; lretq"
"""Calls the routine at RBX in 32-bit code, from 64-bit code."""
BACK: Final = 0x800
"""Where behind the routine's beginning L1 is in 64-bit code again."""
LARGE: Final = 0x87
"""Present, writable, for all privileges, a large page."""
_OFF: Final = f"mov %cr0, %eax; and ${~int(Cr0.pg) & 0xFFFFFFFF:#x}, %eax; mov %eax, %cr0"
_ON: Final = f"mov %cr0, %eax; or ${int(Cr0.pg):#x}, %eax; mov %eax, %cr0"
READ_EFER: Final = f"mov ${int(Msr.EFER):#x}, %ecx; rdmsr"


def place(lab: Lab, l1: L1State, at: int, body: str, cr3: int, cr4: int, behind: str = "") -> None:
    """At `at`, a routine for `CALL`: 32-bit `body` under 32-bit paging with `cr3` and `cr4`.

    L1's code and stack are mapped identically in all its modes; `body` leaves ESP as it is.
    `behind` is 64-bit code that runs before the routine returns.
    """
    code = f"""
        .code32
        {_OFF}
        {READ_EFER}; and ${~int(Efer.lme) & 0xFFFFFFFF:#x}, %eax; wrmsr
        mov ${cr4:#x}, %eax; mov %eax, %cr4; mov ${cr3:#x}, %eax; mov %eax, %cr3
        {_ON}
        {body}
        {_OFF}
        mov ${l1.cr4:#x}, %eax; mov %eax, %cr4; mov ${l1.cr3:#x}, %eax; mov %eax, %cr3
        {READ_EFER}; or ${int(Efer.lme):#x}, %eax; wrmsr
        {_ON}
        ljmp $8, ${at + BACK}
    """
    lab.write(at, lab.assemble(code, at))
    lab.write(at + BACK, lab.assemble(f"{behind}; ret"))


def pae_tables(lab: Lab, pointers: int, directories: int) -> None:
    """Four PDPTEs and four directories of 2-MiB pages, identity, for all privileges."""
    lab.write_u64(pointers, *((directories + 0x1000 * n) | 1 for n in range(4)))
    lab.table(directories, 2048, LARGE, 1 << 21)


def two_level_tables(lab: Lab, directory: int) -> None:
    """A directory of 4-MiB pages, identity, for all privileges: two entries a quadword."""
    step = 0x800000
    lab.table(directory, 512, LARGE | (0x400000 | LARGE) << 32, step | step << 32)
