"""What VM entry checks of host state and guest state."""

from __future__ import annotations

from typing import Final

from undervisor.arch.vmx.capabilities import VmxMsr
from undervisor.arch.vmx.controls import ActivityState
from undervisor.arch.vmx.errors import VmInstructionError as Error
from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.registers import Cr0, Cr4, Rflags
from undervisor.conformance.expect import each, equal
from undervisor.conformance.suite import guest_test
from undervisor.conformance.vmx.lab import Changes, VmxLab
from undervisor.conformance.vmx.needs import UNRESTRICTED

INVALID: Final = ExitReason.ENTRY_FAILURE_INVALID_GUEST_STATE
UNUSABLE: Final = 1 << 16
NOT_CANONICAL: Final = 1 << 62
VALID: Final = 1 << 31


@guest_test("SDM: Checks on Host Control Registers, MSRs, and SSP",
            "SDM: Checks on Host Segment and Descriptor-Table Registers")  # fmt: skip
def bad_host_state_is_error_8(lab: VmxLab) -> None:
    """Host selectors with RPL or TI, a null CS or TR, bases that are not canonical: error 8."""
    cases: dict[tuple[F, int], Changes] = {}
    for name in ("ES", "CS", "SS", "DS", "FS", "GS", "TR"):
        field = F[f"HOST_{name}_SELECTOR"]
        for bits in (1, 2, 4):
            cases[field, bits] = {field: lab.fields[field] | bits}
    for field in (F.HOST_CS_SELECTOR, F.HOST_TR_SELECTOR):
        cases[field, 0] = {field: 0}
    for field in (
        F.HOST_FS_BASE, F.HOST_GS_BASE, F.HOST_TR_BASE, F.HOST_GDTR_BASE, F.HOST_IDTR_BASE,
        F.HOST_SYSENTER_ESP, F.HOST_SYSENTER_EIP,
    ):  # fmt: skip
        cases[field, NOT_CANONICAL] = {field: NOT_CANONICAL}
    cases[F.HOST_CR4, Cr4.pae] = {F.HOST_CR4: lab.fields[F.HOST_CR4] & ~Cr4.pae}
    runs = dict(zip(cases, lab.sweep(list(cases.values())), strict=True))
    each("the error of", {case: run.result.error for case, run in runs.items()},
         Error.ENTRY_WITH_INVALID_HOST_STATE_FIELDS)  # fmt: skip


def _fixed(lab: VmxLab, cr0: F, cr4: F) -> dict[tuple[str, int], Changes]:
    """Each bit of CR0 and CR4 that VMX operation fixes, the wrong way."""
    with lab.batch() as batch:
        msrs = [batch.rdmsr(VmxMsr.IA32_VMX_CR0_FIXED0 + number) for number in range(4)]
    ones0, may0, ones4, may4 = (msr.value for msr in msrs)
    cases: dict[tuple[str, int], Changes] = {}
    for name, field, ones, may in (("CR0", cr0, ones0, may0), ("CR4", cr4, ones4, may4)):
        for bit in range(64):
            mask = 1 << bit
            if ones & mask or not may & mask:
                cases[name, bit] = {field: lab.fields[field] ^ mask}
    return cases


@guest_test("SDM: Checks on Guest Control Registers, Debug Registers, and MSRs",
            "SDM: VMX-Fixed Bits in CR0", "SDM: VMX-Fixed Bits in CR4")  # fmt: skip
def a_guest_cr_with_a_fixed_bit_the_wrong_way_is_refused(lab: VmxLab) -> None:
    """Guest CR0 and CR4 must hold every bit as the FIXED MSRs demand: entry failure 33."""
    cases = _fixed(lab, F.GUEST_CR0, F.GUEST_CR4)
    runs = dict(zip(cases, lab.sweep(list(cases.values())), strict=True))
    each("the exit reason with bit of",
         {case: run.entered and run[F.EXIT_REASON] for case, run in runs.items()},
         VALID | INVALID)  # fmt: skip


@guest_test("SDM: Checks on Host Control Registers, MSRs, and SSP",
            "SDM: VMX-Fixed Bits in CR0", "SDM: VMX-Fixed Bits in CR4")  # fmt: skip
def a_host_cr_with_a_fixed_bit_the_wrong_way_is_refused(lab: VmxLab) -> None:
    """Host CR0 and CR4 must hold every bit as the FIXED MSRs demand: error 8."""
    cases = _fixed(lab, F.HOST_CR0, F.HOST_CR4)
    runs = dict(zip(cases, lab.sweep(list(cases.values())), strict=True))
    each("the error with bit of", {case: run.result.error for case, run in runs.items()},
         Error.ENTRY_WITH_INVALID_HOST_STATE_FIELDS)  # fmt: skip


@guest_test("SDM: Checks on Guest Control Registers, Debug Registers, and MSRs")
def guest_control_registers_must_fit_the_mode(lab: VmxLab) -> None:
    """An IA-32e guest needs CR0.PG and CR4.PAE; PCIDE needs an IA-32e guest: failure 33.

    Without "unrestricted guest" paging and protection must be on whatever EPT does.
    """
    cr0, cr4 = lab.fields[F.GUEST_CR0], lab.fields[F.GUEST_CR4]
    legacy = lab.on_entry(ia32e_mode_guest=0)
    narrow: dict[int, int] = {F.GUEST_CS_ACCESS_RIGHTS: 0xC09B}
    cases: dict[str, Changes] = {
        "IA-32e guest without PAE": {F.GUEST_CR4: cr4 & ~Cr4.pae},
        "no paging": legacy | narrow | {F.GUEST_CR0: cr0 & ~Cr0.pg},
        "no protection": legacy | narrow | {F.GUEST_CR0: cr0 & ~(Cr0.pg | Cr0.pe)},
        "paging without protection": {F.GUEST_CR0: cr0 & ~Cr0.pe},
        "PCIDE outside IA-32e mode": legacy | narrow | {F.GUEST_CR4: cr4 | Cr4.pcide},
    }
    runs = dict(zip(cases, lab.sweep(list(cases.values())), strict=True))
    each("the exit reason with",
         {case: run.entered and run[F.EXIT_REASON] for case, run in runs.items()},
         VALID | INVALID)  # fmt: skip


@guest_test("SDM: Checks on Guest Control Registers, Debug Registers, and MSRs",
            needs=[UNRESTRICTED])  # fmt: skip
def an_unrestricted_guest_still_needs_protection_for_paging(lab: VmxLab) -> None:
    """With "unrestricted guest" CR0.PE and PG may be 0, but PG = 1 with PE = 0 is failure 33."""
    base = lab.ept() | lab.on_entry(ia32e_mode_guest=0)
    base |= lab.secondary(base, unrestricted_guest=1)
    cr0 = lab.fields[F.GUEST_CR0]
    base[F.GUEST_CS_ACCESS_RIGHTS] = 0xC09B
    lab.code(".code32; mov $7, %eax; cpuid", end="")
    flat, both = lab.sweep(
        [base | {F.GUEST_CR0: cr0 & ~Cr0.pg}, base | {F.GUEST_CR0: cr0 & ~Cr0.pe}]
    )
    flat.exits_with(ExitReason.CPUID)
    equal("EAX of a guest without paging", flat.registers["rax"], 7)
    both.entry_fails(INVALID, 0)


def _bad_guests(lab: VmxLab) -> dict[str, Changes]:
    """Guest states that are wrong in one point, by what is wrong."""
    segment, selector = F.GUEST_CS_ACCESS_RIGHTS, F.GUEST_TR_SELECTOR
    injected = {F.ENTRY_INTERRUPTION_INFORMATION: VALID | 0x30}
    return {
        "RFLAGS bit 63": {F.GUEST_RFLAGS: 2 | 1 << 63},
        "RFLAGS.VM in IA-32e mode": {F.GUEST_RFLAGS: 2 | Rflags.vm},
        "RIP not canonical": {F.GUEST_RIP: NOT_CANONICAL},
        "CS unusable": {segment: UNUSABLE},
        "CS a data segment": {segment: 0xA093},
        "CS not present": {segment: 0xA01B},
        "CS with L and D": {segment: 0xE09B},
        "CS with reserved bits": {segment: 0xA09B | 1 << 8},
        "SS of DPL 3 with CS of DPL 0": {F.GUEST_SS_ACCESS_RIGHTS: 0xC0F3},
        "DS that cannot be read": {F.GUEST_DS_ACCESS_RIGHTS: 0xC099},
        "FS base not canonical": {F.GUEST_FS_BASE: NOT_CANONICAL},
        "TR unusable": {F.GUEST_TR_ACCESS_RIGHTS: UNUSABLE},
        "TR available, not busy": {F.GUEST_TR_ACCESS_RIGHTS: 0x89},
        "TR with TI": {selector: lab.fields[selector] | 4},
        "TR base not canonical": {F.GUEST_TR_BASE: NOT_CANONICAL},
        "LDTR no LDT": {F.GUEST_LDTR_ACCESS_RIGHTS: 0x8B, F.GUEST_LDTR_SELECTOR: 0x40},
        "granularity against the limit": {F.GUEST_DS_LIMIT: 0xFFFFF000},
        "GDTR limit beyond 16 bits": {F.GUEST_GDTR_LIMIT: 0x10000},
        "IDTR base not canonical": {F.GUEST_IDTR_BASE: NOT_CANONICAL},
        "SYSENTER_ESP not canonical": {F.GUEST_SYSENTER_ESP: NOT_CANONICAL},
        "DR7 with upper bits": lab.on_entry(load_debug_controls=1) | {F.GUEST_DR7: 1 << 32 | 0x400},
        "DEBUGCTL reserved bits": lab.on_entry(load_debug_controls=1)
        | {F.GUEST_DEBUGCTL: 1 << 4},
        "activity state 4": {F.GUEST_ACTIVITY_STATE: 4},
        "HLT at CPL 3": {F.GUEST_ACTIVITY_STATE: ActivityState.HLT,
                         F.GUEST_CS_SELECTOR: 0x33, F.GUEST_CS_ACCESS_RIGHTS: 0xA0FB,
                         F.GUEST_SS_SELECTOR: 0x3B, F.GUEST_SS_ACCESS_RIGHTS: 0xC0F3},
        "HLT with blocking by STI": {F.GUEST_ACTIVITY_STATE: ActivityState.HLT,
                                     F.GUEST_INTERRUPTIBILITY_STATE: 1, F.GUEST_RFLAGS: 0x202},
        "blocking by STI with IF = 0": {F.GUEST_INTERRUPTIBILITY_STATE: 1},
        "blocking by STI and by MOV SS": {F.GUEST_INTERRUPTIBILITY_STATE: 3,
                                          F.GUEST_RFLAGS: 0x202},
        "reserved interruptibility": {F.GUEST_INTERRUPTIBILITY_STATE: 1 << 5},
        "reserved pending exceptions": {F.GUEST_PENDING_DEBUG_EXCEPTIONS: 1 << 4},
        "an interrupt with IF = 0": injected,
        "an interrupt into blocking by MOV SS": injected | {
            F.GUEST_INTERRUPTIBILITY_STATE: 2, F.GUEST_RFLAGS: 0x202},
    }  # fmt: skip


@guest_test("SDM: Checks on the Guest State Area", seconds=5)
def bad_guest_state_is_failure_33(lab: VmxLab) -> None:
    """Each of these guest states, valid but in one point, is failure 33 with qualification 0."""
    cases = _bad_guests(lab)
    runs = dict(zip(cases, lab.sweep(list(cases.values())), strict=True))
    each("the exit reason and qualification with",
         {case: run.entered and (run[F.EXIT_REASON], run.qualification)
          for case, run in runs.items()},
         (VALID | INVALID, 0))  # fmt: skip


@guest_test("SDM: Checks on Guest Non-Register State")
def a_bad_link_pointer_is_failure_33_with_qualification_4(lab: VmxLab) -> None:
    """A VMCS link pointer that is no page, or is the current VMCS, gives qualification 4."""
    for pointer in (lab.places.shadow | 1, lab.places.control):
        (run,) = lab.sweep([{F.VMCS_LINK_POINTER: pointer}])
        run.entry_fails(INVALID, 4)
