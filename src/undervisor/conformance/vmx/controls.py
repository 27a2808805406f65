"""Control words and the MSRs that say which settings they may have; addresses and their width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from undervisor.arch.bits import Register
from undervisor.arch.vmx.capabilities import VmcsEnum, VmxBasic, VmxMsr
from undervisor.arch.vmx.controls import (
    CONTROL_WORDS,
    EntryControls,
    ExitControls,
    PinBasedControls,
    PrimaryControls,
    SecondaryControls,
)
from undervisor.arch.vmx.errors import VmInstructionError as Error
from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.registers import Cr4
from undervisor.conformance.expect import Lacking, bits, each, equal, true
from undervisor.conformance.suite import guest_test
from undervisor.conformance.vmx.lab import CONTROLS, VmxLab
from undervisor.conformance.vmx.needs import XSAVES, offered

CHECKS: Final = "SDM: VMX Controls and Host-State Area Checks: VM-Execution Control Fields"
WORDS: Final = {
    "pin-based": PinBasedControls,
    "primary": PrimaryControls,
    "secondary": SecondaryControls,
    "exit": ExitControls,
    "entry": EntryControls,
}
HOST_64: Final = ExitControls.host_address_space_size
GUEST_64: Final = EntryControls.ia32e_mode_guest
NEEDED: Final = {ExitControls: HOST_64, EntryControls: GUEST_64}
"""The bits without which the probe and its L2, both in 64-bit mode, cannot go on."""
CPUID_XSAVES: Final = 1 << 3
"""CPUID.(EAX=0DH,ECX=1):EAX bit 3: XSAVES, XRSTORS and IA32_XSS."""


def _word(lab: VmxLab, kind: type[Register]) -> dict[int, int]:
    """The word as runs have it, activated; Lacking where the processor has none."""
    if CONTROLS[kind] not in lab.facts.capabilities:
        raise Lacking(f"the processor has no {kind.__name__}")
    if kind is SecondaryControls:
        lab.needs(PrimaryControls, "activate_secondary_controls")
    return lab.control(kind)


@guest_test(
    "SDM: VM-Execution Control Fields", "SDM: VMX Capability Reporting Facility", cases=WORDS
)
def a_word_adjusted_by_its_msr_gives_a_working_entry(lab: VmxLab, kind: type[Register]) -> None:
    """A control word that is all 0 but for what its capability MSR wants to be 1 is valid.

    So it is with every bit of the default1 class.
    """
    word, base = CONTROL_WORDS[CONTROLS[kind]], _word(lab, kind)
    capability = lab.facts.capabilities[word.field]
    least = capability.must_be_one | NEEDED.get(kind, 0)
    if kind is PrimaryControls:
        base[F.PRIMARY_CONTROLS] = 0
    runs = lab.sweep(
        [base | {word.field: least}, base | {word.field: capability.adjust(least | word.default1)}]
    )
    for run in runs:
        run.exits_with(ExitReason.VMCALL)


@guest_test(CHECKS, cases={name: WORDS[name] for name in ("pin-based", "primary", "exit", "entry")})
def a_bit_that_must_be_1_is_refused_as_0(lab: VmxLab, kind: type[Register]) -> None:
    """A reserved control bit must have the setting that its capability MSR demands: error 7."""
    base, field = _word(lab, kind), CONTROLS[kind]
    forced = lab.facts.capabilities[field].must_be_one
    cases = {1 << bit: base | {field: base[field] & ~(1 << bit)}
             for bit in range(field.bits) if forced >> bit & 1}  # fmt: skip
    errors = [run.result.error for run in lab.sweep(list(cases.values()))]
    each("the error of an entry without bit", dict(zip(cases, errors, strict=True)),
         Error.ENTRY_WITH_INVALID_CONTROL_FIELDS)  # fmt: skip


@guest_test(CHECKS, cases=WORDS)
def a_bit_that_may_not_be_1_is_refused_as_1(lab: VmxLab, kind: type[Register]) -> None:
    """A control bit whose allowed 1-setting is 0 must be 0: error 7."""
    base, field = _word(lab, kind), CONTROLS[kind]
    allowed = lab.facts.capabilities[field].may_be_one
    cases = {1 << bit: base | {field: base[field] | 1 << bit}
             for bit in range(field.bits) if not allowed >> bit & 1}  # fmt: skip
    if not cases:
        raise Lacking(f"every bit of {kind.__name__} may be 1")
    errors = [run.result.error for run in lab.sweep(list(cases.values()))]
    each("the error of an entry with bit", dict(zip(cases, errors, strict=True)),
         Error.ENTRY_WITH_INVALID_CONTROL_FIELDS)  # fmt: skip


@guest_test("SDM: Secondary Processor-Based VM-Execution Controls")
def a_word_that_is_not_activated_is_not_looked_at(lab: VmxLab) -> None:
    """Secondary controls function as if all were 0 while "activate secondary controls" is 0."""
    lab.needs(PrimaryControls, "activate_secondary_controls")
    inactive = lab.primary(activate_secondary_controls=0)
    lab.run("nop", inactive | {F.SECONDARY_CONTROLS: 0xFFFFFFFF}).ends()


def _combinations(lab: VmxLab) -> dict[str, dict[int, int]]:
    """Settings of controls that exclude each other, of those that the processor has."""
    shadow = {F.VIRTUAL_APIC_ADDRESS: lab.places.apic_page, F.TPR_THRESHOLD: 0}
    pages = shadow | {F.APIC_ACCESS_ADDRESS: lab.places.shadow}
    ways: dict[str, Callable[[], dict[int, int]]] = {
        "virtual NMIs without NMI exiting": lambda: lab.pin(virtual_nmis=1, nmi_exiting=0),
        "NMI window without virtual NMIs": lambda: lab.primary(nmi_window_exiting=1),
        "saved timer without the timer": lambda: lab.on_exit(save_preemption_timer=1),
        "unrestricted guest without EPT": lambda: lab.secondary(unrestricted_guest=1),
        "PML without EPT": lambda: lab.secondary(enable_pml=1) | {F.PML_ADDRESS: lab.places.pml},
        "register virtualization without TPR shadow": lambda: lab.secondary(
            apic_register_virtualization=1
        ),
        "x2APIC virtualization without TPR shadow": lambda: lab.secondary(virtualize_x2apic_mode=1),
        "x2APIC virtualization and APIC accesses": lambda: (
            pages
            | lab.secondary(
                lab.primary(use_tpr_shadow=1), virtualize_x2apic_mode=1, virtualize_apic_accesses=1
            )
        ),
        "virtual interrupts without interrupt exiting": lambda: (
            shadow
            | lab.secondary(
                lab.primary(lab.pin(external_interrupt_exiting=0), use_tpr_shadow=1),
                virtual_interrupt_delivery=1,
            )
        ),
        "a TPR threshold of more than 4 bits": lambda: (
            shadow | lab.primary(use_tpr_shadow=1) | {F.TPR_THRESHOLD: 0x10}
        ),
        "VPID 0": lambda: lab.secondary(enable_vpid=1) | {F.VPID: 0},
        "more than 256 CR3-target values": lambda: {F.CR3_TARGET_COUNT: 257},
        "IA-32e guest of a 32-bit host": lambda: lab.on_exit(host_address_space_size=0),
    }
    return offered(ways)


@guest_test(CHECKS)
def controls_that_exclude_each_other_are_refused(lab: VmxLab) -> None:
    """Controls that depend on others, and values out of range, make VM entry fail."""
    cases = _combinations(lab)
    runs = dict(zip(cases, lab.sweep(list(cases.values())), strict=True))
    # "Host address-space size" is checked with the host state: error 8.
    host = {"IA-32e guest of a 32-bit host": Error.ENTRY_WITH_INVALID_HOST_STATE_FIELDS}
    each(
        "the error of an entry with",
        {what: run.result.error for what, run in runs.items()},
        lambda what: host.get(what, Error.ENTRY_WITH_INVALID_CONTROL_FIELDS),
    )


@guest_test("SDM: Reserved Controls and Default Settings", "SDM: Basic VMX Information")
def the_true_msrs_agree_with_the_plain_ones(lab: VmxLab) -> None:
    """A TRUE capability MSR differs from the plain one only in default1 bits that may be 0."""
    if not lab.facts.basic.true_controls:
        raise Lacking("the processor has no TRUE capability MSRs")
    for word in CONTROL_WORDS.values():
        if word.true_msr is None:
            continue
        with lab.batch() as batch:
            plain, exact = batch.rdmsr(word.msr), batch.rdmsr(word.true_msr)
        name = word.layout.__name__
        bits(f"what the plain MSR of {name} wants to be 1", plain.value & 0xFFFFFFFF,
             ones=word.default1)  # fmt: skip
        equal(f"the allowed 1-settings of {name}", exact.value >> 32, plain.value >> 32)
        freed = (plain.value ^ exact.value) & 0xFFFFFFFF
        true(f"only default1 bits of {name} are free", not freed & ~word.default1, freed)
        true(f"no bit of {name} is more forced", not freed & exact.value, freed & exact.value)


@guest_test("SDM: VM-Execution Controls")
def a_bit_that_must_be_1_may_be_1(lab: VmxLab) -> None:
    """Where bit X of an MSR's low half is 1, bit 32+X is 1: no setting would be valid else."""
    capabilities = lab.facts.capabilities
    each(
        "bits that must be 1 and may not",
        {field: cap.must_be_one & ~cap.may_be_one for field, cap in capabilities.items()},
        0,
    )


@guest_test("SDM: VM-Execution Control Fields", "SDM: XSAVES—Save Processor Extended States")
def the_xsaves_control_is_there_exactly_if_cpuid_shows_xsaves(lab: VmxLab) -> None:
    """ "Enable XSAVES/XRSTORS" may be 1 on a processor whose CPUID has XSAVES, and on no other."""
    with lab.batch() as batch:
        features = batch.cpuid(1)
        states = batch.cpuid(0xD, 1)
    shown = bool(features.value["rcx"] >> 26 & 1 and states.value["rax"] & CPUID_XSAVES)
    allowed = lab.supports(SecondaryControls, "enable_xsaves")
    equal('whether "enable XSAVES/XRSTORS" may be 1', allowed, shown)


SAVE_AND_RESTORE: Final = """
    movq %rcx, %xmm3
    xsaves (%rbx)
    pxor %xmm3, %xmm3
    xrstors (%rbx)
    movq %xmm3, %rsi
"""


def _with_xsave(lab: VmxLab) -> dict[int, int]:
    """XCR0 with x87 and SSE state, and an L2 that may use XSAVE."""
    with lab.batch() as batch:
        batch.write_cr(4, lab.facts.l1.cr4 | Cr4.osxsave)
        enabled = batch.xsetbv(0, 3)
    _ = enabled.value
    lab.fill(lab.places.data, 0x1000)
    cr4 = lab.fields[F.GUEST_CR4] | Cr4.osxsave | Cr4.osfxsr
    return {F.GUEST_CR4: cr4, F.XSS_EXITING_BITMAP: 0}


@guest_test("SDM: XSAVES—Save Processor Extended States", needs=[XSAVES])
def xsaves_and_xrstors_work_in_l2_with_their_control(lab: VmxLab) -> None:
    """With "enable XSAVES/XRSTORS", L2's XSAVES saves in the compacted format, XRSTORS restores."""
    state = _with_xsave(lab) | lab.secondary(enable_xsaves=1)
    registers = {"rbx": lab.places.data, "rax": 3, "rcx": 0x1122334455667788}
    run = lab.run(SAVE_AND_RESTORE, state, registers)
    run.ends()
    equal("XMM3 after XRSTORS", run.registers["rsi"], registers["rcx"])
    layout = lab.read_u64(lab.places.data + 520)
    equal("XCOMP_BV in the saved header", layout, 1 << 63 | 3)


@guest_test("SDM: Changes to Instruction Behavior in VMX Non-Root Operation", needs=[XSAVES])
def xsaves_and_xrstors_are_undefined_without_their_control(lab: VmxLab) -> None:
    """If "enable XSAVES/XRSTORS" is 0, XSAVES and XRSTORS of L2 cause #UD."""
    state = _with_xsave(lab) | lab.secondary(enable_xsaves=0)
    for instruction in ("xsaves (%rbx)", "xrstors (%rbx)"):
        lab.run(instruction, state, {"rbx": lab.places.data, "rax": 3}).delivers(6)


@guest_test("SDM: Definitions of Primary and Secondary Processor-Based VM-Execution Controls")
def controls_of_instructions_follow_cpuid(lab: VmxLab) -> None:
    """A control for an instruction may be 1 only if the processor has the instruction."""
    with lab.batch() as batch:
        leaves = {leaf: batch.cpuid(leaf) for leaf in (1, 7, 0x80000001)}
    for name, leaf, register, bit in (
        ("rdrand_exiting", 1, "rcx", 30), ("rdseed_exiting", 7, "rbx", 18),
        ("enable_invpcid", 7, "rbx", 10), ("enable_rdtscp", 0x80000001, "rdx", 27),
    ):  # fmt: skip
        shown = bool(leaves[leaf].value[register] >> bit & 1)
        if name.endswith("exiting"):
            true(f"{name} only with its instruction",
                 shown or not lab.supports(SecondaryControls, name))  # fmt: skip
        else:
            equal(f"whether {name} may be 1", lab.supports(SecondaryControls, name), shown)


# -- identification --------------------------------------------------------------------------------


@guest_test("SDM: Basic VMX Information")
def ia32_vmx_basic_is_sound(lab: VmxLab) -> None:
    """IA32_VMX_BASIC: a region of at most 4096 bytes, memory type UC or WB, reserved bits 0."""
    basic = VmxBasic(lab.l1.rdmsr(VmxMsr.IA32_VMX_BASIC).value)
    true("a region has 1 to 4096 bytes", 0 < basic.region_size <= 4096, basic.region_size)
    true("the memory type is UC or WB", basic.memory_type in (0, 6), basic.memory_type)
    bits("IA32_VMX_BASIC", int(basic), zeros=1 << 31 | 1 << 47 | 1 << 46 | 1 << 45)


@guest_test("SDM: VMX-Fixed Bits in CR0", "SDM: VMX-Fixed Bits in CR4")
def a_fixed_bit_of_cr0_and_cr4_is_fixed_one_way(lab: VmxLab) -> None:
    """A bit that is 1 in the FIXED0 MSR is 1 in FIXED1; CR4.VMXE, CR0.PE and PG are fixed to 1."""
    with lab.batch() as batch:
        msrs = [batch.rdmsr(VmxMsr.IA32_VMX_CR0_FIXED0 + number) for number in range(4)]
    cr0_ones, cr0_may, cr4_ones, cr4_may = (msr.value for msr in msrs)
    bits("IA32_VMX_CR0_FIXED1", cr0_may, ones=cr0_ones)
    bits("IA32_VMX_CR4_FIXED1", cr4_may, ones=cr4_ones)
    bits("IA32_VMX_CR0_FIXED0", cr0_ones, ones=1 << 31 | 1 << 5 | 1)
    bits("IA32_VMX_CR4_FIXED0", cr4_ones, ones=Cr4.vmxe)


@guest_test("SDM: VMCS Enumeration", "SDM: Field Encoding in VMCS")
def vmcs_enum_has_the_highest_index_of_all_fields(lab: VmxLab) -> None:
    """No encoding that VMREAD supports has a higher index than IA32_VMX_VMCS_ENUM bits 9:1."""
    highest = VmcsEnum(lab.l1.rdmsr(VmxMsr.IA32_VMX_VMCS_ENUM).value).highest_index
    found: dict[int, int | None] = {}
    beyond = min(highest + 16, 0x1FF)
    for kind in range(16):  # width and area, bits 14:13 and 11:10
        base = (kind >> 2) << 13 | (kind & 3) << 10
        with lab.batch() as batch:
            answer = batch.vmreads(
                [base | index << 1 for index in range(beyond + 1)], lab.places.scratch
            )
        found |= answer.value
    most = max(encoding >> 1 & 0x1FF for encoding, value in found.items() if value is not None)
    true("the highest index that VMREAD supports is none beyond", most <= highest, most, highest)
