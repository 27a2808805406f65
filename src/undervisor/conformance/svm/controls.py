"""VMRUN's checks of the control area, and the values that it must accept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.svm.permissions import IOPM_SIZE, MSRPM_SIZE
from undervisor.arch.svm.vmcb import EventInfo, NestedControl
from undervisor.arch.svm.vmcb import VmcbField as F
from undervisor.arch.x86.events import EventType
from undervisor.conformance.expect import each, equal
from undervisor.conformance.suite import guest_test
from undervisor.conformance.svm.lab import Changes, SvmLab
from undervisor.conformance.svm.needs import NPT

CHECKS: Final = "APM: VMRUN Instruction, Canonicalization and Consistency Checks"
VALID: Final = int(EventInfo.v)
NPF_FINAL, NPF_TABLES = 1 << 32, 1 << 33
PAGE: Final = 0x1000


def rejected(lab: SvmLab, what: str, cases: Mapping[str, Changes]) -> None:
    """VMRUN with each of `cases` is VMEXIT_INVALID, and a good one runs afterwards."""
    runs = lab.sweep(list(cases.values()))
    codes = dict(zip(cases, (run.code for run in runs), strict=True))
    each(f"the exit of VMRUN with {what}", codes, ExitCode.INVALID)
    lab.run().ends()


def accepted(lab: SvmLab, what: str, cases: Mapping[str, Changes]) -> None:
    """L2 runs to its VMMCALL with each of `cases`."""
    runs = lab.sweep(list(cases.values()))
    codes = dict(zip(cases, (run.code for run in runs), strict=True))
    each(f"the exit of an L2 with {what}", codes, ExitCode.VMMCALL)


@guest_test(CHECKS, "APM: VMRUN Intercept")
def vmrun_must_be_intercepted(lab: SvmLab) -> None:
    """A VMCB that does not intercept VMRUN is illegal."""
    lab.code("nop")
    lab.run(without=[Intercept.VMRUN]).is_invalid()
    lab.run().ends()


@guest_test(CHECKS, "APM: ASID")
def asid_0_is_illegal(lab: SvmLab) -> None:
    """ASID 0 is the host's: VMRUN with it is illegal."""
    lab.code("nop")
    rejected(lab, "ASID 0", {"ASID 0": {F.GUEST_ASID: 0}})


@guest_test(CHECKS, "APM: SVM Intercept Exit Codes")
def vmexit_invalid_has_64_bits(lab: SvmLab) -> None:
    """VMEXIT_INVALID is -1 in all 64 bits of EXITCODE."""
    lab.code("nop")
    run = lab.run(None, {F.GUEST_ASID: 0})
    equal("EXITCODE", run[F.EXITCODE], ExitCode.INVALID.raw)


@guest_test("APM: ASID", "APM: Function 8000_000Ah: SVM Features")
def every_asid_that_cpuid_counts_is_accepted(lab: SvmLab) -> None:
    """ASIDs from 1 to one less than CPUID Fn8000_000A_EBX can be used."""
    lab.code("nop")
    asids = {asid for asid in (1, 2, lab.facts.asids // 2, lab.facts.asids - 1) if asid}
    accepted(lab, "an ASID", {f"ASID {asid}": {F.GUEST_ASID: asid} for asid in sorted(asids)})


@guest_test(CHECKS)
def a_permission_map_beyond_the_physical_width_is_illegal(lab: SvmLab) -> None:
    """The MSR and I/O permission maps must not reach beyond the maximum physical address."""
    lab.code("nop")
    end = 1 << lab.physical_width()
    cases = {
        f"{field.name} {address:#x}": {field: address}
        for field, size in ((F.IOPM_BASE_PA, IOPM_SIZE), (F.MSRPM_BASE_PA, MSRPM_SIZE))
        for address in (end - size + PAGE, end - PAGE, end, end | lab.places.io, 1 << 52, 1 << 63)
    }
    rejected(lab, "a map out of range", cases)


@guest_test(CHECKS)
def a_permission_map_just_below_the_physical_width_is_accepted(lab: SvmLab) -> None:
    """Maps that end a page before the maximum physical address are legal; nothing reads them."""
    lab.code("nop")
    end = 1 << lab.physical_width()
    accepted(lab, "a map in range", {
        "IOPM": {F.IOPM_BASE_PA: end - IOPM_SIZE - PAGE},
        "MSRPM": {F.MSRPM_BASE_PA: end - MSRPM_SIZE - PAGE},
    })  # fmt: skip


@guest_test("APM: VMCB Layout, Control Area", "APM: I/O Permissions Map", "APM: MSR Intercepts")
def the_low_bits_of_a_maps_address_are_ignored(lab: SvmLab) -> None:
    """Bits 11:0 of IOPM_BASE_PA and MSRPM_BASE_PA are ignored: the maps are pages."""
    places, port, msr = lab.places, 0x5A5, 0x174
    lab.set_bit(places.io, port)
    lab.set_bit(places.msr, 2 * msr)
    changes = {F.IOPM_BASE_PA: places.io | 0xFFF, F.MSRPM_BASE_PA: places.msr | 0xFFF}
    wants = [Intercept.IOIO_PROT, Intercept.MSR_PROT]
    lab.run(f"mov ${port}, %edx; in %dx, %al", changes, wants=wants).exits_with(ExitCode.IOIO)
    lab.run(f"mov ${msr}, %ecx; rdmsr", changes, wants=wants).exits_with(ExitCode.MSR, 0)
    lab.run(f"mov ${port + 1}, %edx; in %dx, %al", changes, wants=wants).ends()


# -- event injection ---------------------------------------------------------------------------


@guest_test("APM: Event Injection")
def an_injected_event_of_a_reserved_type_is_illegal(lab: SvmLab) -> None:
    """EVENTINJ with V set and TYPE 1, 5, 6 or 7 is illegal."""
    lab.code("nop")
    cases = {f"type {kind}": {F.EVENTINJ: VALID | kind << 8 | 0x20} for kind in (1, 5, 6, 7)}
    rejected(lab, "an event of a reserved type", cases)


@guest_test("APM: Event Injection")
def an_injected_exception_must_have_an_exceptions_vector(lab: SvmLab) -> None:
    """TYPE 3 (exception) with vector 2, the NMI's, or one above 31 is illegal."""
    lab.code("nop")
    kind = EventType.EXCEPTION << 8
    cases = {f"vector {v}": {F.EVENTINJ: VALID | kind | v} for v in (2, 32, 33, 64, 128, 255)}
    rejected(lab, "an exception that is none", cases)


@guest_test("APM: Event Injection")
def an_exception_of_another_mode_cannot_be_injected(lab: SvmLab) -> None:
    """An event that is impossible in the guest's mode is illegal: #BR in 64-bit mode."""
    lab.code("nop")
    rejected(lab, "#BR in 64-bit mode", {"#BR": {F.EVENTINJ: VALID | EventType.EXCEPTION << 8 | 5}})


@guest_test("APM: Event Injection")
def without_its_valid_bit_eventinj_is_ignored(lab: SvmLab) -> None:
    """While V is 0, nothing else in EVENTINJ matters."""
    lab.code("nop")
    kinds = range(8)
    accepted(lab, "V clear", {f"type {k}": {F.EVENTINJ: k << 8 | 0xFF | 1 << 11} for k in kinds})


# -- nested paging -----------------------------------------------------------------------------


@guest_test("APM: Nested Paging and VMRUN/#VMEXIT", needs=[NPT])
def nested_cr3_beyond_the_physical_width_is_illegal(lab: SvmLab) -> None:
    """With nested paging, any bit of N_CR3 at or above MAXPHYADDR is illegal."""
    changes = lab.npt()
    lab.code("nop")
    bits = sorted({lab.physical_width(), 51, 52, 62, 63})
    cases = {f"bit {bit}": changes | {F.N_CR3: changes[F.N_CR3] | 1 << bit} for bit in bits}
    rejected(lab, "a nested CR3 out of range", cases)


@guest_test("APM: Nested Paging and VMRUN/#VMEXIT", needs=[NPT])
def nested_cr3_below_the_physical_width_is_accepted(lab: SvmLab) -> None:
    """Any page below MAXPHYADDR is a legal N_CR3; where there is no RAM, L2 gets nowhere."""
    changes = {F.NESTED_CONTROL: int(NestedControl.np_enable)}
    top = (1 << lab.physical_width()) - PAGE
    run = lab.run("nop", changes | {F.N_CR3: top})
    run.exits_with(ExitCode.NPF)


@guest_test("APM: Nested Paging and VMRUN/#VMEXIT", needs=[NPT])
def g_pat_must_have_memory_types(lab: SvmLab) -> None:
    """With nested paging, a type 2 or 3 or a reserved bit in any entry of G_PAT is illegal."""
    changes = lab.npt()
    lab.code("nop")
    good = lab.vmcb.g_pat
    cases = {}
    for entry in range(8):
        for value in (2, 3, 8, 0x80):
            pat = good & ~(0xFF << 8 * entry) | value << 8 * entry
            cases[f"PA{entry} = {value:#x}"] = changes | {F.G_PAT: pat}
    rejected(lab, "G_PAT", cases)


@guest_test("APM: Nested Paging and VMRUN/#VMEXIT")
def without_nested_paging_its_fields_do_not_matter(lab: SvmLab) -> None:
    """While NP_ENABLE is 0, N_CR3 and G_PAT are not looked at."""
    lab.code("nop")
    accepted(lab, "NP_ENABLE clear", {
        "N_CR3": {F.N_CR3: (1 << 64) - 1},
        "G_PAT": {F.G_PAT: (1 << 64) - 1},
    })  # fmt: skip


@guest_test("APM: Nested Paging", "APM: CR3", needs=[NPT])
def the_cache_bits_of_nested_cr3_are_no_address(lab: SvmLab) -> None:
    """PWT and PCD in N_CR3 say how the tables are cached, not where they are."""
    changes = lab.npt()
    root = changes[F.N_CR3]
    lab.code("nop")
    accepted(lab, "bits", {f"{b:#x}": changes | {F.N_CR3: root | b} for b in (8, 0x10, 0x18)})


@guest_test("APM: VMRUN Instruction", "APM: #VMEXIT")
def a_failed_vmrun_changes_no_control(lab: SvmLab) -> None:
    """VMEXIT_INVALID writes what every #VMEXIT writes, and no intercept and no control.

    What it leaves in the state save area the manual does not say.
    """
    lab.code("nop")
    changes = {F.GUEST_ASID: 0, F.TSC_OFFSET: 0x123456789, F.N_CR3: 0x5000}
    wants = [Intercept.INTR, Intercept.EXCP_DB, Intercept.CR0_WRITE]
    before = bytes(lab.area(changes, wants))
    run = lab.run(None, changes, wants=wants)
    run.is_invalid()
    after = bytes(run.vmcb.b)
    for what, start, end in (
        ("the intercepts", 0, 0x18),
        ("the permission maps to ASID", 0x40, 0x5C),
        ("NP_ENABLE", 0x90, 0x98),
        ("N_CR3", 0xB0, 0xB8),
    ):
        equal(what, after[start:end], before[start:end])
    lab.run("nop").ends()
