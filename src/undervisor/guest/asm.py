"""An assembler from text: `assemble(source, origin) -> Code`; no compiler, no linker, no files.

    code = assemble("start: mov $1, %eax; hlt; jmp start", origin=0x100000)
    code.bytes, code.labels["start"]

The text is what GNU `as` and LLVM understand: AT&T syntax, or Intel syntax after
`.intel_syntax noprefix`; 64-bit code unless `.code16`, `.code32` or `.code64` says otherwise; all
VMX and SVM instructions.  Everything goes to one section and is linked at `origin`.
"""

from __future__ import annotations

import builtins
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from elftools.elf.elffile import ELFFile
from elftools.elf.relocation import RelocationSection
from elftools.elf.sections import Section, SymbolTableSection

from undervisor.errors import BadInput
from undervisor.guest.asm_process import Assembler, AssemblerFailed

SHF_ALLOC = 2


class AsmError(BadInput):
    """A source that cannot be assembled; the message names the line and shows it."""


@dataclass(frozen=True, slots=True)
class Code:
    """Machine code to be put at the address `origin`.

    `labels` holds every label as its address, and every `.set` symbol as its value.
    """

    bytes: builtins.bytes
    labels: Mapping[str, int]
    origin: int = 0

    def __len__(self) -> int:
        return len(self.bytes)

    @property
    def end(self) -> int:
        """The address after the last byte."""
        return self.origin + len(self.bytes)


def assemble(source: str, origin: int = 0, symbols: Mapping[str, int] | None = None) -> Code:
    """The machine code of `source`, linked at the address `origin`.

    `symbols` are constants that the source may use by name.  AsmError where the source has an
    error, refers to something that is not there, or a value does not fit its place.
    The same arguments are assembled once in a process.
    """
    return _assemble(source, origin, tuple((symbols or {}).items()))


@lru_cache(maxsize=4096)
def _assemble(source: str, origin: int, symbols: tuple[tuple[str, int], ...]) -> Code:
    # One line before the source, so that LLVM's line numbers are off by exactly one.
    prologue = "; ".join(f".set {name}, {value:#x}" for name, value in symbols)
    try:
        elf = _assembler.run(f"{prologue}\n{source}\n")
    except AssemblerFailed as failure:
        raise AsmError(_explain(str(failure))) from None
    return _link(ELFFile(io.BytesIO(elf)), origin)


_assembler = Assembler()


def _explain(complaint: str) -> str:
    """LLVM's first error as `line N: what: the line`; whatever else it said, as it is."""
    found = re.search(r"<inline asm>:(\d+):\d+: (?:error: )?(.*)\n(.*)", complaint)
    if not found:
        last = complaint.strip().splitlines()[-1:] or ["no reason given"]
        return f"the assembler failed: {last[0]}"
    line, what, text = found.groups()
    return f"line {int(line) - 1}: {what}: {text.strip()}"


def _link(elf: ELFFile, origin: int) -> Code:
    """The one section of an object, its relocations applied for `origin`."""
    text, index = elf.get_section_by_name(".text"), elf.get_section_index(".text")
    table = elf.get_section_by_name(".symtab")
    assert text is not None
    assert index is not None
    assert isinstance(table, SymbolTableSection)
    stray = [s.name for s in elf.iter_sections() if s["sh_flags"] & SHF_ALLOC and _is_stray(s)]
    if stray:
        raise AsmError(f"code or data in the section {stray[0]}: everything goes to .text")
    data = bytearray(text.data())
    for section in elf.iter_sections():
        if isinstance(section, RelocationSection) and section["sh_info"] == index:
            for relocation in section.iter_relocations():
                _relocate(data, relocation.entry, table, index, origin)
    return Code(bytes(data), _labels(table, index, origin), origin)


def _is_stray(section: Section) -> bool:
    return section.name != ".text" and section["sh_size"] > 0


def _labels(table: SymbolTableSection, text: int, origin: int) -> dict[str, int]:
    labels = {}
    for symbol in table.iter_symbols():
        if symbol.name and symbol["st_info"]["type"] not in ("STT_FILE", "STT_SECTION"):
            if symbol["st_shndx"] == text:
                labels[symbol.name] = origin + symbol["st_value"]
            elif symbol["st_shndx"] == "SHN_ABS":
                labels[symbol.name] = symbol["st_value"]
    return labels


# x86-64 psABI, "Relocation Types": type -> (bytes, relative to the place, signed)
RELOCATIONS = {
    1: (8, False, False),  # R_X86_64_64
    2: (4, True, True),  # R_X86_64_PC32
    4: (4, True, True),  # R_X86_64_PLT32
    10: (4, False, False),  # R_X86_64_32
    11: (4, False, True),  # R_X86_64_32S
    12: (2, False, False),  # R_X86_64_16
    13: (2, True, True),  # R_X86_64_PC16
    14: (1, False, False),  # R_X86_64_8
    15: (1, True, True),  # R_X86_64_PC8
    24: (8, True, True),  # R_X86_64_PC64
}


def _relocate(
    data: bytearray, entry: Mapping[str, int], table: SymbolTableSection, text: int, origin: int
) -> None:
    """Apply one relocation: symbol + addend, less the place where it is relative to that."""
    symbol = table.get_symbol(entry["r_info_sym"])
    offset, kind = entry["r_offset"], entry["r_info_type"]
    absolute = symbol["st_shndx"] == "SHN_ABS" or entry["r_info_sym"] == 0
    if symbol["st_shndx"] != text and not absolute:
        raise AsmError(f"the symbol {symbol.name!r} is used but not defined")
    if kind not in RELOCATIONS:
        raise AsmError(f"relocation type {kind} at offset {offset:#x} is not one that is linked")
    size, relative, signed = RELOCATIONS[kind]
    base = 0 if absolute else origin
    value = base + symbol["st_value"] + entry["r_addend"] - (origin + offset if relative else 0)
    bits = 8 * size
    low, high = (-(1 << (bits - 1)), 1 << (bits - 1)) if signed else (0, 1 << bits)
    # In 16-bit code a jump wraps within its segment: LLVM says so by PC16 and so do we not check.
    if not low <= value < high and kind != 13:
        name = symbol.name or "a label"
        raise AsmError(f"{name} = {value:#x} does not fit in {bits} bits at offset {offset:#x}")
    data[offset : offset + size] = (value % (1 << bits)).to_bytes(size, "little")
