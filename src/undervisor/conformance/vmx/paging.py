"""EPT: maps of each page size, permissions, misconfigurations, what a violation tells."""

from __future__ import annotations

from itertools import product

from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.conformance import first_mebibyte
from undervisor.conformance.expect import each, equal, true
from undervisor.conformance.suite import guest_test
from undervisor.conformance.vmx.ept import (
    ACCESS,
    FETCH,
    LINEAR,
    MISCONFIGURATION,
    READ,
    SIZES,
    TRANSLATED,
    VIOLATION,
    WRITE,
    WRITE_BACK,
    Target,
    needs_pages,
    outcome,
)
from undervisor.conformance.vmx.lab import EPT_LARGE, VmxLab
from undervisor.conformance.vmx.needs import EPT


@guest_test("SDM: EPT Translation Mechanism", cases=SIZES, needs=[EPT], seconds=8)
def an_l2_works_on_identity_maps(lab: VmxLab, shift: int) -> None:
    """On an identity map of pages of each size an L2 reads, writes, calls and takes exceptions.

    It sums up memory of half a MiB that it has filled itself.
    """
    needs_pages(lab, shift)
    source = """
        mov $0x10000, %ecx
        mov %rbx, %rdi
    1:  mov %rcx, (%rdi)
        add $8, %rdi
        loop 1b
        mov $0x10000, %ecx
        xor %eax, %eax
    2:  sub $8, %rdi
        add (%rdi), %rax
        call 3f
        loop 2b
        int $0x77
    3:  ret
    """
    run = lab.run(source, lab.ept(shift), {"rbx": lab.places.free})
    run.delivers(0x77)
    equal("the sum", run.registers["rax"], 0x10000 * 0x10001 // 2)
    equal("RDI", run.registers["rdi"], lab.places.free)


@guest_test("SDM: EPT Violations", "SDM: Exit Qualification for EPT Violations", cases=SIZES,
            needs=[EPT])  # fmt: skip
def permissions_decide_and_a_violation_tells_them(lab: VmxLab, shift: int) -> None:
    """Each access against each combination of R, W and X of a page.

    A violation tells access, permissions and both addresses; W without R is a misconfiguration, X
    alone too where the processor has no execute-only pages.
    """
    target = Target(lab, shift)
    bad = {WRITE, WRITE | FETCH} | (set() if lab.ept_capability().execute_only else {FETCH})
    got: dict[tuple[int, int], object] = {}
    for rights in range(8):
        target.map(rights)
        for access in ACCESS:
            run = target.touch(access)
            got[rights, access] = outcome(run)
            if run.reason == VIOLATION:
                equal("the guest-linear address", run[F.GUEST_LINEAR_ADDRESS], target.gpa)
                equal("RIP", run.rip, target.gpa if access == FETCH else lab.places.code)

    def want(case: tuple[int, int]) -> tuple[int, int, int]:
        rights, access = case
        if rights in bad:
            return MISCONFIGURATION, 0, target.gpa
        if rights & access:
            return ExitReason.VMCALL, 0, 0
        return VIOLATION, access | rights << 3 | LINEAR | TRANSLATED, target.gpa

    each("(permissions, access): reason, qualification, address", got, want)


@guest_test("SDM: EPT Violations", "SDM: Exit Qualification for EPT Violations", needs=[EPT])
def a_tables_permissions_narrow_those_below(lab: VmxLab) -> None:
    """Permissions are the AND of all entries used, and so the qualification tells them."""
    target = Target(lab, 12)
    target.map(7)
    got: dict[tuple[int, int, int], object] = {}
    for level, rights in product((2, 3), (0, READ, READ | WRITE, READ | FETCH)):
        where = target.entry(level)
        below = target.tables[level - 1]
        lab.write_u64(where, below | rights)
        lab.l1.invept(1, target.changes[F.EPT_POINTER])
        for access in ACCESS:
            got[level, rights, access] = outcome(target.touch(access))
        lab.write_u64(where, below | 7)

    def want(case: tuple[int, int, int]) -> tuple[int, int, int]:
        _, rights, access = case
        if rights & access:
            return ExitReason.VMCALL, 0, 0
        return VIOLATION, access | rights << 3 | LINEAR | TRANSLATED, target.gpa

    each("(level, its permissions, access): reason, qualification, address", got, want)


@guest_test("SDM: EPT Misconfigurations", cases=SIZES, needs=[EPT])
def reserved_memory_types_and_address_bits_are_misconfigured(lab: VmxLab, shift: int) -> None:
    """Memory types 2, 3 and 7, and address bits beyond the width or below the size, exit with 49.

    Bits that are ignored do not matter, nor do any in an entry without permissions.
    """
    target = Target(lab, shift)
    width = lab.l1.cpuid(0x80000008).value["rax"] & 0xFF
    got: dict[tuple[str, int], object] = {}
    for kind in range(8):
        target.map(7, kind << 3)
        got["memory type", kind] = target.touch(READ).reason
    reserved = {*range(width, 52), *range(12, shift)}
    for bit in {*reserved, 9, 10, 52, 55}:
        target.map(7, WRITE_BACK | 1 << bit)
        got["bit", bit] = target.touch(READ).reason
        if bit in (width, 12):
            target.map(0, WRITE_BACK | 1 << bit)
            true("an entry without permissions is a violation", target.touch(READ).reason ==
                 VIOLATION)  # fmt: skip

    def want(case: tuple[str, int]) -> ExitReason:
        bad = case[1] in (2, 3, 7) if case[0] == "memory type" else case[1] in reserved
        return MISCONFIGURATION if bad else ExitReason.VMCALL

    each("the exit", got, want)


@guest_test("SDM: EPT Misconfigurations", needs=[EPT])
def reserved_bits_of_entries_that_name_tables_are_misconfigured(lab: VmxLab) -> None:
    """Bits 6:3 of an entry that references a table are reserved, as is bit 7 of a PML4 entry."""
    target = Target(lab, 12)
    target.map(7)
    got: dict[tuple[int, int], object] = {}
    for level in (2, 3):
        where, entry = target.entry(level), target.tables[level - 1] | 7
        for bit in (3, 4, 5, 6):
            lab.write_u64(where, entry | 1 << bit)
            lab.l1.invept(1, target.changes[F.EPT_POINTER])
            got[level, bit] = target.touch(READ).reason
        lab.write_u64(where, entry)
    each("(level, bit): the exit", got, MISCONFIGURATION)
    root = lab.places.nested
    lab.write_u64(root, (root + 0x1000) | 7 | 1 << 7)
    lab.l1.invept(1, target.changes[F.EPT_POINTER])
    lab.run("nop", target.changes).exits_with(MISCONFIGURATION)


@guest_test("SDM: EPT Translation Mechanism", needs=[EPT])
def a_page_of_a_size_that_is_not_supported_is_misconfigured(lab: VmxLab) -> None:
    """Bit 7 in an entry for 1 GiB is a page if the processor has such, and else reserved."""
    capability = lab.ept_capability()
    target = Target(lab, 12)
    lab.write_u64(target.entry(3), 0 | EPT_LARGE | WRITE_BACK | 7)
    lab.l1.invept(1, target.changes[F.EPT_POINTER])
    target.touch(READ).exits_with(ExitReason.VMCALL if capability.page_1g else MISCONFIGURATION)


@guest_test("SDM: EPT Translation Mechanism", needs=[EPT], cases=SIZES)
def ept_reaches_the_first_mebibyte(lab: VmxLab, shift: int) -> None:
    """Memory below 1 MiB is under EPT what it is to L1, and so is the firmware's."""
    needs_pages(lab, shift)
    begin = lab.ept(shift) | {F.GUEST_CR3: lab.pages()}
    first_mebibyte.is_l1s(lab, lambda code, registers: lab.run(code, begin, registers))
