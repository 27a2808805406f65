"""The smallest witness: a static program that every level runs, and what its output says.

It needs no library and no device: CPUID is not privileged, and its cost tells whether it exits.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from importlib.resources import files
from statistics import median
from typing import Any, Final

from undervisor.guest.asm import assemble
from undervisor.guest.elf_writer import write_elf
from undervisor.guest.placement import Segment

SAMPLES: Final = 500
"""How many times CPUID is timed, and a plain instruction."""
PATH: Final = "/lab/probe"

# One program header after the ELF header: the program's bytes begin here in the file, and Linux
# maps pages, so they must begin at the same place in a page of memory.
_ORIGIN: Final = 0x400000 + 128
_LINE: Final = 17
_LEAVES: Final = 3
_HYPERVISOR_PRESENT: Final = 1 << 31


def program() -> bytes:
    """The executable."""
    source = files("undervisor.lab").joinpath("probe.S").read_text()
    code = assemble(source, _ORIGIN, {"SAMPLES": SAMPLES})
    room = len(code) + _LINE * (4 * _LEAVES + 2 * SAMPLES)
    segment = Segment(_ORIGIN, code.bytes, room)
    return write_elf([segment], code.labels["start"], bits=64)


@dataclass(frozen=True, slots=True)
class Testimony:
    """What the processor says: CPUID.1:ECX bit 31, the leaves 40000000H and 40000001H, and the
    median ticks of CPUID and of a plain instruction."""

    hypervisor_present: bool
    signature: str
    features: int
    cpuid_ticks: int
    plain_ticks: int

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {name: getattr(self, name) for name in self.__slots__}


def parse(text: str) -> Testimony:
    """What the program printed; ValueError where that is something else."""
    numbers = [int(line, 16) for line in text.split()]
    if len(numbers) != 4 * _LEAVES + 2 * SAMPLES:
        raise ValueError(f"{len(numbers)} numbers, not {4 * _LEAVES + 2 * SAMPLES}")
    leaves, ticks = numbers[: 4 * _LEAVES], numbers[4 * _LEAVES :]
    present = bool(leaves[2] & _HYPERVISOR_PRESENT)
    words = struct.pack("<3I", *leaves[5:8])
    return Testimony(
        present,
        words.decode("ascii", "replace").rstrip("\0") if present else "",
        leaves[8] if present else 0,
        int(median(ticks[:SAMPLES])),
        int(median(ticks[SAMPLES:])),
    )
