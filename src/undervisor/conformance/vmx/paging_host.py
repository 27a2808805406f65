"""Hosts outside IA-32e mode: L1 enters L2 from 32-bit modes, and gets its own mode back."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.registers import DR7_FIXED_ONE, RFLAGS_FIXED_ONE, Cr4, Efer
from undervisor.conformance import legacy_host
from undervisor.conformance.expect import Broken, each, equal
from undervisor.conformance.places import CS32
from undervisor.conformance.suite import guest_test
from undervisor.conformance.vmx import entry_modes
from undervisor.conformance.vmx.lab import EXIT_FIELDS, SAVED, Changes, VmxLab

HOST_STATE: Final = "SDM: Loading Host State"
LANDED: Final = 0x400
"""Where behind the routine's beginning host RIP is."""
LONG: Final = int(Efer.lme | Efer.lma)
NOWHERE: Final = 0xFFFFFFFF
"""What the routine leaves in a result that it did not get to."""


@dataclass(frozen=True, slots=True)
class Host:
    """L1 behind the exit, and fields of the VMCS."""

    cr0: int
    cr3: int
    cr4: int
    efer: int
    esp: int
    eflags: int
    dr7: int
    cs: int
    fields: dict[int, int | None]


def from_legacy_mode(lab: VmxLab, begin: Changes, cr3: int, cr4: int) -> Host:
    """VMLAUNCH by an L1 that has left IA-32e mode for 32-bit paging with `cr3` and `cr4`.

    CR0.PG cannot be cleared in VMX operation, so the way leads out of it and in again, on both
    sides.  L1's code and stack are mapped identically in all its modes.
    """
    places = lab.places
    at, results, stack = places.free + 0xF0000, places.free + 0xF1000, places.free + 0xF2000
    cr4 |= int(Cr4.vmxe)
    host = lab.on_exit(begin, host_address_space_size=0) | {
        F.HOST_CR3: cr3, F.HOST_CR4: cr4, F.HOST_RIP: at + LANDED, F.HOST_RSP: stack,
        F.HOST_CS_SELECTOR: CS32,
    }  # fmt: skip
    body = f"""
        mov %esp, {results + 0x40:#x}
        vmxon {results + 0x48:#x}
        vmptrld {results + 0x50:#x}
        vmlaunch
        jmp 1f
        .org {LANDED:#x}
        pushf; pop %eax; mov %eax, {results + 0x14:#x}; mov %esp, {results + 0x10:#x}
        mov %cr0, %eax; mov %eax, {results:#x}; mov %cr3, %eax; mov %eax, {results + 4:#x}
        mov %cr4, %eax; mov %eax, {results + 8:#x}
        {legacy_host.READ_EFER}; mov %eax, {results + 12:#x}
        mov %dr7, %eax; mov %eax, {results + 0x18:#x}; mov %cs, %eax; mov %eax, {results + 0x1C:#x}
    1:  mov {results + 0x40:#x}, %esp
        vmclear {results + 0x50:#x}
        vmxoff
    """
    legacy_host.place(lab, lab.facts.l1, at, body, cr3, cr4)
    lab.write_u32(results, *[NOWHERE] * 8)
    lab.write_u64(results + 0x48, places.region, places.control)
    wanted = [f for f in (*EXIT_FIELDS, *SAVED) if f in lab.known]
    with lab.batch() as batch:
        writes = lab.plan_launch(batch, host)
        batch.vmclear(places.control)
        batch.vmxoff()
        ran = batch.call(lab.assemble(legacy_host.CALL), {"rbx": at}, [])
        batch.vmxon(places.region)
        batch.vmptrld(places.control)
        fields = batch.vmreads(wanted, places.scratch)
        words = batch.read(results, 0x20)
    writes.check()
    _ = ran.value
    cr0, cr3, cr4, efer_then, esp, eflags, dr7, cs = struct.unpack("<8I", words.value)
    found = Host(cr0, cr3, cr4, efer_then, esp, eflags, dr7, cs, fields.value)
    if found.cr0 == NOWHERE:
        raise Broken("VMLAUNCH by a 32-bit host fails; must enter L2 and come back")
    equal("the exit reason", found.fields[F.EXIT_REASON], ExitReason.VMCALL)
    return found


def _two_levels(lab: VmxLab) -> tuple[int, int]:
    """CR3 and CR4 of a host with 32-bit paging."""
    legacy_host.two_level_tables(lab, lab.places.nested)
    return lab.places.nested, int(Cr4.pse)


def _pae(lab: VmxLab) -> tuple[int, int]:
    """CR3 and CR4 of a host with PAE paging."""
    legacy_host.pae_tables(lab, lab.places.nested, lab.places.nested + 0x1000)
    return lab.places.nested, int(Cr4.pae)


HOSTS: Final[dict[str, Callable[[VmxLab], tuple[int, int]]]] = {
    "two-level paging": _two_levels, "PAE paging": _pae,
}  # fmt: skip
GUESTS: Final[dict[str, Callable[[VmxLab], Changes]]] = {
    "two-level paging": entry_modes.two_levels, "PAE paging": entry_modes.pae,
}  # fmt: skip
PAIRS: Final[dict[str, object]] = {
    f"{host}, L2 with {guest}": (host, guest) for host in HOSTS for guest in GUESTS
}


@guest_test(HOST_STATE, "SDM: Loading Host Control Registers, Debug Registers, MSRs", cases=PAIRS)
def a_32_bit_host_gets_its_own_mode_back(lab: VmxLab, pair: tuple[str, str]) -> None:
    """An exit with "host address-space size" 0 loads a host outside IA-32e mode, with its paging.

    CR3, CR4, ESP and CS are the VMCS's, EFER.LMA and LME are 0, RFLAGS is 2, DR7 400H.
    """
    host, guest = pair
    cr3, cr4 = HOSTS[host](lab)
    begin = GUESTS[guest](lab)
    lab.write_u32(lab.places.data, 0x1234, 0)
    lab.code(f".code32\nmov {lab.places.data:#x}, %eax; mov %eax, {lab.places.data + 4:#x}\nstc")
    found = from_legacy_mode(lab, begin, cr3, cr4)
    equal("what L2 copied", lab.read_u32(lab.places.data + 4), 0x1234)
    got = {
        "CR0": found.cr0, "CR3": found.cr3, "CR4": found.cr4, "EFER.LME and LMA": found.efer & LONG,
        "ESP": found.esp, "EFLAGS": found.eflags, "DR7": found.dr7, "CS": found.cs,
    }  # fmt: skip
    wanted = {
        "CR0": lab.fields[F.HOST_CR0], "CR3": cr3, "CR4": cr4 | int(Cr4.vmxe),
        "EFER.LME and LMA": 0, "ESP": lab.places.free + 0xF2000, "EFLAGS": int(RFLAGS_FIXED_ONE),
        "DR7": int(DR7_FIXED_ONE), "CS": CS32,
    }  # fmt: skip
    each("of the host", got, lambda name: wanted[name])


@guest_test(HOST_STATE, "SDM: Loading Page-Directory-Pointer-Table Entries")
def a_host_with_pae_paging_uses_the_pointers_of_the_moment(lab: VmxLab) -> None:
    """An exit loads the PDPTEs from the table of host CR3, as L2 has left it."""
    cr3, cr4 = _pae(lab)
    begin = entry_modes.pae(lab)
    spare = lab.places.nested2
    lab.table(spare, 512, legacy_host.LARGE, 1 << 21)
    lab.write_u32(lab.places.data, 0x4321)
    lab.code(f".code32\nmovl ${spare | 1:#x}, {cr3:#x}")  # the first GiB's
    found = from_legacy_mode(lab, begin, cr3, cr4)
    equal("CR3 of the host", found.cr3, cr3)
    flags = lab.read_u64(spare + 8 * (lab.places.free + 0xF1000 >> 21)) >> 5 & 3
    equal("A and D of the entry that the host's writes behind the exit went by", flags, 3)
