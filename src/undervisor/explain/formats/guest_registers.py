"""What a dump of a guest's registers shows by itself: where RIP is, what bytes are there."""

from __future__ import annotations

import re
from collections.abc import Callable

from undervisor.arch.x86.registers import Cr0, Efer
from undervisor.explain.dump import Dump, Observation
from undervisor.explain.knowledge import place_of

Segments = dict[str, tuple[int, int, int, int]]
"""Selector, base, limit and flags (the descriptor's upper word) of each segment register."""

_CODE = re.compile(r"Code=((?:<?[0-9a-fA-F?]{2}>?\s*){1,80})")


def in_long_mode(registers: dict[str, int], segments: Segments) -> bool | None:
    """Whether the guest is in long mode; None where the dump does not tell."""
    if "EFER" in registers:
        return bool(registers["EFER"] & Efer.lma)
    return True if "CS" in segments and segments["CS"][3] >> 21 & 1 else None


def look_at_registers(text: str, dump: Dump, registers: dict[str, int], segments: Segments) -> None:
    """Add what the registers and the bytes at RIP show."""
    rip = registers.get("RIP")
    if rip is None:
        return
    base = 0 if in_long_mode(registers, segments) else segments.get("CS", (0, 0, 0, 0))[1]
    address = rip + base & (1 << 64) - 1
    look: list[Callable[[], Observation | None]] = [
        lambda: _place(address, registers),
        lambda: _code(text, address),
        lambda: _system_management(registers),
    ]
    dump.observations += [found for found in (one() for one in look) if found is not None]
    dump.notes.append(
        f"RIP {rip:#x}, {_mode(registers, segments)}, CPL {registers.get('CPL', '?')}"
    )


def _mode(registers: dict[str, int], segments: Segments) -> str:
    cr0 = registers.get("CR0", 0)
    if not cr0 & Cr0.pe:
        return "real mode"
    if in_long_mode(registers, segments):
        return "64-bit mode" if segments.get("CS", (0,) * 4)[3] >> 21 & 1 else "compatibility mode"
    return "protected mode" + (" with paging" if cr0 & Cr0.pg else " without paging")


def _place(address: int, registers: dict[str, int]) -> Observation | None:
    place = place_of(address)
    if place is None:
        return None
    paging = bool(registers.get("CR0", 0) & Cr0.pg)
    note = "taking the page tables to map it one to one, as firmware's do" if paging else ""
    return Observation(
        "guest.rip-place",
        f"RIP {address:#x} is in {place.name}",
        place.meaning,
        "find who set RIP: an entry point in the VMCS or VMCB, a start-up IPI vector (its page is "
        "the vector times 4096), a corrupted stack or function pointer",
        (note,) if note else (),
        weight=8,
    )


def _code(text: str, address: int) -> Observation | None:
    match = _CODE.search(text)
    if match is None:
        return None
    before, _, after = match[1].partition("<")
    here = re.findall(r"[0-9a-fA-F]{2}", after)
    ahead = re.findall(r"[0-9a-fA-F]{2}", before)
    if len(here) < 4:
        return None
    if {b.lower() for b in here} == {"ff"}:
        zeros = ahead and set(ahead[-8:]) == {"00"}
        return Observation(
            "guest.code-unmapped",
            "every byte from RIP on is FFH",
            "that is what a PC gives for an address where nothing is: RIP is not in RAM"
            + (
                "; the bytes before it are 00H, which executes as ADD [RAX],AL: the guest slid "
                "through zeros to get here"
                if zeros
                else ""
            ),
            evidence=(" ".join(here[:8]),),
            weight=6,
        )
    if set(here) == {"00"}:
        return Observation(
            "guest.code-empty",
            "every byte from RIP on is 00H",
            "RAM that holds no code: the guest jumped into memory that was never loaded",
            evidence=(" ".join(here[:8]),),
            weight=6,
        )
    return None


def _system_management(registers: dict[str, int]) -> Observation | None:
    if not registers.get("SMM"):
        return None
    return Observation(
        "guest.smm",
        "the vCPU is in system-management mode",
        "entering and leaving SMM saves and loads much state by software; Linux before 6.2 lost "
        "the interrupt shadow there, which makes an entry with invalid guest state",
        "update the host's kernel; to prove the cause, run the guest with -machine smm=off",
        weight=4,
    )
