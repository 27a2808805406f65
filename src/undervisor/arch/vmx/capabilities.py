"""What a processor says of its VMX: the capability MSRs 0x480-0x493 and what goes with them.

SDM, appendix "VMX Capability Reporting Facility".  Supported is not enabled: these are facts of
the processor; what a VMCS asks for is in `controls`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Self

from undervisor.arch.bits import Bits, Register
from undervisor.arch.vmx.controls import CONTROL_WORDS, ControlWord
from undervisor.arch.vmx.fields import HIGHEST_INDEX, VmcsField
from undervisor.arch.x86.msr import FeatureControl as FeatureControl


class VmxMsr(IntEnum):
    """The MSRs that report VMX capabilities."""

    IA32_FEATURE_CONTROL = 0x3A
    IA32_VMX_BASIC = 0x480
    IA32_VMX_PINBASED_CTLS = 0x481
    IA32_VMX_PROCBASED_CTLS = 0x482
    IA32_VMX_EXIT_CTLS = 0x483
    IA32_VMX_ENTRY_CTLS = 0x484
    IA32_VMX_MISC = 0x485
    IA32_VMX_CR0_FIXED0 = 0x486
    IA32_VMX_CR0_FIXED1 = 0x487
    IA32_VMX_CR4_FIXED0 = 0x488
    IA32_VMX_CR4_FIXED1 = 0x489
    IA32_VMX_VMCS_ENUM = 0x48A
    IA32_VMX_PROCBASED_CTLS2 = 0x48B
    IA32_VMX_EPT_VPID_CAP = 0x48C
    IA32_VMX_TRUE_PINBASED_CTLS = 0x48D
    IA32_VMX_TRUE_PROCBASED_CTLS = 0x48E
    IA32_VMX_TRUE_EXIT_CTLS = 0x48F
    IA32_VMX_TRUE_ENTRY_CTLS = 0x490
    IA32_VMX_VMFUNC = 0x491
    IA32_VMX_PROCBASED_CTLS3 = 0x492
    IA32_VMX_EXIT_CTLS2 = 0x493


class VmxBasic(Register):
    """IA32_VMX_BASIC ("Basic VMX Information")."""

    revision = Bits(30, 0, "VMCS revision identifier")
    region_size = Bits(44, 32, "Size of a VMXON or VMCS region in bytes")
    addresses_32_bit = Bits(48, about="Physical addresses are limited to 32 bits")
    dual_monitor = Bits(49, about="Dual-monitor treatment of SMIs and SMM")
    memory_type = Bits(53, 50, "Memory type for VMCS and referenced structures")
    ins_outs_information = Bits(54, about="INS/OUTS instruction information")
    true_controls = Bits(55, about="TRUE control MSRs; default1 controls may be 0")
    exceptions_without_error_code = Bits(
        56, about="Hardware exceptions may be injected with or without an error code"
    )
    nested_exception = Bits(58, about="VMX nested-exception support")


class VmxMisc(Register):
    """IA32_VMX_MISC ("Miscellaneous Data")."""

    preemption_timer_shift = Bits(4, 0, "VMX-preemption timer rate, as a shift of the TSC")
    exit_stores_efer_lma = Bits(5, about="VM exits store EFER.LMA into IA-32e mode guest")
    activity_hlt = Bits(6, about="Activity state HLT")
    activity_shutdown = Bits(7, about="Activity state shutdown")
    activity_wait_for_sipi = Bits(8, about="Activity state wait-for-SIPI")
    pt_in_vmx = Bits(14, about="Intel PT in VMX operation")
    rdmsr_smbase = Bits(15, about="RDMSR of IA32_SMBASE in SMM")
    cr3_targets = Bits(24, 16, "Number of CR3-target values")
    msr_list_limit = Bits(27, 25, "Recommended maximum of MSRs in a list: 512 * (N + 1)")
    smm_monitor_ctl_2 = Bits(28, about="IA32_SMM_MONITOR_CTL bit 2 may be 1")
    vmwrite_any_field = Bits(29, about="VMWRITE to VM-exit information fields")
    inject_zero_length = Bits(30, about="Injection with instruction length 0")
    mseg_revision = Bits(63, 32, "MSEG revision identifier")


class VmcsEnum(Register):
    """IA32_VMX_VMCS_ENUM ("VMCS Enumeration")."""

    highest_index = Bits(9, 1, "Highest index of a supported encoding")


class EptVpidCapability(Register):
    """IA32_VMX_EPT_VPID_CAP ("VPID and EPT Capabilities")."""

    execute_only = Bits(0, about="Execute-only translations")
    walk_length_4 = Bits(6, about="Page-walk length 4")
    walk_length_5 = Bits(7, about="Page-walk length 5")
    memory_type_uc = Bits(8, about="Uncacheable paging structures")
    memory_type_wb = Bits(14, about="Write-back paging structures")
    page_2m = Bits(16, about="2-MByte pages")
    page_1g = Bits(17, about="1-GByte pages")
    invept = Bits(20, about="INVEPT")
    accessed_dirty = Bits(21, about="Accessed and dirty flags")
    advanced_exit_information = Bits(22, about="Advanced VM-exit information for EPT violations")
    supervisor_shadow_stack = Bits(23, about="Supervisor shadow-stack control")
    invept_single_context = Bits(25, about="INVEPT: single-context")
    invept_all_context = Bits(26, about="INVEPT: all-context")
    invvpid = Bits(32, about="INVVPID")
    invvpid_individual_address = Bits(40, about="INVVPID: individual-address")
    invvpid_single_context = Bits(41, about="INVVPID: single-context")
    invvpid_all_context = Bits(42, about="INVVPID: all-context")
    invvpid_retaining_globals = Bits(43, about="INVVPID: single-context-retaining-globals")
    hlat_prefix_size = Bits(53, 48, "Maximum HLAT prefix size")


@dataclass(frozen=True, slots=True)
class ControlCapability:
    """Which settings of a control word a processor supports.

    `must_be_one`: bits whose allowed 0-setting is 1, so that they must be 1.
    `may_be_one`: bits whose allowed 1-setting is 1, so that they may be 1.
    """

    must_be_one: int
    may_be_one: int

    @classmethod
    def from_msr(cls, value: int, *, flexible: bool = False) -> Self:
        """Decode a capability MSR; a `flexible` one has only allowed 1-settings, 64 of them."""
        return cls(0, value) if flexible else cls(value & 0xFFFF_FFFF, value >> 32)

    def to_msr(self, *, flexible: bool = False) -> int:
        """The MSR value that reports this capability."""
        return self.may_be_one if flexible else self.may_be_one << 32 | self.must_be_one

    def adjust(self, value: int) -> int:
        """The supported setting nearest to `value`: forced bits set, unsupported ones cleared."""
        return (value | self.must_be_one) & self.may_be_one

    def allows(self, value: int) -> bool:
        """Whether a VM entry with `value` passes the check of reserved bits."""
        return self.adjust(value) == value

    def missing(self, value: int) -> int:
        """The bits that must be 1 and are not."""
        return self.must_be_one & ~value

    def excess(self, value: int) -> int:
        """The bits that are 1 and may not be."""
        return value & ~self.may_be_one


ALL_BITS = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class ProcessorFacts:
    """What the rules of VM entry need to know beside the VMX MSRs: CPUID, and the processor's own.

    Each flag says that the processor supports the feature and its bits; the `int`s below the
    widths are masks of the bits that may be 1 in an MSR.  `nmi_needs_no_sti_blocking`: this
    processor refuses to inject an NMI while events are blocked by STI, as the manual allows.
    """

    physical_address_width: int = 46
    linear_address_width: int = 48
    long_mode: bool = True
    no_execute: bool = True
    syscall: bool = True
    pages_1g: bool = True
    rtm: bool = True
    sgx: bool = True
    smx: bool = True
    bus_lock_detection: bool = True
    user_interrupts: bool = True
    cet_shadow_stack: bool = True
    cet_indirect_branch: bool = True
    lam: bool = True
    perf_global_ctrl: int = 0x0001_000F_0000_00FF
    debugctl: int = 0x0000_FFC7
    rtit_ctl: int = 0x0180_FFFF_8F7B_FFFF
    lbr_ctl: int = 0x0000_0000_007F_000F
    spec_ctrl: int = 0x0000_05FF
    fred: bool = True
    nmi_needs_no_sti_blocking: bool = True


@dataclass(frozen=True, slots=True)
class VmxCapabilities:
    """Everything that decides whether a VMCS is valid on one processor."""

    basic: VmxBasic
    misc: VmxMisc
    cr0_fixed0: int
    cr0_fixed1: int
    cr4_fixed0: int
    cr4_fixed1: int
    ept_vpid: EptVpidCapability
    vmcs_enum: VmcsEnum
    feature_control: FeatureControl
    controls: Mapping[VmcsField, ControlCapability]
    processor: ProcessorFacts = field(default_factory=ProcessorFacts)

    # Derived once, because every VM entry asks for them: the width of addresses in VMX
    # structures, the bits beyond it and beyond MAXPHYADDR, and the bounds of the
    # non-canonical hole.
    physical_address_width: int = field(init=False)
    beyond_width: int = field(init=False)
    beyond_maxphyaddr: int = field(init=False)
    canonical_below: int = field(init=False)
    canonical_from: int = field(init=False)

    def __post_init__(self) -> None:
        processor = self.processor
        width = 32 if self.basic.addresses_32_bit else processor.physical_address_width
        half = 1 << processor.linear_address_width - 1
        derived = {
            "physical_address_width": width,
            "beyond_width": ALL_BITS >> width << width,
            "beyond_maxphyaddr": ALL_BITS & ~((1 << processor.physical_address_width) - 1),
            "canonical_below": half,
            "canonical_from": (1 << 64) - half,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def is_canonical(self, address: int) -> bool:
        """Whether the bits above the linear-address width all equal the highest bit within."""
        return address < self.canonical_below or address >= self.canonical_from

    @classmethod
    def from_msrs(
        cls, msrs: Mapping[int, int], processor: ProcessorFacts | None = None
    ) -> VmxCapabilities:
        """Read the capability MSRs; one that is absent reports nothing supported.

        KeyError where IA32_VMX_BASIC is absent: the processor has no VMX.
        """
        basic = VmxBasic(msrs[VmxMsr.IA32_VMX_BASIC])
        return cls(
            basic=basic,
            misc=VmxMisc(msrs.get(VmxMsr.IA32_VMX_MISC, 0)),
            cr0_fixed0=msrs.get(VmxMsr.IA32_VMX_CR0_FIXED0, 0),
            cr0_fixed1=msrs.get(VmxMsr.IA32_VMX_CR0_FIXED1, 0),
            cr4_fixed0=msrs.get(VmxMsr.IA32_VMX_CR4_FIXED0, 0),
            cr4_fixed1=msrs.get(VmxMsr.IA32_VMX_CR4_FIXED1, 0),
            ept_vpid=EptVpidCapability(msrs.get(VmxMsr.IA32_VMX_EPT_VPID_CAP, 0)),
            vmcs_enum=VmcsEnum(msrs.get(VmxMsr.IA32_VMX_VMCS_ENUM, 0)),
            feature_control=FeatureControl(msrs.get(VmxMsr.IA32_FEATURE_CONTROL, 0)),
            controls={
                name: _control_capability(word, msrs, basic) for name, word in CONTROL_WORDS.items()
            },
            processor=processor or ProcessorFacts(),
        )

    def to_msrs(self) -> dict[int, int]:
        """The MSR values that report these capabilities."""
        msrs: dict[int, int] = {
            VmxMsr.IA32_FEATURE_CONTROL: self.feature_control,
            VmxMsr.IA32_VMX_BASIC: self.basic,
            VmxMsr.IA32_VMX_MISC: self.misc,
            VmxMsr.IA32_VMX_CR0_FIXED0: self.cr0_fixed0,
            VmxMsr.IA32_VMX_CR0_FIXED1: self.cr0_fixed1,
            VmxMsr.IA32_VMX_CR4_FIXED0: self.cr4_fixed0,
            VmxMsr.IA32_VMX_CR4_FIXED1: self.cr4_fixed1,
            VmxMsr.IA32_VMX_VMCS_ENUM: self.vmcs_enum,
            VmxMsr.IA32_VMX_EPT_VPID_CAP: self.ept_vpid,
        }
        for word, capability in self._words():
            forced = capability.must_be_one | word.default1
            plain = replace(capability, must_be_one=forced)
            msrs[word.msr] = plain.to_msr(flexible=word.flexible)
            if word.true_msr is not None and self.basic.true_controls:
                msrs[word.true_msr] = capability.to_msr()
        return {int(index): int(value) for index, value in msrs.items()}

    def _words(self) -> Iterator[tuple[ControlWord, ControlCapability]]:
        return ((word, self.controls[name]) for name, word in CONTROL_WORDS.items())


def _control_capability(
    word: ControlWord, msrs: Mapping[int, int], basic: VmxBasic
) -> ControlCapability:
    """The word's capability from the TRUE MSR where the processor has it."""
    msr = word.true_msr if word.true_msr is not None and basic.true_controls else word.msr
    return ControlCapability.from_msr(msrs.get(msr, 0), flexible=word.flexible)


def _everything(word: ControlWord) -> ControlCapability:
    """All declared bits may be 1; of the default1 bits only the reserved ones must be."""
    layout = word.layout
    return ControlCapability(word.default1 & ~layout.DECLARED, layout.DECLARED | word.default1)


CURRENT_PROCESSOR = VmxCapabilities(
    basic=VmxBasic.of(
        revision=1,
        region_size=4096,
        dual_monitor=1,
        memory_type=6,
        ins_outs_information=1,
        true_controls=1,
        exceptions_without_error_code=1,
        nested_exception=1,
    ),
    misc=VmxMisc.of(
        preemption_timer_shift=5,
        exit_stores_efer_lma=1,
        activity_hlt=1,
        activity_shutdown=1,
        activity_wait_for_sipi=1,
        pt_in_vmx=1,
        rdmsr_smbase=1,
        cr3_targets=4,
        smm_monitor_ctl_2=1,
        vmwrite_any_field=1,
        inject_zero_length=1,
    ),
    cr0_fixed0=0x8000_0021,
    cr0_fixed1=0xFFFF_FFFF,
    cr4_fixed0=0x0000_2000,
    cr4_fixed1=0x1_1BFF_7FFF,
    ept_vpid=EptVpidCapability(
        EptVpidCapability.DECLARED & ~EptVpidCapability.hlat_prefix_size | 52 << 48
    ),
    vmcs_enum=VmcsEnum.of(highest_index=HIGHEST_INDEX),
    feature_control=FeatureControl.of(lock=1, vmx_outside_smx=1),
    controls={name: _everything(word) for name, word in CONTROL_WORDS.items()},
)
"""A processor that has everything that current ones have, for use when none is given.

It forces only what every processor forces, so that a rule broken here is broken everywhere,
except where a real processor has more address bits or CR4 bits.
"""
