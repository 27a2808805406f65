"""How a processor starts an image: the values that the loader's protocol promises."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


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
    `gdt` is (base, limit) of a descriptor table that the loader placed, None where the protocol
    promises none.
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
