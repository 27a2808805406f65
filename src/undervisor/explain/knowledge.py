"""Meanings that are not in the manuals: KVM's error codes, a PC's memory map."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Suberror:
    """A KVM_EXIT_INTERNAL_ERROR code ("KVM internal error. Suberror: N")."""

    name: str
    meaning: str
    remedy: str


SUBERRORS: dict[int, Suberror] = {
    1: Suberror(
        "KVM_INTERNAL_ERROR_EMULATION",
        "KVM had to execute an instruction of the guest in software and could not: it decodes to "
        "nothing, KVM does not emulate it, or its bytes could not be fetched",
        "look at the bytes at RIP: if they are not code, the guest jumped astray, and the question "
        "is who set RIP; if they are code, KVM had to emulate because the access went to MMIO or "
        "because the guest state can't be entered without unrestricted guest",
    ),
    2: Suberror(
        "KVM_INTERNAL_ERROR_SIMUL_EX",
        "a fault that KVM must handle came up while it delivered another event",
        "make the guest's IDT, GDT, TSS and stack lie in RAM, not in MMIO or a hole",
    ),
    3: Suberror(
        "KVM_INTERNAL_ERROR_DELIVERY_EV",
        "a VM exit that KVM does not expect there interrupted the delivery of an event",
        "make the guest's IDT, GDT, TSS and stack lie in RAM: delivering an event through MMIO "
        "is not emulated",
    ),
    4: Suberror(
        "KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON",
        "the processor reported an exit reason that KVM has no handler for",
        "if KVM runs nested, its own hypervisor gave an exit that L1 did not ask for: look there",
    ),
    5: Suberror(
        "KVM_INTERNAL_ERROR_NO_EVENT_WINDOW (proposed, never in a release)",
        "no event could be delivered for too long",
        "",
    ),
}


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
