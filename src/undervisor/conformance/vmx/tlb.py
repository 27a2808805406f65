"""Cached translations: what INVEPT, INVVPID, entries and exits must forget, and must keep apart."""

from __future__ import annotations

from typing import Final

from undervisor.arch.vmx.errors import VmInstructionError as Error
from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.registers import Cr4
from undervisor.conformance.expect import Lacking, each, equal, true
from undervisor.conformance.suite import guest_test
from undervisor.conformance.vmx.ept import READ, WRITE, Target
from undervisor.conformance.vmx.lab import EPTP, Changes, VmxLab
from undervisor.conformance.vmx.needs import EPT, VPID, ept

FIRST, SECOND, THIRD = 0x1111, 0x2222, 0x3333
SINGLE, ALL = 1, 2
ADDRESS, CONTEXT, EVERY, RETAINING_GLOBALS = range(4)
INVEPT_TYPES: Final[dict[str, object]] = {"single-context": SINGLE, "all-context": ALL}
INVVPID_TYPES: Final[dict[str, object]] = {
    "individual-address": ADDRESS, "single-context": CONTEXT, "all-context": EVERY,
    "single-context-retaining-globals": RETAINING_GLOBALS,
}  # fmt: skip
CAPABILITY: Final = {
    ADDRESS: "invvpid_individual_address", CONTEXT: "invvpid_single_context",
    EVERY: "invvpid_all_context", RETAINING_GLOBALS: "invvpid_retaining_globals",
}  # fmt: skip
LOAD: Final = "mov (%rbx), %rax"


def _pages(lab: VmxLab) -> tuple[int, int, int]:
    """Three pages of the test's memory, told apart by their first words."""
    base = lab.places.data
    for number, value in enumerate((FIRST, SECOND, THIRD)):
        lab.write_u64(base + 0x1000 * number, value)
    return base, base + 0x1000, base + 0x2000


def _read(lab: VmxLab, changes: Changes, address: int) -> int:
    """What L2 reads at an address."""
    run = lab.run(LOAD, changes, {"rbx": address})
    run.ends()
    return run.registers["rax"]


@guest_test("SDM: INVEPT—Invalidate Translations Derived from EPT", "SDM: Operations that"
            " Invalidate Cached Mappings", cases=INVEPT_TYPES, needs=[EPT])  # fmt: skip
def a_changed_ept_entry_is_seen_after_invept(lab: VmxLab, kind: int) -> None:
    """After INVEPT L2 uses the entry as it is now; another EPTP's translations stay right.

    A page that is mapped elsewhere, and one that may no more be written.
    """
    first, second, third = _pages(lab)
    changes, other = lab.ept(12), lab.ept(12, lab.places.nested2)
    entry = lab.nested_entry(first)
    lab.write_u64(lab.nested_entry(first, root=lab.places.nested2), third | 0x37)
    seen = [_read(lab, changes, first), _read(lab, other, first)]
    lab.write_u64(entry, second | 0x37)
    lab.l1.invept(kind, changes[F.EPT_POINTER])
    seen += [_read(lab, changes, first), _read(lab, other, first)]
    equal("what L2 reads with the one and the other EPTP", seen, [FIRST, THIRD, SECOND, THIRD])
    lab.write_u64(entry, second | 0x31)
    lab.l1.invept(kind, changes[F.EPT_POINTER])
    run = lab.run("mov %rax, (%rbx)", changes, {"rbx": first})
    run.exits_with(ExitReason.EPT_VIOLATION)


@guest_test("SDM: Operations that Invalidate Cached Mappings", needs=[EPT])
def a_violation_that_is_mended_needs_no_invept(lab: VmxLab) -> None:
    """An EPT violation forgets the mappings that it used: an entry mended behind it serves at once.

    First a page that is absent, then one that may not be written.
    """
    target = Target(lab, 12)
    target.map(0)
    for access, rights in ((READ, READ), (WRITE, READ | WRITE)):
        run = target.touch(access)
        run.exits_with(ExitReason.EPT_VIOLATION)
        lab.write_u64(target.leaf, lab.places.data & -0x1000 | 0x30 | rights)
        run = lab.resume(None, run.registers)
        run.ends()


@guest_test("SDM: Restrictions and Operation of VPIDs", needs=[EPT])
def two_eptps_are_kept_apart(lab: VmxLab) -> None:
    """L2s with different EPTPs never use each other's translations, whoever ran last.

    With the same VPID too, where there are VPIDs.
    """
    first, second, _ = _pages(lab)
    one, other = lab.ept(12), lab.ept(12, lab.places.nested2)
    lab.write_u64(lab.nested_entry(first, root=lab.places.nested2), second | 0x37)
    bases = [{}, lab.secondary(enable_vpid=1, enable_ept=1) | {F.VPID: 7}] if VPID.present(
        lab) else [{}]  # fmt: skip
    for base in bases:
        seen = [_read(lab, eptp | base, first) for eptp in (one, other, one, other)]
        equal("what L2 reads in turn", seen, [FIRST, SECOND, FIRST, SECOND])


@guest_test("SDM: VMX Support for Cached Translations", needs=[VPID])
def two_vpids_are_kept_apart(lab: VmxLab) -> None:
    """L2s with different VPIDs and tables never use each other's translations, nor L1's.

    Global pages too, which a load of CR3 does not forget.
    """
    first, second, third = _pages(lab)
    root, own = lab.pages(), lab.places.free
    lab.table(own, 512, lab.places.base | 0x107, 1 << 12)  # the other L2's last table, global
    lab.write_u64(own + 8 * (first >> 12 & 511), second | 0x107)
    for page in (0x1000, 0x2000, 0x3000):
        lab.fill(own + page, 0x1000)
    lab.write_u64(own + 0x1000, own + 0x2000 | 7)
    lab.write_u64(own + 0x2000, own + 0x3000 | 7)
    lab.table(own + 0x3000, 512, 0x87, 1 << 21)
    lab.write_u64(own + 0x3000 + 8 * (first >> 21), own | 7)
    lab.table(lab.places.pt, 512, lab.places.base | 0x107, 1 << 12)
    lab.write_u64(lab.pte(first), third | 0x107)
    vpid = lab.secondary(enable_vpid=1) | {F.GUEST_CR4: lab.fields[F.GUEST_CR4] | Cr4.pge}
    one = vpid | {F.VPID: 1, F.GUEST_CR3: root}
    other = vpid | {F.VPID: 2, F.GUEST_CR3: own + 0x1000}
    seen = []
    for changes in (one, other, one, other):
        seen.append(_read(lab, changes, first))
        equal("what L1 reads at the same address", lab.l1.peek(first, 64).value, FIRST)
    equal("what the L2s read in turn", seen, [THIRD, SECOND, THIRD, SECOND])


@guest_test("SDM: VMX Support for Cached Translations", "SDM: Operations that Invalidate Cached"
            " Mappings")  # fmt: skip
def without_vpid_entries_and_exits_forget_all(lab: VmxLab) -> None:
    """Without "enable VPID" each entry forgets linear translations: L1's change to tables is seen.

    And an exit forgets L2's, global ones included: L1 reads by its own tables.
    """
    first, second, third = _pages(lab)
    changes: Changes = {F.GUEST_CR3: lab.pages(),
                        F.GUEST_CR4: lab.fields[F.GUEST_CR4] | Cr4.pge}  # fmt: skip
    seen = []
    for page in (second, third, first, second):
        lab.write_u64(lab.pte(first), page | 0x107)
        seen.append(_read(lab, changes, first))
        equal("what L1 reads at the same address", lab.l1.peek(first, 64).value, FIRST)
    equal("what L2 reads in turn", seen, [SECOND, THIRD, FIRST, SECOND])


@guest_test("SDM: INVVPID—Invalidate Translations Based on VPID", cases=INVVPID_TYPES,
            needs=[VPID])  # fmt: skip
def a_changed_table_is_seen_after_invvpid(lab: VmxLab, kind: int) -> None:
    """After INVVPID of each type L2 uses its tables as they are; another VPID's stay right."""
    if not getattr(lab.ept_capability(), CAPABILITY[kind]):
        raise Lacking(f"the processor has not {CAPABILITY[kind]}")
    first, second, _ = _pages(lab)
    vpid = lab.secondary(enable_vpid=1) | {F.GUEST_CR3: lab.pages()}
    one, other = vpid | {F.VPID: 5}, lab.secondary(enable_vpid=1) | {F.VPID: 6}
    seen = [_read(lab, one, first), _read(lab, other, first)]
    lab.write_u64(lab.pte(first), second | 7)
    result = lab.l1.invvpid(kind, 5, first)
    true("INVVPID succeeds", result.value.succeeded, result.value.error)
    seen += [_read(lab, one, first), _read(lab, other, first)]
    equal("what the VPIDs' L2s read", seen, [FIRST, FIRST, SECOND, FIRST])


@guest_test("SDM: Caching Translation Information", needs=[VPID])
def l2_invalidates_its_own_translations(lab: VmxLab) -> None:
    """With a VPID L2's INVLPG, MOV to CR3 and toggling of CR4.PGE forget what they must.

    None of them exits.
    """
    first, second, _ = _pages(lab)
    root = lab.pages()
    free = lab.primary(lab.secondary(enable_vpid=1), invlpg_exiting=0, cr3_load_exiting=0)
    free |= {F.GUEST_CR3: root, F.GUEST_CR4: lab.fields[F.GUEST_CR4] | Cr4.pge, F.VPID: 9}
    got: dict[str, object] = {}
    for flush, bits in (("invlpg (%rbx)", 0x107), ("mov %rsi, %cr3", 7),
                        ("mov %cr4, %rax; btc $7, %rax; mov %rax, %cr4; btc $7, %rax;"
                         " mov %rax, %cr4", 0x107)):  # fmt: skip
        lab.write_u64(lab.pte(first), first | bits)
        source = f"mov (%rbx), %rdx; mov %r8, (%rdi); {flush}; mov (%rbx), %rcx"
        registers = {"rbx": first, "rdi": lab.pte(first), "r8": second | bits, "rsi": root}
        lab.l1.invvpid(EVERY)
        run = lab.run(source, free, registers)
        run.ends()
        got[flush] = (run.registers["rdx"], run.registers["rcx"])
    each("before and behind", got, (FIRST, SECOND))


@guest_test("SDM: INVEPT—Invalidate Translations Derived from EPT", needs=[EPT, ept("invept")])
def invept_fails_for_bad_types_and_eptps(lab: VmxLab) -> None:
    """INVEPT with a type that is not supported, or with an EPTP that is none, is error 28."""
    eptp = lab.places.nested | EPTP
    width = lab.l1.cpuid(0x80000008).value["rax"] & 0xFF
    with lab.batch() as batch:
        types = {kind: batch.invept(kind, eptp) for kind in (0, 3, 4, 1 << 32 | 1, (1 << 64) - 1)}
        pointers = {p: batch.invept(SINGLE, p) for p in
                    (0, lab.places.nested, eptp ^ 0x18, eptp ^ 3, 1 << width | EPTP)}  # fmt: skip
        good = [batch.invept(SINGLE, eptp), batch.invept(ALL, 0)]
    each("the error with type", {k: a.value.error for k, a in types.items()},
         Error.INVALID_OPERAND_TO_INVEPT_OR_INVVPID)  # fmt: skip
    each("the error with EPTP", {p: a.value.error for p, a in pointers.items()},
         Error.INVALID_OPERAND_TO_INVEPT_OR_INVVPID)  # fmt: skip
    equal("the outcomes of good ones", [a.value.succeeded for a in good], [True, True])


@guest_test("SDM: INVVPID—Invalidate Translations Based on VPID", needs=[VPID, ept("invvpid")])
def invvpid_fails_for_bad_types_and_descriptors(lab: VmxLab) -> None:
    """INVVPID: bad types, VPID 0, reserved bits and an address that is not canonical are error 28.

    VPID 0 is right for all contexts.
    """
    capability = lab.ept_capability()
    kinds = (ADDRESS, CONTEXT, RETAINING_GLOBALS)
    single = [k for k in kinds if getattr(capability, CAPABILITY[k])]
    with lab.batch() as batch:
        bad = {(kind, 1, 0): batch.invvpid(kind, 1) for kind in (4, 5, 1 << 32, (1 << 64) - 1)}
        bad |= {(kind, 0, 0): batch.invvpid(kind, 0) for kind in single}
        bad |= {(kind, 1 << bit | 1, 0): batch.invvpid(kind, 1 << bit | 1)
                for kind in single for bit in (16, 63)}  # fmt: skip
        if ADDRESS in single:
            bad[ADDRESS, 1, 1 << 62] = batch.invvpid(ADDRESS, 1, 1 << 62)
        good = batch.invvpid(EVERY, 0)
    each("the error of (type, VPID, address)", {c: a.value.error for c, a in bad.items()},
         Error.INVALID_OPERAND_TO_INVEPT_OR_INVVPID)  # fmt: skip
    if capability.invvpid_all_context:
        true("all contexts with VPID 0", good.value.succeeded)
