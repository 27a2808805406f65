"""Nested paging: what works, what is refused, and what #VMEXIT(NPF) says of it."""

from __future__ import annotations

from typing import Final

from undervisor.arch.svm.exits import ExitCode, NestedPageFaultInfo
from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.svm.vmcb import VmcbField as F
from undervisor.arch.x86.msr import Msr
from undervisor.arch.x86.paging import Entry
from undervisor.arch.x86.registers import Efer
from undervisor.conformance.expect import each, equal, true
from undervisor.conformance.suite import guest_test
from undervisor.conformance.svm import modes
from undervisor.conformance.svm.lab import SvmLab
from undervisor.conformance.svm.needs import NPT, feature, page1gb
from undervisor.conformance.svm.run import Run

Info = NestedPageFaultInfo
FINAL, TABLES = int(Info.final_address), int(Info.guest_tables)
P, W, U, RSV, ID = int(Info.p), int(Info.rw), int(Info.us), int(Info.rsv), int(Info.id)
FAULTS: Final = ("APM: Nested Paging", "APM: Nested versus Guest Page Faults, Fault Ordering")
READ, WRITE, FETCH = "mov DATA + 8, %rax", "mov %rax, DATA + 8", "jmp DATA + 8"
WORK: Final = """
    mov $FREE, %edi; mov $0x20000, %ecx; mov $0x0101010101010101, %rax; rep stosq
    mov $FREE, %esi; mov $0x20000, %ecx; xor %ebx, %ebx
1:  lodsq; add %rax, %rbx; loop 1b; mov %rbx, %r8
    mov $50, %ebp
2:  xor %eax, %eax; cpuid; call 3f; dec %ebp; jnz 2b
    mov %cr3, %rax; mov %rax, %cr3; invlpg DATA
    mov $0x2000000, %edi
4:  mov -8(%rdi), %rax; sub $0x200000, %edi; cmp $0x600000, %edi; ja 4b
    jmp 5f
3:  push %rbx; pop %rbx; incl DATA; ret
5:
"""
"""A MiB that is filled and summed, exits that L0 serves, calls, a flush, many regions."""


def nxe_on(lab: SvmLab) -> None:
    """Host EFER.NXE set: nested entries have a no-execute bit, and faults name fetches."""
    lab.l1.wrmsr(Msr.EFER, lab.facts.l1.efer | Efer.nxe)


@guest_test(
    "APM: Nested Paging", "APM: Nested Table Walk", needs=[NPT], cases={"4 KiB": 12, "2 MiB": 21}
)
def l2_works_under_nested_pages_of_a_size(lab: SvmLab, shift: int) -> None:
    """An L2 does real work under an identity map of nested pages of one size."""
    _works(lab, shift)


@guest_test(
    "APM: Nested Paging", "APM: 1-Gbyte Page Translation", needs=[NPT, page1gb()], seconds=5
)
def l2_works_under_nested_pages_of_1_gib(lab: SvmLab) -> None:
    """An L2 does real work under an identity map of 1-GiB nested pages."""
    _works(lab, 30)


def _works(lab: SvmLab, shift: int) -> None:
    lab.write_u32(lab.places.data, 0)
    run = lab.run(WORK, lab.npt(shift) | {F.CR3: lab.pages()})
    run.ends()
    equal("the sum of what L2 wrote", run.registers["r8"],
          0x0101010101010101 * 0x20000 % (1 << 64))  # fmt: skip
    equal("L2's calls", lab.read_u32(lab.places.data), 50)


# Name: the access, bits to clear and to set in the nested entry, EXITINFO1 without bit 32.
REFUSED: Final = {
    "read, not present": (READ, Entry.p, 0, U),
    "write, not present": (WRITE, Entry.p, 0, W | U),
    "fetch, not present": (FETCH, Entry.p, 0, U | ID),
    "write, read-only": (WRITE, Entry.rw, 0, P | W | U),
    "read, supervisor": (READ, Entry.us, 0, P | U),
    "write, supervisor": (WRITE, Entry.us, 0, P | W | U),
    "fetch, supervisor": (FETCH, Entry.us, 0, P | U | ID),
    "fetch, no-execute": (FETCH, 0, Entry.xd, P | U | ID),
    "read, reserved bit": (READ, 0, 1 << 51, P | U | RSV),
    "write, reserved bit": (WRITE, 0, 1 << 51, P | W | U | RSV),
    "fetch, reserved bit": (FETCH, 0, 1 << 51, P | U | RSV | ID),
}


@guest_test(*FAULTS, needs=[NPT])
def a_refused_access_exits_with_its_reason_and_address(lab: SvmLab) -> None:
    """NPF of a final access: EXITINFO1 has P, W, U, RSV, ID and bit 32, EXITINFO2 the address."""
    nxe_on(lab)
    begin = lab.npt(12) | {F.TLB_CONTROL: 1}
    data, good = lab.places.data, lab.places.data | 7
    got, wanted = {}, {}
    for name, (access, clear, put, info) in REFUSED.items():
        lab.write_u64(lab.nested_entry(data), good & ~int(clear) | int(put))
        run = lab.run(access, begin)
        got[name] = (run.code, run.info1, run.info2, run.rip)
        rip = data + 8 if access == FETCH else lab.places.code
        wanted[name] = (ExitCode.NPF, info | FINAL, data + 8, rip)
    each("exit, EXITINFO1, EXITINFO2, RIP", got, lambda name: wanted[name])


@guest_test(*FAULTS, "APM: #PF (Page Fault)", needs=[NPT])
def a_nested_page_fault_leaves_cr2(lab: SvmLab) -> None:
    """A nested page fault is none of L2's: its CR2 is what it was."""
    begin = lab.npt(12) | {F.CR2: 0x5555}
    lab.write_u64(lab.nested_entry(lab.places.data), 0)
    run = lab.run(READ, begin)
    run.exits_with(ExitCode.NPF)
    equal("CR2", run[F.CR2], 0x5555)


@guest_test(*FAULTS, needs=[NPT])
def what_a_page_allows_does_not_exit(lab: SvmLab) -> None:
    """A read-only page is read and executed, a no-execute one is read and written."""
    nxe_on(lab)
    begin = lab.npt(12) | {F.TLB_CONTROL: 1}
    data = lab.places.data
    lab.write(data + 0x40, b"\xc3")
    lab.write_u64(lab.nested_entry(data), data | 5)
    lab.run("mov DATA, %rax; call DATA + 0x40", begin).ends()
    lab.write_u64(lab.nested_entry(data), data | 7 | int(Entry.xd))
    lab.run("mov DATA, %rax; mov %rax, DATA + 8", begin).ends()


@guest_test(*FAULTS, needs=[NPT])
def each_address_bit_beyond_the_physical_width_is_reserved(lab: SvmLab) -> None:
    """In a nested entry each bit from MAXPHYADDR to 51 is reserved, at the last level and above."""
    begin = lab.npt(12) | {F.TLB_CONTROL: 1}
    data, width, got = lab.places.data, lab.physical_width(), {}
    lab.code(READ)
    for level in (1, 2, 3, 4):
        where = lab.nested_entry(data, level)
        good = lab.read_u64(where)
        for bit in range(width, 52) if level == 1 else (width, 51):
            lab.write_u64(where, good | 1 << bit)
            run = lab.run(None, begin)
            got[f"level {level}, bit {bit}"] = (run.code, run.info1 & (RSV | P))
        lab.write_u64(where, good)
    each("exit, RSV and P", got, (ExitCode.NPF, RSV | P))
    lab.run(None, begin).ends()


@guest_test(*FAULTS, needs=[NPT])
def the_address_of_a_large_page_is_aligned(lab: SvmLab) -> None:
    """In a nested entry of a 2-MiB page, bits 20:13 are reserved."""
    begin = lab.npt(21) | {F.TLB_CONTROL: 1}
    where = lab.nested_entry(lab.places.data, 2)
    good, got = lab.read_u64(where), {}
    lab.code(READ)
    for bit in range(13, 21):
        lab.write_u64(where, good | 1 << bit)
        run = lab.run(None, begin)
        got[f"bit {bit}"] = (run.code, run.info1 & (RSV | P))
    each("exit, RSV and P", got, (ExitCode.NPF, RSV | P))


@guest_test(*FAULTS, "APM: Nested Table Walk", needs=[NPT])
def a_fault_in_the_walk_of_l2s_tables_is_told_apart(lab: SvmLab) -> None:
    """A page of L2's tables that NPT refuses exits with bit 33 and the entry's address.

    The walk of guest tables counts as a user write, whatever L2 does.
    """
    changes = lab.npt(12) | {F.CR3: lab.pages(), F.TLB_CONTROL: 1}
    places, slot = lab.places, lab.places.base >> 21
    entries = {
        "PML4": places.pml4, "PDPT": places.pdpt, "PD": places.pd + 8 * slot,
        "PT": lab.pte(places.code),
    }  # fmt: skip
    got, wanted = {}, {}
    lab.code("nop")
    for name, entry in entries.items():
        page = entry & ~0xFFF
        for what, value, info in (("absent", 0, W | U), ("read-only", page | 5, P | W | U)):
            lab.write_u64(lab.nested_entry(page), value)
            run = lab.run(None, changes)
            case = f"{name}, {what}"
            got[case] = (run.code, run.info1, run.info2, run.rip)
            wanted[case] = (ExitCode.NPF, TABLES | info, entry, places.code)
        lab.write_u64(lab.nested_entry(page), page | 7)
    got = {case: (v[0], v[1] & ~ID, *v[2:]) for case, v in got.items()}
    each("exit, EXITINFO1, EXITINFO2, RIP", got, lambda case: wanted[case])


@guest_test(*FAULTS, needs=[NPT])
def l2s_own_page_fault_comes_before_the_nested_one(lab: SvmLab) -> None:
    """Where L2's tables refuse an access, it is a #PF of L2, and NPT is not asked for the page."""
    changes = lab.npt(12) | {F.CR3: lab.pages()}
    data = lab.places.data
    lab.write_u64(lab.pte(data), 0)
    lab.write_u64(lab.nested_entry(data), 0)
    run = lab.run(READ, changes)
    run.delivers(14)
    equal("CR2", run[F.CR2], data + 8)
    run = lab.run(WRITE, changes, wants=[Intercept.EXCP_PF])
    run.exits_with(ExitCode.EXCP_PF, 2, data + 8)


@guest_test("APM: Nested Paging", "APM: Decode Assists", needs=[NPT, feature("decode_assists")])
def a_nested_page_fault_brings_the_instructions_bytes(lab: SvmLab) -> None:
    """With decode assists an NPF of a data access has the bytes at RIP, that of a fetch none."""
    begin = lab.npt(12)
    lab.write_u64(lab.nested_entry(lab.places.data), 0)
    run = lab.run(WRITE, begin)
    run.exits_with(ExitCode.NPF)
    length = run[F.FETCHED_BYTES] & 0xF
    fetched = run[F.GUEST_INSTRUCTION_BYTES].to_bytes(15, "little")
    true("there are bytes of the whole instruction", length >= 8, length)
    equal("the bytes", fetched[:length], lab.read(lab.places.code, length))
    run = lab.run(FETCH, begin)
    equal("bytes of a fetch that is refused", run[F.FETCHED_BYTES] & 0xF, 0)


@guest_test("APM: Nested Paging", "APM: Decode Assists", needs=[NPT, feature("decode_assists")])
def the_instructions_bytes_end_where_memory_does(lab: SvmLab) -> None:
    """At the end of a page the bytes are those of both pages, or of the one that is there."""
    places = lab.places
    at = places.code + 0x1000 - 10
    lab.code(f"{WRITE}; 1: jmp 1b", at)
    lab.write(places.code + 0x1000, bytes(range(0x50, 0x60)))
    for there in (True, False):
        begin = lab.npt(12) | {F.RIP: at, F.TLB_CONTROL: 1}
        lab.write_u64(lab.nested_entry(places.data), 0)
        if not there:
            lab.write_u64(lab.nested_entry(places.code + 0x1000), 0)
        run = lab.run(None, begin)
        run.exits_with(ExitCode.NPF, info2=places.data + 8)
        length = run[F.FETCHED_BYTES] & 0xF
        fetched = run[F.GUEST_INSTRUCTION_BYTES].to_bytes(15, "little")
        most = 15 if there else 10
        true(f"there must be 8 to {most} bytes of the instruction", 8 <= length <= most, length)
        equal("the bytes", fetched[:length], lab.read(at, length))


@guest_test("APM: Nested Paging", "APM: TLB Control", needs=[NPT])
def a_page_that_l1_adds_is_there_without_a_flush(lab: SvmLab) -> None:
    """An L2 that faulted goes on after L1 has made the nested entry present."""
    begin, data = lab.npt(12), lab.places.data
    lab.write_u64(lab.nested_entry(data), 0)
    lab.write_u64(data + 8, 0x77)
    run = lab.run("mov DATA + 8, %rbx", begin)
    run.exits_with(ExitCode.NPF)
    lab.write_u64(lab.nested_entry(data), data | 7)
    run = lab.resume()
    run.ends()
    equal("what L2 read", run.registers["rbx"], 0x77)


@guest_test("APM: Nested Paging", needs=[NPT])
def l2_sees_pages_where_l1_puts_them(lab: SvmLab) -> None:
    """Two guest-physical pages may be one page, and a page may be anywhere."""
    begin, places = lab.npt(12), lab.places
    lab.write_u64(lab.nested_entry(places.data), places.free | 7)
    lab.write_u64(lab.nested_entry(places.data + 0x1000), places.free | 7)
    lab.write_u64(places.data, 0x1111)
    lab.write_u64(places.free, 0x2222)
    run = lab.run("mov DATA, %rbx; movl $0x3333, DATA + 0x1000; mov DATA, %rcx", begin)
    run.ends()
    equal("what L2 reads", (run.registers["rbx"], run.registers["rcx"]), (0x2222, 0x3333))
    equal("L1's own page", lab.read_u64(places.data), 0x1111)


@guest_test("APM: Nested Paging", "APM: Nested Table Walk", needs=[NPT])
def accessed_and_dirty_are_set_in_nested_entries(lab: SvmLab) -> None:
    """Reads set A, writes A and D, in the nested entries that were used and in no others."""
    begin, data = lab.npt(12), lab.places.data
    lab.run("mov DATA, %rax; mov %rax, DATA + 0x1000", begin).ends()
    flags = [lab.read_u64(lab.nested_entry(data + 0x1000 * n)) >> 5 & 3 for n in range(3)]
    equal("A and D of a page read, one written, one not used", flags, [1, 3, 0])
    upper = [lab.read_u64(lab.nested_entry(data, level)) >> 5 & 1 for level in (2, 3, 4)]
    equal("A of the upper levels", upper, [1, 1, 1])
    lab.write_u64(lab.nested_entry(data), data | 7)
    lab.run("mov DATA, %rax; mov %rax, DATA", begin | {F.TLB_CONTROL: 1}).ends()
    equal("A and D after a read and a write", lab.read_u64(lab.nested_entry(data)) >> 5 & 3, 3)


@guest_test("APM: Shadow Paging", "APM: Nested Paging")
def without_nested_paging_l2_has_l1s_addresses(lab: SvmLab) -> None:
    """While NP_ENABLE is 0 L2's tables lead to L1's own physical memory, and nothing is an NPF."""
    root = lab.pages()
    lab.write_u64(lab.pte(lab.places.data), lab.places.free | 7)
    lab.write_u64(lab.places.free, 0x4444)
    run = lab.run("mov DATA, %rbx; incq DATA", {F.CR3: root, F.N_CR3: 0})
    run.ends()
    equal("what L2 reads", run.registers["rbx"], 0x4444)
    equal("what L1 finds", lab.read_u64(lab.places.free), 0x4445)


@guest_test("APM: Nested Paging", "APM: G_PAT", needs=[NPT])
def l2_has_a_pat_of_its_own(lab: SvmLab) -> None:
    """With nested paging L2's PAT is G_PAT: read, written and saved; L1's stays."""
    before = lab.l1.rdmsr(Msr.PAT).value
    run = lab.run(f"mov ${int(Msr.PAT):#x}, %ecx; rdmsr; mov %eax, %ebx; mov $6, %eax; wrmsr",
                  lab.npt() | {F.G_PAT: 0x0007040600010406})  # fmt: skip
    run.ends()
    equal("what L2 reads", run.registers["rbx"], 0x00010406)
    equal("G_PAT after the exit", run[F.G_PAT], 0x0007040600000006)
    equal("L1's PAT", lab.l1.rdmsr(Msr.PAT).value, before)


@guest_test(
    "APM: Nested Paging",
    needs=[NPT],
    cases={"real": modes.real, "32-bit": modes.protected, "PAE paging": modes.pae,
           "two-level paging": modes.legacy_paging},
)  # fmt: skip
def l2_of_another_mode_runs_under_nested_paging(lab: SvmLab, mode: object) -> None:
    """An L2 in a mode of its own is translated by NPT like one in 64-bit mode."""
    assert callable(mode)
    begin, places = lab.npt(12) | mode(lab), lab.places
    lab.write_u64(lab.nested_entry(places.data), places.free + 0x8000 | 7)
    lab.write_u32(places.free + 0x8000, 0x12345678)
    sixteen = begin[F.CR0] & 1 == 0
    where = 0 if sixteen else places.data
    lab.code(f".code{16 if sixteen else 32}\nmov {where:#x}, %eax; mov %eax, {where + 4:#x}")
    lab.run(None, begin).ends()
    equal("what L2 wrote", lab.read_u32(places.free + 0x8004), 0x12345678)
    lab.write_u64(lab.nested_entry(places.data), 0)
    run: Run = lab.run(None, begin | {F.TLB_CONTROL: 1})
    run.exits_with(ExitCode.NPF, U | FINAL, places.data)
