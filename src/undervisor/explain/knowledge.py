"""Meanings that are not in the manuals: a PC's memory map."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """A range of a PC's physical addresses and what code is doing there."""

    start: int
    end: int
    name: str
    meaning: str


PLACES: tuple[Place, ...] = (
    Place(
        0, 0x400, "the real-mode interrupt vector table", "a call or jump through a null pointer"
    ),
    Place(
        0xA_0000,
        0xC_0000,
        "the video hole (A0000H-BFFFFH)",
        "there is no RAM there, but the display adapter's memory-mapped window: reads give FFH, "
        "and an instruction fetch makes KVM emulate, which fails. Code never lives there: the "
        "processor was sent to a wrong address, or ran on from below A0000H, or the page tables "
        "map the code's address wrongly",
    ),
    Place(
        0xC_0000,
        0xE_0000,
        "the option ROMs (C0000H-DFFFFH)",
        "there is code only where a device has an option ROM",
    ),
    Place(0xFEC0_0000, 0xFEC0_1000, "the I/O APIC", "code can't run from device registers"),
    Place(0xFEE0_0000, 0xFEE0_1000, "the local APIC", "code can't run from device registers"),
    Place(
        0xC000_0000,
        0xFFC0_0000,
        "the PCI hole below 4 GiB",
        "there are device registers, not RAM, unless the page tables map the address elsewhere",
    ),
)


def place_of(address: int) -> Place | None:
    """The special place that holds `address`, if it is in one."""
    return next((place for place in PLACES if place.start <= address < place.end), None)
