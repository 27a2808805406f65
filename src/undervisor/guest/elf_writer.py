"""Writes the small ELF executables that hold assembled guest programs."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from undervisor.guest.elf import MAGIC
from undervisor.guest.placement import Segment, aligned

ET_EXEC = 2
PT_LOAD, PT_NOTE = 1, 4
RWX = 7
EM_386, EM_X86_64 = 3, 62
DATA_ALIGN = 16


def note(owner: bytes, kind: int, value: bytes) -> bytes:
    """One note: `owner` with its NUL, both fields padded to 4 bytes. gABI, "Note Section"."""
    fields = (part.ljust(aligned(len(part), 4), b"\0") for part in (owner, value))
    return struct.pack("<3I", len(owner), len(value), kind) + b"".join(fields)


def write_elf(segments: Sequence[Segment], entry: int, notes: bytes = b"", bits: int = 32) -> bytes:
    """An executable of `segments`, each both readable, writable and executable."""
    wide = bits == 64
    header_size, row_size = (64, 56) if wide else (52, 32)
    parts = [(PT_LOAD, s.gpa, s.data, s.size) for s in segments]
    if notes:
        parts.append((PT_NOTE, 0, notes, len(notes)))
    at = aligned(header_size + row_size * len(parts), DATA_ALIGN)
    rows, body = b"", b""
    for kind, gpa, data, size in parts:
        place = at + len(body)
        if wide:
            rows += struct.pack("<2I6Q", kind, RWX, place, gpa, gpa, len(data), size, 4)
        else:
            rows += struct.pack("<8I", kind, place, gpa, gpa, len(data), size, RWX, 4)
        body += data.ljust(aligned(len(data), DATA_ALIGN), b"\0")
    header = struct.pack(
        f"<4s5B7x2HI{'3Q' if wide else '3I'}I6H",
        MAGIC,
        2 if wide else 1,
        1,
        1,
        0,
        0,
        ET_EXEC,
        EM_X86_64 if wide else EM_386,
        1,
        entry,
        header_size,
        0,
        0,
        header_size,
        row_size,
        len(parts),
        0,
        0,
        0,
    )
    return (header + rows).ljust(at, b"\0") + body
