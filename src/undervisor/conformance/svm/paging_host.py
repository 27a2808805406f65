"""Nested tables in the format of the host's own paging mode: L1 enters from 32-bit modes too."""

from __future__ import annotations

from typing import Final

from undervisor.arch.svm.exits import ExitCode, NestedPageFaultInfo
from undervisor.arch.svm.vmcb import VmcbField as F
from undervisor.arch.x86.events import Vector
from undervisor.arch.x86.registers import Cr0, Cr4
from undervisor.conformance import first_mebibyte, legacy_host
from undervisor.conformance.expect import each, equal, true
from undervisor.conformance.legacy_host import pae_tables, two_level_tables
from undervisor.conformance.suite import guest_test
from undervisor.conformance.svm import modes
from undervisor.conformance.svm.lab import SvmLab
from undervisor.conformance.svm.needs import NPT
from undervisor.conformance.svm.run import Run

Info = NestedPageFaultInfo
NOT_PRESENT_READ: Final = int(Info.us | Info.final_address)
SECTIONS: Final = ("APM: Nested Paging", "APM: Nested Paging and VMRUN/#VMEXIT")
MEBIBYTE: Final = 1 << 20


def from_legacy_mode(lab: SvmLab, changes: dict[F, int], cr3: int, cr4: int) -> Run:
    """VMRUN by an L1 that has left long mode for 32-bit paging with `cr3` and `cr4`.

    L1 is back in long mode afterwards; its code and its stack are mapped identically in both.
    """
    at = lab.places.free + 0xF0000
    body = f"""
        mov ${lab.places.control:#x}, %eax
        vmrun %eax
        mov %cr0, %esi; mov %cr3, %edi; mov %cr4, %ebp
    """
    legacy_host.place(lab, lab.facts.l1, at, body, cr3, cr4, behind="stgi")
    with lab.batch() as batch:
        lab.plan_launch(batch, bytes(lab.area(changes)))
        ran = batch.call(lab.assemble(legacy_host.CALL), {"rbx": at}, ["rsi", "rdi", "rbp"])
        run = lab.plan_reading(batch)
    equal("CR0.PG of the host after the exit", bool(ran.value["rsi"] & Cr0.pg), True)
    equal("the host's CR3 and CR4 after the exit", (ran.value["rdi"], ran.value["rbp"]), (cr3, cr4))
    return run


@guest_test("APM: Nested Paging", needs=[NPT], cases={"4 KiB": 12, "2 MiB": 21})
def nested_pages_reach_the_first_mebibyte(lab: SvmLab, shift: int) -> None:
    """Memory below 1 MiB is under nested pages what it is to L1, and so is the firmware's."""
    begin = lab.npt(shift) | {F.CR3: lab.pages()}
    first_mebibyte.is_l1s(lab, lambda code, registers: lab.run(code, begin, registers))


def _l2(lab: SvmLab) -> dict[F, int]:
    """A 32-bit L2 without paging that copies a doubleword at `places.data`."""
    lab.code(f".code32\nmov {lab.places.data:#x}, %eax; mov %eax, {lab.places.data + 4:#x}")
    return modes.protected(lab) | {F.NESTED_CONTROL: 1}


@guest_test(*SECTIONS, needs=[NPT])
def a_host_with_pae_paging_has_pae_nested_tables(lab: SvmLab) -> None:
    """VMRUN under PAE paging walks the nested tables from four PDPTEs at N_CR3."""
    own, nested = lab.places.free, lab.places.nested
    pae_tables(lab, own, own + 0x1000)
    pae_tables(lab, nested, nested + 0x1000)
    begin = _l2(lab) | {F.N_CR3: nested}
    lab.write_u32(lab.places.data, 0x1234, 0)
    from_legacy_mode(lab, begin, own, int(Cr4.pae)).ends()
    equal("what L2 copied", lab.read_u32(lab.places.data + 4), 0x1234)
    lab.write_u64(nested + 0x1000 + 8 * (lab.places.base >> 21), 0)
    run = from_legacy_mode(lab, begin | {F.TLB_CONTROL: 1}, own, int(Cr4.pae))
    run.exits_with(ExitCode.NPF)
    equal("the page of the fault", run.info2 & -4096, lab.places.code)


@guest_test(*SECTIONS, "APM: CR3 in Legacy-Mode PAE Paging", needs=[NPT])
def pae_nested_tables_are_aligned_by_32_bytes(lab: SvmLab) -> None:
    """Under PAE paging N_CR3 names a 32-byte table by bits 31:5; bits 4:0 are no address."""
    own, nested = lab.places.free, lab.places.nested
    pae_tables(lab, own, own + 0x1000)
    # The last 32 bytes of a page; behind it is what a walk from a wrong address would find.
    pointers = nested + 0xFE0
    pae_tables(lab, pointers, nested + 0x2000)
    lab.fill(nested + 0x1000, 0x1000)
    got = {}
    for low in (0, 8, 0x10, 0x18, 0x1F):
        lab.write_u32(lab.places.data, 0x1234 + low, 0)
        begin = _l2(lab) | {F.N_CR3: pointers | low, F.TLB_CONTROL: 1}
        run = from_legacy_mode(lab, begin, own, int(Cr4.pae))
        got[low] = (run.code, lab.read_u32(lab.places.data + 4))
    each("exit, and what L2 copied, by N_CR3[4:0]", got, lambda low: (
        ExitCode.VMMCALL, 0x1234 + low))  # fmt: skip


@guest_test(*SECTIONS, needs=[NPT])
def a_host_with_two_level_paging_has_two_level_nested_tables(lab: SvmLab) -> None:
    """VMRUN under 32-bit paging walks two levels; with host CR4.PSE pages may be of 4 MiB."""
    own, nested = lab.places.free, lab.places.nested
    two_level_tables(lab, own)
    two_level_tables(lab, nested)
    begin = _l2(lab) | {F.N_CR3: nested}
    lab.write_u32(lab.places.data, 0x4321, 0)
    from_legacy_mode(lab, begin, own, int(Cr4.pse)).ends()
    equal("what L2 copied", lab.read_u32(lab.places.data + 4), 0x4321)
    lab.write_u32(nested + 4 * (lab.places.base >> 22), 0)
    run = from_legacy_mode(lab, begin | {F.TLB_CONTROL: 1}, own, int(Cr4.pse))
    run.exits_with(ExitCode.NPF, info2=lab.places.code)


@guest_test("APM: VMRUN Instruction", "APM: #VMEXIT")
def a_host_with_pae_paging_runs_an_l2_without_nested_paging(lab: SvmLab) -> None:
    """A 32-bit host runs a 64-bit L2 and is back in its own mode after the exit."""
    own = lab.places.free
    pae_tables(lab, own, own + 0x1000)
    lab.code("mov $0x123456789, %rax; mov %rax, DATA")
    from_legacy_mode(lab, {}, own, int(Cr4.pae)).ends()
    equal("what L2 wrote", lab.read_u64(lab.places.data), 0x123456789)


@guest_test("APM: Enabling Nested Paging", needs=[NPT])
def nested_paging_needs_a_host_with_paging(lab: SvmLab) -> None:
    """VMRUN with NP_ENABLE by a host whose CR0.PG is 0 is VMEXIT_INVALID."""
    places, l1 = lab.places, lab.facts.l1
    at = places.free
    code = f"""
        .code32
        mov %cr0, %eax; and ${~int(Cr0.pg) & 0xFFFFFFFF:#x}, %eax; mov %eax, %cr0
        mov ${places.control:#x}, %eax; vmrun %eax
        mov ${l1.cr3:#x}, %eax; mov %eax, %cr3
        mov %cr0, %eax; or ${int(Cr0.pg):#x}, %eax; mov %eax, %cr0
        ljmp $8, ${at + 0x800}
    """
    lab.write(at, lab.assemble(code, at))
    lab.write(at + 0x800, lab.assemble("stgi; ret"))
    begin = modes.protected(lab) | lab.npt()
    with lab.batch() as batch:
        lab.plan_launch(batch, bytes(lab.area(begin)))
        ran = batch.call(lab.assemble(legacy_host.CALL), {"rbx": at}, [])
        run = lab.plan_reading(batch)
    _ = ran.value
    run.is_invalid()


@guest_test("APM: VMRUN", "APM: VMSAVE")
def a_vmcb_where_no_memory_is_does_no_harm(lab: SvmLab) -> None:
    """VMSAVE and VMRUN with an address that has no memory do nothing or fault, and L1 goes on."""
    where = (1 << lab.physical_width()) - 0x1000
    for text in ("vmsave %rax", "vmrun %rax"):
        with lab.batch() as batch:
            answer = batch.call(lab.assemble(text), {"rax": where}, [])
            batch.stgi()
        fault = answer.fault
        true(f"{text} must be without an exception but #GP", fault is None
             or fault.vector == Vector.GP, fault)  # fmt: skip
    lab.run("nop").ends()
