"""The permission maps: which MSR and which port a guest may touch without an exit.

APM 2 "MSR Intercepts" (MSRPM, 8 KiB, two bits per MSR) and "I/O Permissions Map" (IOPM, 12 KiB,
one bit per port).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

IOPM_SIZE: Final = 0x3000
MSRPM_SIZE: Final = 0x2000

# First MSR of each covered range and the byte offset of its vector, table "MSR Ranges Covered by
# MSRPM"; a range has 2000h MSRs, a vector 800h bytes, and the fourth vector is reserved.
MSR_RANGES: Final = ((0x0000_0000, 0x0000), (0xC000_0000, 0x0800), (0xC001_0000, 0x1000))
MSRS_PER_RANGE: Final = 0x2000


def msr_bit(msr: int) -> int | None:
    """The bit of the MSRPM that intercepts reads of `msr`; the next one intercepts writes.

    None where the map does not cover `msr`: with MSR_PROT set every access to it exits.
    """
    for first, offset in MSR_RANGES:
        if first <= msr < first + MSRS_PER_RANGE:
            return offset * 8 + (msr - first) * 2
    return None


def is_msr_intercepted(msrpm: Sequence[int], msr: int, write: bool) -> bool:
    """Whether the 8 KiB of `msrpm` make RDMSR or WRMSR of `msr` exit."""
    bit = msr_bit(msr)
    if bit is None:
        return True
    return bool(msrpm[bit >> 3] >> ((bit & 7) + write) & 1)


def is_port_intercepted(iopm: Sequence[int], port: int, size: int) -> bool:
    """Whether the 12 KiB of `iopm` make an access of `size` bytes at `port` exit.

    Every byte counts; the map goes on behind port FFFFh for an access that starts below it.
    """
    byte = port >> 3
    bits = iopm[byte] | iopm[byte + 1] << 8
    return bool(bits >> (port & 7) & ((1 << size) - 1))
