"""The program that measures a level, and what its output says."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from importlib.resources import files
from typing import Final

from undervisor.guest.asm import assemble
from undervisor.guest.elf_writer import write_elf
from undervisor.guest.placement import Segment

BLOCK: Final = 64 << 10
"""Bytes that one iteration reads, copies or sends."""
BUFFER: Final = 32 << 20
"""Bytes of memory that are gone through; the program takes twice as many."""
MOST_SAMPLES: Final = 64

# One program header after the ELF header: the program's bytes begin here in the file, and Linux
# maps pages, so they must begin at the same place in a page of memory.
_ORIGIN: Final = 0x400000 + 128
_LINE: Final = 17 * 4
_ABOUT, _SAMPLE, _TOTAL = 4, 3, 1
_HYPERVISOR_PRESENT: Final = 1 << 31


def program() -> bytes:
    """The executable: static, for any x86-64 Linux since 2.6.27."""
    source = files("undervisor.lab.levels").joinpath("program.S").read_text()
    code = assemble(source, _ORIGIN, {"BLOCK": BLOCK, "BUFFER": BUFFER})
    segment = Segment(_ORIGIN, code.bytes, len(code) + _LINE * (MOST_SAMPLES + 2))
    return write_elf([segment], code.labels["start"], bits=64)


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of the program said.

    `samples`: nanoseconds of an iteration, by the measure's place; `failed`: error numbers, by
    place; `seconds` is how long it took by the clock of that level.
    """

    signature: str
    samples: dict[int, tuple[float, ...]]
    failed: dict[int, int]
    seconds: float


def parse(text: str) -> Run:
    """What the program printed; ValueError where that is something else."""
    lines = [[int(word, 16) for word in line.split()] for line in text.splitlines()]
    lengths = [len(line) for line in lines]
    if len(lines) < 2 or lengths != [_ABOUT, *[_SAMPLE] * (len(lines) - 2), _TOTAL]:
        raise ValueError(f"lines of {lengths} numbers")
    samples: dict[int, tuple[float, ...]] = {}
    failed = {}
    for place, iterations, result in lines[1:-1]:
        if iterations:
            samples[place] = (*samples.get(place, ()), result / iterations)
        else:
            failed[place] = result
    return Run(_signature(lines[0]), samples, failed, lines[-1][0] / 1e9)


def _signature(about: list[int]) -> str:
    """The name of what is below; empty where the processor says that nothing is."""
    if not about[0] & _HYPERVISOR_PRESENT:
        return ""
    return struct.pack("<3I", *about[1:]).decode("ascii", "replace").rstrip("\0 ")
