"""EPT under L2's own page walks: flags, logging, and 1-GiB pages at work."""

from __future__ import annotations

from itertools import product
from typing import Final

from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.conformance.expect import each, equal, true
from undervisor.conformance.suite import guest_test
from undervisor.conformance.vmx.ept import (
    ACCESS,
    DEFINED,
    FETCH,
    LINEAR,
    READ,
    SIZES,
    TRANSLATED,
    VIOLATION,
    WRITE,
    WRITE_BACK,
    Target,
)
from undervisor.conformance.vmx.lab import EPTP, Changes, VmxLab
from undervisor.conformance.vmx.needs import EPT, ept

# -- L2's own page walks ---------------------------------------------------------------------------

GUEST_A, GUEST_D = 0x20, 0x40


def _walk(lab: VmxLab, rights: int, flags: int, *, eptp_flags: int = 0) -> tuple[Changes, int]:
    """EPT that maps the page with L2's last page table by `rights`; an address it translates."""
    changes: Changes = lab.ept(12) | {F.GUEST_CR3: lab.pages()}
    changes[F.EPT_POINTER] |= eptp_flags
    places = lab.places
    gva = places.data + 0x128
    lab.table(places.pt, 512, places.base | 7 | GUEST_A | GUEST_D, 1 << 12)
    lab.write_u64(places.pml4, places.pdpt | 7 | GUEST_A)
    lab.write_u64(places.pdpt, places.pd | 7 | GUEST_A)
    lab.write_u64(places.pd + 8 * (places.base >> 21), places.pt | 7 | GUEST_A)
    lab.write_u64(lab.pte(gva), places.data | 7 | flags)
    lab.write(gva, lab.assemble("ret"))
    lab.write_u64(lab.nested_entry(places.pt), places.pt | WRITE_BACK | rights)
    lab.l1.invept(1, changes[F.EPT_POINTER])
    return changes, gva


@guest_test("SDM: Exit Qualification for EPT Violations", "SDM: EPT Violations", needs=[EPT])
def a_violation_of_a_page_walk_tells_that_it_is_one(lab: VmxLab) -> None:
    """If L2's paging structure itself cannot be read, bit 8 is 0 and the address is the entry's."""
    for access in ACCESS:
        changes, gva = _walk(lab, 0, GUEST_A | GUEST_D)
        run = lab.run(ACCESS[access], changes, {"rbx": gva, "rax": 0xC3})
        run.exits_with(VIOLATION)
        # The first translation that needs the table is that of the code, which lies in it too.
        equal("the qualification", run.qualification & DEFINED, READ | LINEAR)
        equal("the guest-physical address", run[F.GUEST_PHYSICAL_ADDRESS],
              lab.pte(run[F.GUEST_LINEAR_ADDRESS]))  # fmt: skip


@guest_test("SDM: EPT Violations", "SDM: Accessed and Dirty Flags for EPT", needs=[EPT])
def a_walk_writes_only_to_set_flags(lab: VmxLab) -> None:
    """A read-only paging structure serves walks that need set no accessed or dirty flag.

    One that must is a write: a violation with read and write of the entry's address.
    """
    got: dict[tuple[int, int], object] = {}
    wanted: dict[tuple[int, int], object] = {}
    for access, flags in product(ACCESS, (0, GUEST_A, GUEST_A | GUEST_D)):
        changes, gva = _walk(lab, READ | FETCH, flags)
        run = lab.run(ACCESS[access], changes, {"rbx": gva, "rax": 0xC3})
        case = access, flags
        serves = flags & GUEST_A and (access != WRITE or flags & GUEST_D)
        got[case] = (run.reason, run.vector_of(run.rip))
        wanted[case] = (ExitReason.VMCALL, None) if serves else (VIOLATION, None)
        if run.reason == VIOLATION:
            got[case] = (run.reason, run.qualification & (WRITE | LINEAR | TRANSLATED),
                         run[F.GUEST_PHYSICAL_ADDRESS], run[F.GUEST_LINEAR_ADDRESS])  # fmt: skip
            wanted[case] = (VIOLATION, WRITE | LINEAR, lab.pte(gva), gva)
    each("(access, flags that L2's entry has): the exit", got, wanted.get)


@guest_test("SDM: EPT Violations", needs=[EPT])
def a_page_behind_a_read_only_table_has_its_own_rights(lab: VmxLab) -> None:
    """Where EPT makes both a page and L2's table for it read-only, each access goes by the page."""
    got, wanted = {}, {}
    for access in ACCESS:
        changes, gva = _walk(lab, READ | FETCH, GUEST_A | GUEST_D)
        for rights in (READ, READ | FETCH, READ | WRITE):
            page = lab.places.data | WRITE_BACK | rights
            lab.write_u64(lab.nested_entry(lab.places.data), page)
            lab.l1.invept(1, changes[F.EPT_POINTER])
            run = lab.run(ACCESS[access], changes, {"rbx": gva, "rax": 0xC3})
            got[access, rights] = run.reason
            wanted[access, rights] = ExitReason.VMCALL if access & rights else VIOLATION
            if run.reason == VIOLATION:
                equal("what the violation tells of the access", run.qualification & 7, access)
    each("(access, rights of the page): the exit", got, lambda case: wanted[case])


@guest_test("SDM: EPT Violations", needs=[EPT])
def l2s_page_fault_comes_before_the_violation_of_its_page(lab: VmxLab) -> None:
    """An access that L2's own tables forbid is a page fault, whatever EPT has for the page."""
    changes, gva = _walk(lab, 7, GUEST_A | GUEST_D)
    lab.write_u64(lab.pte(gva), lab.places.data & ~1)
    lab.write_u64(lab.nested_entry(lab.places.data), 0)
    lab.l1.invept(1, changes[F.EPT_POINTER])
    lab.run(ACCESS[READ], changes, {"rbx": gva}).delivers(14)


@guest_test("SDM: EPT Violations", needs=[EPT])
def a_read_modify_write_needs_both_permissions(lab: VmxLab) -> None:
    """A read-modify-write of a read-only page is a violation that tells the write."""
    target = Target(lab, 12)
    target.map(READ)
    run = lab.run("lock incl (%rbx)", target.changes, {"rbx": target.gpa})
    run.exits_with(VIOLATION)
    equal("write, permissions and address", (run.qualification & DEFINED & ~READ,
          run[F.GUEST_PHYSICAL_ADDRESS]),
          (WRITE | READ << 3 | LINEAR | TRANSLATED, target.gpa))  # fmt: skip


@guest_test("SDM: EPT Violations", needs=[EPT])
def an_access_across_two_pages_faults_on_the_second(lab: VmxLab) -> None:
    """Where only the second page of an access is absent, the violation is that page's."""
    target = Target(lab, 12)
    target.map(7)
    edge = target.gpa & -0x1000 | 0xFFC
    run = lab.run("mov (%rbx), %rax", target.changes, {"rbx": edge})
    run.exits_with(VIOLATION)
    equal("the guest-physical address", run[F.GUEST_PHYSICAL_ADDRESS] & -0x1000,
          (edge & -0x1000) + 0x1000)  # fmt: skip


# -- accessed and dirty flags ----------------------------------------------------------------------

EPT_A, EPT_D = 1 << 8, 1 << 9
EPTP_AD: Final = 1 << 6


@guest_test("SDM: Accessed and Dirty Flags for EPT", cases=SIZES,
            needs=[EPT, ept("accessed_dirty")])  # fmt: skip
def accessed_and_dirty_flags_are_set_as_the_access_needs(lab: VmxLab, shift: int) -> None:
    """With EPTP bit 6 an access sets the accessed flag in each entry used, a write the dirty flag.

    Without it neither is set.
    """
    target = Target(lab, shift)
    got: dict[tuple[int, int], object] = {}
    plain = target.changes[F.EPT_POINTER]
    for enabled, access in product((0, 1), ACCESS):
        target.changes[F.EPT_POINTER] = plain | EPTP_AD * enabled
        target.map(7)
        target.touch(access).ends()
        got[enabled, access] = lab.read_u64(target.leaf) & (EPT_A | EPT_D)
        if shift == 12 and enabled:
            above = lab.read_u64(target.entry(2)) & lab.read_u64(target.entry(3))
            true("the accessed flags above", above & EPT_A)
    each("(enabled, access): the flags", got,
         lambda case: case[0] * (EPT_A | (EPT_D if case[1] == WRITE else 0)))  # fmt: skip


@guest_test("SDM: Accessed and Dirty Flags for EPT", cases=SIZES,
            needs=[EPT, ept("accessed_dirty")])  # fmt: skip
def a_write_behind_a_read_sets_the_dirty_flag(lab: VmxLab, shift: int) -> None:
    """A page that was read, and so is cached, is dirty as soon as it is written."""
    target = Target(lab, shift)
    target.changes[F.EPT_POINTER] |= EPTP_AD
    target.map(7)
    code = "mov (%rbx), %rax; mov %rax, (%rbx)"
    lab.run(code, target.changes, {"rbx": target.gpa}).ends()
    equal("the flags", lab.read_u64(target.leaf) & (EPT_A | EPT_D), EPT_A | EPT_D)


@guest_test("SDM: Page-Modification Logging", needs=[EPT, ept("accessed_dirty")])
def a_dirty_flag_that_is_set_is_logged(lab: VmxLab) -> None:
    """With PML each dirty flag that is set logs its page; an index out of range exits with 62."""
    target = Target(lab, 12)
    changes = lab.secondary(target.changes, enable_pml=1)
    changes[F.EPT_POINTER] |= EPTP_AD
    changes |= {F.PML_ADDRESS: lab.places.pml, F.PML_INDEX: 5}
    lab.fill(lab.places.pml, 0x1000)
    target.map(7)
    page = target.gpa & -0x1000
    run = lab.run(ACCESS[WRITE], changes, {"rbx": target.gpa, "rax": 0xC3}, reads=[F.PML_INDEX])
    run.ends()
    index = run[F.PML_INDEX]
    logged = {lab.read_u64(lab.places.pml + 8 * n) for n in range(index + 1, 6)}
    true("the page is logged", page in logged, sorted(logged))
    target.map(7)
    full = changes | {F.PML_INDEX: 0xFFFF}
    run = lab.run(ACCESS[WRITE], full, {"rbx": target.gpa, "rax": 0xC3})
    run.exits_with(ExitReason.PAGE_MODIFICATION_LOG_FULL)


# -- 1-GiB pages at work ---------------------------------------------------------------------------


@guest_test("SDM: EPT Translation Mechanism", needs=[EPT, ept("page_1g")], seconds=8)
def an_l2_with_its_own_tables_runs_on_1_gib_pages(lab: VmxLab) -> None:
    """On 1-GiB pages an L2 switches tables, flushes, faults and goes on: real work, not one access.

    Its tables have 4-KiB pages, so that both walks differ at every level.
    """
    root = lab.pages()
    hole = lab.places.free + 0x8000
    lab.write_u64(lab.pte(hole), 0)
    handler = """
        push %rax
        mov $PT, %eax
        lea (%rax, %r9, 8), %rax
        mov %r10, (%rax)
        invlpg (%rbx)
        pop %rax
        add $8, %rsp
        inc %r11
        iretq
    """
    at = lab.places.code + 0x8000
    lab.code(handler, at=at, end="")
    low = at & 0xFFFF | (at >> 16 & 0xFFFF) << 48 | 0x8E00 << 32 | 8 << 16
    lab.write_u64(lab.places.idt + 16 * 14, low, at >> 32)
    source = """
        mov $200, %ecx
    1:  mov %rsi, %cr3
        mov (%rbx), %rax
        add %rax, %r12
        incq (%rbx)
        lea (%rbx), %rdi
        push %rcx
        mov $PT, %eax
        movq $0, (%rax, %r9, 8)
        invlpg (%rbx)
        pop %rcx
        loop 1b
    """
    lab.fill(hole, 8)
    registers = {"rbx": hole, "rsi": root, "r9": hole >> 12 & 511, "r10": hole | 7}
    run = lab.run(source, lab.primary(lab.ept(30), cr3_load_exiting=0) | {F.GUEST_CR3: root},
                  registers)  # fmt: skip
    run.ends()
    equal("the page faults", run.registers["r11"], 200)
    equal("the sum of what was read", run.registers["r12"], 199 * 200 // 2)


@guest_test("SDM: EPT Translation Mechanism", needs=[EPT])
def eptp_must_be_a_supported_one(lab: VmxLab) -> None:
    """An EPTP with a bad memory type, walk length or reserved bit makes entry fail with error 7."""
    root, base = lab.places.nested, lab.ept()
    bad = [root | (EPTP & ~7) | 3, root | EPTP & 7 | 1 << 3, root | EPTP | 1 << 11,
           root | EPTP | 1 << 9]  # fmt: skip
    runs = lab.sweep([base | {F.EPT_POINTER: pointer} for pointer in bad])
    each("the error with", {p: run.result.error for p, run in zip(bad, runs, strict=True)}, 7)
