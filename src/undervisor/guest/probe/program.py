"""The probe's program: one bare-metal image for every machine, assembled from the text beside.

It starts by Multiboot, by PVH or from a disk, goes to 64-bit mode with the first 4 GiB mapped
identically, says hello on COM1 and then answers requests (`protocol`).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

from undervisor.guest.asm import Code, assemble
from undervisor.guest.elf_writer import note, write_elf
from undervisor.guest.placement import Segment
from undervisor.guest.probe.protocol import (
    BURST,
    MOST_REQUEST,
    MOST_RESPONSE,
    SYNC,
    Kind,
    Status,
)
from undervisor.guest.pvh import NOTE_OWNER, PHYS32_ENTRY

SOURCES = ("boot.S", "faults.S", "serial.S", "interpreter.S", "ap.S", "library.S")
BASE = 0x100000
BLOCKS = 0x200000
"""Where the processors' blocks begin."""
BLOCK_SIZE = 0x20000
MOST_PROCESSORS = 16
FREE = 0x400000
"""The first address that the probe does not use: memory for tests, up to the end of RAM."""
USER = FREE
USER_SIZE = 2 << 20
"""2 MiB from `FREE` are mapped for CPL 3 as well."""
LEAST_RAM = 16 << 20

CODE64, DATA, CODE32, USER_CODE64, USER_DATA, USER_CODE32, TSS = (
    0x08, 0x10, 0x18, 0x23, 0x2B, 0x33, 0x38,
)  # fmt: skip
"""Segment selectors of every processor's GDT."""
GDT_LIMIT = 9 * 8 - 1
PAGE_TABLES = 0x180000
"""CR3: a PML4 table that maps 4 GiB identically by 2 MiB pages."""
IDT = 0x186000
IDT_LIMIT = 256 * 16 - 1


@dataclass(frozen=True, slots=True)
class Block:
    """Where a processor's structures are; what VMX host-state fields must name."""

    number: int

    @property
    def base(self) -> int:
        """The block's first byte."""
        return BLOCKS + BLOCK_SIZE * self.number

    @property
    def gdt(self) -> int:
        """GDTR base."""
        return self.base + 0x180

    @property
    def tss(self) -> int:
        """TR base."""
        return self.base + 0x200

    @property
    def counts(self) -> int:
        """256 32-bit counters: how often each vector came that is counted, not reported."""
        return self.base + 0x400

    @property
    def resume(self) -> int:
        """256 bits: the vectors that are counted; at first NMI and all from 32."""
        return self.base + 0x40


@dataclass(frozen=True, slots=True)
class Program:
    """The assembled probe: an ELF image, and where its routines are."""

    elf: bytes
    code: Code
    build: int

    def routine(self, name: str) -> int:
        """The address of the library's routine `name`."""
        return self.code.labels[f"do_{name}"]


@lru_cache(maxsize=1)
def program() -> Program:
    """The probe."""
    folder = files(__package__)
    source = "\n".join(folder.joinpath(name).read_text() for name in SOURCES)
    build = zlib.adler32(source.encode())
    symbols = {f"KIND_{kind.name}": int(kind) for kind in Kind}
    symbols |= {f"STATUS_{status.name}": int(status) for status in Status}
    symbols |= {"BUILD": build, "SYNC": SYNC, "BLOCKS": BLOCKS, "USER": USER}
    symbols |= {"BURST": BURST, "REQUEST_MOST": MOST_REQUEST, "RESPONSE_MOST": MOST_RESPONSE}
    code = assemble(source, BASE, symbols | {"MAX_CPUS": MOST_PROCESSORS})
    start = code.labels["start"]
    entry = note(NOTE_OWNER, PHYS32_ENTRY, start.to_bytes(4, "little"))
    return Program(write_elf([Segment(BASE, code.bytes, FREE - BASE)], start, entry), code, build)
