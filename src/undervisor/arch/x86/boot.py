"""What a machine promises the first program: the memory map and the registers at its start."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum

from undervisor.errors import BadInput

PAGE = 0x1000
LOW_RAM_END = 0x9FC00
"""End of the RAM below the extended BIOS data area, 639 KiB: what INT 12h says on a PC."""
HIGH_RAM = 0x100000
"""Above the video memory and the BIOS, A0000H-FFFFFH."""
DEVICE_HOLE = 0xC0000000
"""PCI, I/O APIC, local APIC and flash from here to 4 GiB; the rest of the RAM is above."""
FOUR_GIB = 1 << 32
LEAST_RAM = 1 << 20


class MemoryKind(IntEnum):
    """Address range types. ACPI, "Address Range Types" (INT 15H, E820H)."""

    RAM = 1
    RESERVED = 2
    ACPI_RECLAIM = 3
    ACPI_NVS = 4
    BAD = 5


@dataclass(frozen=True, slots=True)
class Range:
    """Guest-physical addresses `start` to `end`, exclusive, and what they are."""

    start: int
    end: int
    kind: MemoryKind

    @property
    def size(self) -> int:
        """Bytes in the range."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class MemoryMap:
    """The machine's memory map as firmware reports it: ranges in ascending order, none overlaps."""

    ranges: tuple[Range, ...]

    def __post_init__(self) -> None:
        end = 0
        for part in self.ranges:
            if part.start < end or part.end <= part.start:
                raise ValueError(f"memory map: {part} is empty or begins before {end:#x}")
            end = part.end

    @classmethod
    def pc(cls, ram_size: int) -> MemoryMap:
        """The map of a PC with `ram_size` bytes; what does not fit below 3 GiB goes above 4 GiB.

        BadInput where the size is no whole number of pages or less than 1 MiB.
        """
        if ram_size < LEAST_RAM or ram_size % PAGE:
            raise BadInput(
                f"{ram_size} bytes of memory cannot make a PC",
                hint="at least 1 MiB, in whole pages of 4 KiB",
            )
        ranges = [
            Range(0, LOW_RAM_END, MemoryKind.RAM),
            Range(LOW_RAM_END, HIGH_RAM, MemoryKind.RESERVED),
        ]
        if ram_size > HIGH_RAM:
            ranges.append(Range(HIGH_RAM, min(ram_size, DEVICE_HOLE), MemoryKind.RAM))
        ranges.append(Range(0xFEC00000, FOUR_GIB, MemoryKind.RESERVED))
        if ram_size > DEVICE_HOLE:
            ranges.append(Range(FOUR_GIB, FOUR_GIB + ram_size - DEVICE_HOLE, MemoryKind.RAM))
        return cls(tuple(ranges))

    @property
    def ram(self) -> tuple[Range, ...]:
        """The ranges of RAM."""
        return tuple(part for part in self.ranges if part.kind is MemoryKind.RAM)

    def is_ram(self, start: int, end: int) -> bool:
        """Whether all of `start` to `end`, exclusive, is in one range of RAM."""
        return any(part.start <= start <= end <= part.end for part in self.ram)


class BootMode(Enum):
    """The operating mode at the image's first instruction."""

    REAL = "real-address mode"
    PROTECTED32 = "protected mode, flat 32-bit segments, paging off"


@dataclass(frozen=True, slots=True)
class BootState:
    """The registers that a boot protocol defines; every other one is zero or as after reset.

    REAL: CS is `cs` with base `cs << 4`, all other segments are zero with base 0 and limit FFFFH,
    `eip` is the offset within CS.
    PROTECTED32: CS, DS, ES, FS, GS and SS have base 0, limit FFFFFFFFH and 32-bit defaults, with
    the selectors `cs` and `data`; CR0.PE = 1, CR0.PG = 0, RFLAGS.IF = 0, A20 enabled.
    `gdt` is (base, limit) of a descriptor table that the loader placed and GDTR refers to.
    """

    mode: BootMode
    eip: int
    cs: int = 0x08
    data: int = 0x10
    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0
    esi: int = 0
    edi: int = 0
    ebp: int = 0
    esp: int = 0
    gdt: tuple[int, int] | None = None
