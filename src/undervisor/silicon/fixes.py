"""Repairs to the running library: each is checked against the bytes that it expects, then applied.

Two kinds.  A *redirect* makes a helper of the emulator leave the guest instead, where the
emulator has no intercept for its instruction.  The *no-execute walk* repairs `get_hphys`, which
follows a null pointer when a nested page-table entry with NX covers a page that the guest uses as
a page table.
"""

from __future__ import annotations

import ctypes
import mmap
import struct

from undervisor.errors import SiliconDied
from undervisor.silicon import library

_PAGE = mmap.PAGESIZE
_PROTECT_READ_EXECUTE = mmap.PROT_READ | mmap.PROT_EXEC

# `jmp *0(%rip)` with the address behind it, and `jmp` relative to the next instruction.
_FAR_JUMP = struct.Struct("<6sQ")
_FAR_JUMP_CODE = b"\xff\x25\x00\x00\x00\x00"
_NEAR_JUMP = struct.Struct("<Bi")
_NEAR_JUMP_CODE = 0xE9

# In `get_hphys`: "cmp $2, %r14d; je fault; andl $~PAGE_EXEC, (%rcx)", by distance from tlb_fill.
_WALK_SITE = 0x435BA2 - 0x435FE0
_WALK_BYTES = bytes.fromhex("4183fe020f84490300008321fb")
_WALK_RESUME = 0x435BAF - 0x435FE0
_WALK_FAULT = 0x435EF5 - 0x435FE0
_UNUSED_FUNCTION = "helper_bndldx64"  # MPX: no model of ours has it


def redirect(name: str, target: int) -> None:
    """Let the emulator's helper `name` jump to `target`."""
    _patch(library.address(f"helper_{name}"), _FAR_JUMP.pack(_FAR_JUMP_CODE, target))


def walk_addresses() -> tuple[int, int]:
    """Where the repaired walk goes on, and where it goes for a fault."""
    base = library.address("x86_cpu_tlb_fill")
    return base + _WALK_RESUME, base + _WALK_FAULT


def repair_no_execute_walk(target: int) -> None:
    """Let `get_hphys` jump to `target` where it would follow the null pointer."""
    site = library.address("x86_cpu_tlb_fill") + _WALK_SITE
    landing = library.address(_UNUSED_FUNCTION)
    jump = _NEAR_JUMP.pack(_NEAR_JUMP_CODE, landing - site - _NEAR_JUMP.size)
    if ctypes.string_at(site, len(_WALK_BYTES)) != _WALK_BYTES:
        raise SiliconDied(
            "the unicorn library's nested page walk is not the code that we know how to repair",
            hint="reinstall the unicorn 2.1.4 wheel for Linux x86_64",
        )
    _patch(landing, _FAR_JUMP.pack(_FAR_JUMP_CODE, target))
    _patch(site, jump)


def _patch(where: int, code: bytes) -> None:
    """Write code into the library's text."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = where & -_PAGE
    size = (where + len(code) - start + _PAGE - 1) & -_PAGE
    for protection in (_PROTECT_READ_EXECUTE | mmap.PROT_WRITE, _PROTECT_READ_EXECUTE):
        if libc.mprotect(start, size, protection):
            raise SiliconDied(
                f"the emulator's code cannot be repaired: {ctypes.get_errno()} from mprotect",
                hint="a hardened kernel forbids writing to program text; run elsewhere",
            )
        if protection & mmap.PROT_WRITE:
            ctypes.memmove(where, code, len(code))
