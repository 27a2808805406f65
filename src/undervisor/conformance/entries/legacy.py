"""Code that runs outside IA-32e mode: what a 64-bit hypervisor cannot be asked to do.

The probe calls it in 64-bit mode; it leaves long mode, runs 32-bit code with or without PAE paging,
and comes back.  SDM 3A "Switching Out of IA-32e Mode Operation".
"""

from __future__ import annotations

from typing import Final

from undervisor.arch.x86.msr import Msr
from undervisor.guest.asm import assemble
from undervisor.guest.probe.program import CODE32, CODE64, DATA, PAGE_TABLES

RESULTS: Final = 0xE00
"""Where in the code's page eight 64-bit results are, for the code to use."""
_SAVED: Final = 0xF00
_SYMBOLS: Final = {
    "CODE32": CODE32,
    "CODE64": CODE64,
    "DATA": DATA,
    "PAGE_TABLES": PAGE_TABLES,
    "EFER": int(Msr.EFER),
}
_SOURCE: Final = """
.code64
    mov %rsp, SAVED
    push $CODE32
    push $outside
    lretq
.code32
outside:
    mov $DATA, %eax
    mov %eax, %ss
    mov %eax, %ds
    mov %eax, %es
    mov %cr0, %eax
    and $0x7fffffff, %eax
    mov %eax, %cr0
    mov $EFER, %ecx
    rdmsr
    and $~0x100, %eax
    wrmsr
    {paging_on}
    {body}
    mov %cr0, %eax
    and $0x7fffffff, %eax
    mov %eax, %cr0
    mov $PAGE_TABLES, %eax
    mov %eax, %cr3
    mov $EFER, %ecx
    rdmsr
    or $0x100, %eax
    wrmsr
    mov %cr0, %eax
    or $0x80000000, %eax
    mov %eax, %cr0
    ljmp $CODE64, $inside
.code64
inside:
    mov SAVED, %rsp
    ret
"""
_PAGING_ON: Final = """
    mov $PAE, %eax
    mov %eax, %cr3
    mov %cr0, %eax
    or $0x80000000, %eax
    mov %eax, %cr0
"""


def outside_long_mode(body: str, page: int, pae: int = 0, **symbols: int) -> bytes:
    """32-bit `body` as a routine for the page at `page`; with PAE paging if `pae` is its tables.

    `RESULTS` and `symbols` are symbols of the body.  It may use every register.
    """
    source = _SOURCE.format(paging_on=_PAGING_ON if pae else "", body=body)
    names = _SYMBOLS | {"PAE": pae, "SAVED": page + _SAVED, "RESULTS": page + RESULTS}
    code = assemble(source, page, names | symbols).bytes
    assert len(code) <= RESULTS, "the code ends before its results"
    return code
