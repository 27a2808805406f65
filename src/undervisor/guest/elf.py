"""ELF images: the segments to load, the entry point, the notes.

pyelftools knows the layouts; every offset, count and size is checked here before it is used, so
that a file may lie as it likes.  Section headers are never looked at: nothing that runs needs
them, and files without or with wrong ones start on every other loader.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from elftools.common.utils import struct_parse
from elftools.elf.structs import ELFStructs

from undervisor.errors import BadInput
from undervisor.guest.placement import Segment, aligned

MAGIC = b"\x7fELF"
CLASSES = {1: (32, 52), 2: (64, 64)}
"""e_ident[EI_CLASS]: (address width in bits, bytes of the file header)."""
MACHINES = {3: "i386", 6: "i486", 62: "x86-64"}
MOST_SEGMENTS = 512
PF_X = 1

Row = Mapping[str, Any]
"""A header as pyelftools parses it: numbers, and names where a number has one."""


@dataclass(frozen=True, slots=True)
class Elf:
    """A checked ELF image for x86.

    `segments` are the PT_LOAD entries by *physical* address; `entry` is e_entry, taken from the
    virtual to the physical address where its segment has two.  `notes` are the bytes of the
    PT_NOTE entries with their alignment.
    """

    bits: int
    machine: int
    entry: int
    segments: tuple[Segment, ...]
    notes: tuple[tuple[bytes, int], ...]


def is_elf(data: bytes) -> bool:
    """Whether `data` begins as every ELF file does."""
    return data[:4] == MAGIC


def parse_elf(data: bytes, name: str) -> Elf:
    """The ELF image in `data`; BadInput where it is none for x86, is truncated or lies."""
    structs, bits = _structs(data, name)
    header = struct_parse(structs.Elf_Ehdr, io.BytesIO(data[:64]), 0)
    rows = list(_program_headers(data, name, structs, header))
    loads = [row for row in rows if row["p_type"] == "PT_LOAD" and row["p_memsz"]]
    if not loads:
        raise BadInput(f"{name}: the ELF file has no segment to load")
    return Elf(
        bits,
        int.from_bytes(data[18:20], "little"),
        _physical(header["e_entry"], loads),
        tuple(_segment(data, name, bits, number, row) for number, row in enumerate(loads)),
        tuple(
            (_contents(data, name, "note", row), row["p_align"])
            for row in rows
            if row["p_type"] == "PT_NOTE"
        ),
    )


def _structs(data: bytes, name: str) -> tuple[ELFStructs, int]:
    """The layouts for this file's class, after its identification has been checked."""
    bits, size = CLASSES.get(data[4], (0, 0)) if len(data) >= 20 else (0, 0)
    machine = int.from_bytes(data[18:20], "little")
    if not bits or data[5] != 1:
        raise BadInput(f"{name}: neither a 32-bit nor a 64-bit little-endian ELF file")
    if len(data) < size:
        raise BadInput(f"{name}: the ELF header is truncated, {len(data)} of {size} bytes")
    if machine not in MACHINES:
        raise BadInput(f"{name}: an ELF file for machine {machine}, not for x86")
    structs = ELFStructs(little_endian=True, elfclass=bits)
    structs.create_basic_structs()
    structs.create_advanced_structs("ET_EXEC", "EM_X86_64", "ELFOSABI_SYSV")
    return structs, bits


def _program_headers(data: bytes, name: str, structs: ELFStructs, header: Row) -> Iterator[Row]:
    offset, count, size = header["e_phoff"], header["e_phnum"], header["e_phentsize"]
    if count > MOST_SEGMENTS:
        raise BadInput(
            f"{name}: {count} program headers", hint=f"at most {MOST_SEGMENTS} make sense"
        )
    if size != structs.Elf_Phdr.sizeof():
        raise BadInput(f"{name}: program headers of {size} bytes")
    if offset + count * size > len(data):
        raise BadInput(
            f"{name}: program headers at {offset:#x} go beyond the file's end at {len(data):#x}",
            hint="the file is truncated or no ELF image",
        )
    for number in range(count):
        at = offset + number * size
        yield struct_parse(structs.Elf_Phdr, io.BytesIO(data[at : at + size]), 0)


def _contents(data: bytes, name: str, what: str, row: Row) -> bytes:
    """The bytes in the file that a program header describes."""
    offset, size = row["p_offset"], row["p_filesz"]
    if offset + size > len(data):
        raise BadInput(
            f"{name}: {what} at {offset:#x}, {size:#x} bytes, goes beyond the file's end at "
            f"{len(data):#x}",
            hint="the file is truncated",
        )
    return data[offset : offset + size]


def _segment(data: bytes, name: str, bits: int, number: int, row: Row) -> Segment:
    contents = _contents(data, name, f"segment {number}", row)
    gpa, size = row["p_paddr"], row["p_memsz"]
    if len(contents) > size:
        raise BadInput(
            f"{name}: segment {number} has {len(contents):#x} bytes in the file and only "
            f"{size:#x} in memory"
        )
    if gpa + size > 1 << bits:
        raise BadInput(f"{name}: segment {number} at {gpa:#x}, {size:#x} bytes, wraps around")
    return Segment(gpa, contents, size)


def _physical(entry: int, loads: list[Row]) -> int:
    """e_entry is virtual; processors start without paging."""
    for row in loads:
        base = row["p_vaddr"]
        if row["p_flags"] & PF_X and base <= entry < base + row["p_filesz"]:
            return int(entry - base + row["p_paddr"])
    return entry


def find_note(elf: Elf, owner: bytes, kind: int) -> bytes | None:
    """The descriptor of the first note `kind` of `owner`, a name with its NUL; None if absent."""
    for data, align in elf.notes:
        # gABI, "Note Section": fields are padded to 4 bytes, in some 64-bit files to 8.
        pad, at = (8 if align == 8 else 4), 0
        while at + 12 <= len(data):
            name_size, size, this = (
                int.from_bytes(data[at + i : at + i + 4], "little") for i in (0, 4, 8)
            )
            name_at = at + 12
            value_at = at + aligned(12 + name_size, pad)
            if this == kind and data[name_at : name_at + name_size] == owner:
                return data[value_at : value_at + size]
            at = value_at + aligned(size, pad)
    return None
