"""Translations: what a flush must reach, and what address spaces keep from each other."""

from __future__ import annotations

from typing import Final

from undervisor.arch.svm.capabilities import SvmFeatures
from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.svm.vmcb import TlbControl
from undervisor.arch.svm.vmcb import VmcbField as F
from undervisor.conformance.expect import Lacking, each, equal
from undervisor.conformance.suite import guest_test
from undervisor.conformance.svm.lab import Changes, SvmLab
from undervisor.conformance.svm.needs import NPT

FLUSHES: Final = {
    "the whole TLB": (TlbControl.FLUSH_ALL, False),
    "this ASID": (TlbControl.FLUSH_ASID, True),
    "this ASID, not global": (TlbControl.FLUSH_ASID_NON_GLOBAL, True),
}


def _two_pages(lab: SvmLab) -> tuple[int, int]:
    """Two pages with different contents."""
    first, second = lab.places.free, lab.places.free + 0x1000
    lab.write_u64(first, 0x1111)
    lab.write_u64(second, 0x2222)
    return first, second


def _flush(lab: SvmLab, name: str) -> Changes:
    control, needs_asids = FLUSHES[name]
    if needs_asids and not lab.feature(int(SvmFeatures.flush_by_asid)):
        raise Lacking("flush by ASID")
    return {F.TLB_CONTROL: control}


@guest_test("APM: TLB Control", "APM: TLB Flush", needs=[NPT], cases={n: n for n in FLUSHES})
def a_flush_makes_a_changed_nested_entry_hold(lab: SvmLab, name: str) -> None:
    """After TLB_CONTROL's flush L2 sees where a nested entry leads by then."""
    flush, data = _flush(lab, name), lab.places.data
    first, second = _two_pages(lab)
    begin = lab.npt(12)
    lab.write_u64(lab.nested_entry(data), first | 7)
    run = lab.run("mov DATA, %rbx; vmmcall; mov DATA, %rcx", begin)
    equal("before", run.registers["rbx"], 0x1111)
    lab.write_u64(lab.nested_entry(data), second | 7)
    run = lab.skip(run, 3, flush)
    run.ends()
    equal("after the change and the flush", run.registers["rcx"], 0x2222)


@guest_test("APM: TLB Control", "APM: TLB Flush", needs=[NPT], cases={n: n for n in FLUSHES})
def a_flush_makes_a_narrowed_nested_entry_hold(lab: SvmLab, name: str) -> None:
    """After TLB_CONTROL's flush a page that became read-only, or absent, refuses."""
    flush, data = _flush(lab, name), lab.places.data
    for text, value in (("mov %eax, DATA", data | 5), ("mov DATA, %eax", 0)):
        begin = lab.npt(12)
        run = lab.run(f"{text}; vmmcall; {text}", begin | {F.TLB_CONTROL: 1})
        run.exits_with(ExitCode.VMMCALL)
        lab.write_u64(lab.nested_entry(data), value)
        lab.skip(run, 3, flush).exits_with(ExitCode.NPF, info2=data)


@guest_test("APM: TLB Control", "APM: ASID", needs=[NPT])
def another_asid_has_no_stale_translations(lab: SvmLab) -> None:
    """An ASID that was never used begins without translations: no flush is needed."""
    first, second = _two_pages(lab)
    begin, data = lab.npt(12), lab.places.data
    if lab.facts.asids < 3:
        raise Lacking("three ASIDs")
    lab.write_u64(lab.nested_entry(data), first | 7)
    lab.run("mov DATA, %rbx", begin).ends()
    lab.write_u64(lab.nested_entry(data), second | 7)
    run = lab.run("mov DATA, %rbx", begin | {F.GUEST_ASID: 2})
    run.ends()
    equal("what L2 with the new ASID reads", run.registers["rbx"], 0x2222)


@guest_test("APM: ASID", "APM: TLB Control", needs=[NPT])
def two_asids_have_their_own_translations(lab: SvmLab) -> None:
    """Two guests whose nested tables differ, run in turns without a flush, see their own pages."""
    if lab.facts.asids < 3:
        raise Lacking("three ASIDs")
    first, second = _two_pages(lab)
    data, places = lab.places.data, lab.places
    spaces = {
        1: lab.npt(12) | {F.GUEST_ASID: 1},
        2: lab.npt(12, root=places.nested2) | {F.GUEST_ASID: 2},
    }
    lab.write_u64(lab.nested_entry(data), first | 7)
    lab.write_u64(lab.nested_entry(data, root=places.nested2), second | 7)
    got = {}
    lab.code("mov DATA, %rbx")
    for turn in range(3):
        for asid, changes in spaces.items():
            run = lab.run(None, changes)
            run.ends()
            got[f"turn {turn}, ASID {asid}"] = run.registers["rbx"]
    each("what L2 reads", got, lambda case: 0x1111 if case.endswith("1") else 0x2222)


@guest_test("APM: ASID", "APM: Shadow Paging")
def two_asids_have_their_own_linear_addresses(lab: SvmLab) -> None:
    """Without nested paging, two guests with tables of their own see their own pages."""
    if lab.facts.asids < 3:
        raise Lacking("three ASIDs")
    first, second = _two_pages(lab)
    root, other = lab.pages(), lab.places.nested
    # The second guest's tables: a copy, from PML4 to PT.
    for number, table in enumerate(
        (lab.places.pml4, lab.places.pdpt, lab.places.pd, lab.places.pt)
    ):
        lab.l1.copy(other + 0x1000 * number, table, 0x1000)
    slot = lab.places.base >> 21
    lab.write_u64(other, (other + 0x1000) | 7)
    lab.write_u64(other + 0x1000, (other + 0x2000) | 7)
    lab.write_u64(other + 0x2000 + 8 * slot, (other + 0x3000) | 7)
    index = 8 * (lab.places.data >> 12 & 511)
    lab.write_u64(lab.places.pt + index, first | 7)
    lab.write_u64(other + 0x3000 + index, second | 7)
    got = {}
    lab.code("mov DATA, %rbx")
    for turn in range(3):
        for asid, cr3 in ((1, root), (2, other)):
            run = lab.run(None, {F.CR3: cr3, F.GUEST_ASID: asid})
            run.ends()
            got[f"turn {turn}, ASID {asid}"] = run.registers["rbx"]
    each("what L2 reads", got, lambda case: 0x1111 if case.endswith("1") else 0x2222)


@guest_test("APM: ASID", "APM: TLB Control")
def l1_and_l2_have_their_own_translations(lab: SvmLab) -> None:
    """The same linear address is one page in L1 and another in L2, in turns, without a flush."""
    first, second = _two_pages(lab)
    far = 0x8000000000
    root = lab.pages()
    # L1's own tables get an address that L2 has as well: a second PML4 entry in each.
    l1_root, spare = lab.facts.l1.cr3 & ~0xFFF, lab.places.free + 0x10000
    tables = {}
    for owner, page, base in (("L1", first, spare), ("L2", second, spare + 0x4000)):
        lab.write_u64(base, (base + 0x1000) | 7)
        lab.write_u64(base + 0x1000, (base + 0x2000) | 7)
        lab.write_u64(base + 0x2000, page | 7)
        tables[owner] = base
    lab.write_u64(l1_root + 8, tables["L1"] | 7)
    lab.write_u64(root + 8, tables["L2"] | 7)
    got = {}
    lab.code(f"mov ${far:#x}, %rbx; mov (%rbx), %rbx")
    for turn in range(3):
        l1 = lab.l1.peek(far, 64)
        run = lab.run(None, {F.CR3: root})
        run.ends()
        got[f"turn {turn}, L1"] = l1.value
        got[f"turn {turn}, L2"] = run.registers["rbx"]
    each("what is read", got, lambda case: 0x1111 if case.endswith("L1") else 0x2222)


@guest_test("APM: INVLPGA", "APM: Shadow Paging")
def invlpga_makes_a_changed_entry_of_l2s_tables_hold(lab: SvmLab) -> None:
    """INVLPGA of L2's ASID removes the translation of one linear address of L2."""
    first, second = _two_pages(lab)
    root, data = lab.pages(), lab.places.data
    lab.write_u64(lab.pte(data), first | 7)
    run = lab.run("mov DATA, %rbx; vmmcall; mov DATA, %rcx", {F.CR3: root})
    equal("before", run.registers["rbx"], 0x1111)
    lab.write_u64(lab.pte(data), second | 7)
    lab.l1.invlpga(data, 1)
    run = lab.skip(run, 3)
    run.ends()
    equal("after the change and INVLPGA", run.registers["rcx"], 0x2222)


@guest_test("APM: INVLPGA")
def invlpga_of_asid_0_is_l1s(lab: SvmLab) -> None:
    """INVLPGA with ASID 0 removes L1's own translation, like INVLPG."""
    first, second = _two_pages(lab)
    far, base = 0x8000000000, lab.places.free + 0x10000
    lab.write_u64(base, (base + 0x1000) | 7)
    lab.write_u64(base + 0x1000, (base + 0x2000) | 7)
    lab.write_u64(base + 0x2000, first | 7)
    lab.write_u64((lab.facts.l1.cr3 & ~0xFFF) + 8, base | 7)
    equal("before", lab.l1.peek(far, 64).value, 0x1111)
    lab.write_u64(base + 0x2000, second | 7)
    lab.l1.invlpga(far, 0)
    equal("after the change and INVLPGA", lab.l1.peek(far, 64).value, 0x2222)


@guest_test("APM: TLB Flush", "APM: MOV (CRn)")
def l2s_own_flushes_work(lab: SvmLab) -> None:
    """INVLPG, a load of CR3 and a toggle of CR4.PGE in L2 make its changed entries hold."""
    first, second = _two_pages(lab)
    data = lab.places.data
    entry = f"{lab.pte(data):#x}"
    flushes = {
        "INVLPG": "invlpg DATA", "MOV to CR3": "mov %cr3, %rax; mov %rax, %cr3",
        "CR4.PGE": "mov %cr4, %rax; btc $7, %rax; mov %rax, %cr4; btc $7, %rax; mov %rax, %cr4",
    }  # fmt: skip
    got = {}
    for paging, changes in (("shadow", {}), ("nested", lab.npt(12))):
        for name, text in flushes.items():
            root = lab.pages()
            lab.write_u64(lab.pte(data), first | 7)
            run = lab.run(f"mov DATA, %rbx; movq ${second | 7:#x}, {entry}; {text}; mov DATA, %rcx",
                          changes | {F.CR3: root, F.TLB_CONTROL: 1})  # fmt: skip
            run.ends()
            got[f"{name}, {paging} paging"] = (run.registers["rbx"], run.registers["rcx"])
    each("what L2 reads before and after", got, (0x1111, 0x2222))


@guest_test("APM: TLB Control")
def tlb_control_is_l1s_to_clear(lab: SvmLab) -> None:
    """#VMEXIT leaves TLB_CONTROL as L1 wrote it."""
    lab.code("nop")
    run = lab.run(None, {F.TLB_CONTROL: 1})
    run.ends()
    equal("TLB_CONTROL after the exit", run[F.TLB_CONTROL], 1)


@guest_test("APM: TLB Control", "APM: Nested Table Walk", needs=[NPT], cases={
    f"level {n}": n for n in (1, 2, 3, 4)})  # fmt: skip
def a_change_at_each_level_holds_behind_a_flush(lab: SvmLab, level: int) -> None:
    """A nested entry of any level that L1 clears is gone behind a flush of the TLB."""
    begin, where = lab.npt(12), lab.nested_entry(lab.places.data, level)
    lab.run("mov DATA, %rax", begin).ends()
    lab.write_u64(where, 0)
    lab.run("mov DATA, %rax", begin | {F.TLB_CONTROL: 1}).exits_with(ExitCode.NPF)


@guest_test("APM: INVLPGA", "APM: TLB Flush")
def invlpga_of_asid_0_invalidates_l1s_own_translation(lab: SvmLab) -> None:
    """INVLPGA with ASID 0 drops what the host's own tables said of an address."""
    places, root = lab.places, lab.facts.l1.cr3
    lab.pages()
    lab.write_u64(root + 8 * 511, places.pdpt | 7)
    lab.write_u64(places.data, 0x1111)
    lab.write_u64(places.free, 0x2222)
    alias = 0xFFFFFF8000000000 + places.data
    code = f"""
        movabs ${alias:#x}, %rdi; mov (%rdi), %rsi; mov ${lab.pte(places.data):#x}, %edx
        mov ${places.free | 7:#x}, %ebx; mov %rbx, (%rdx)
        mov %rdi, %rax; xor %ecx, %ecx; invlpga %rax, %ecx; mov (%rdi), %rbx
    """
    found = lab.call(code, {}, ["rsi", "rbx"]).value
    equal("what L1 reads before and behind it", (found["rsi"], found["rbx"]), (0x1111, 0x2222))
