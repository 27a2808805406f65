"""The VMX capability MSRs and the VMCS fields that follow from a model's VMX features.

SDM, appendices "VMX Capability Reporting Facility" and "Field Encoding in VMCS".
"""

from __future__ import annotations

from collections.abc import Set
from typing import Final

from undervisor.arch.vmx.capabilities import (
    ControlCapability,
    EptVpidCapability,
    FeatureControl,
    ProcessorFacts,
    VmcsEnum,
    VmxBasic,
    VmxCapabilities,
    VmxMisc,
)
from undervisor.arch.vmx.controls import CONTROL_WORDS, ControlWord, EntryControls, ExitControls
from undervisor.arch.vmx.fields import VmcsField
from undervisor.arch.x86.cpuid import Processor
from undervisor.arch.x86.msr import SPEC_CTRL_BITS, DebugCtl
from undervisor.arch.x86.registers import Cr0
from undervisor.hypervisor.models.vmx_features import VMX_FEATURES, Kind

REVISION: Final = 0x55_4E_44_56
"""Our VMCS revision identifier."""

REGION_SIZE: Final = 4096
WRITE_BACK: Final = 6
PREEMPTION_TIMER_SHIFT: Final = 5
"""The preemption timer counts once per 32 ticks of the TSC."""

CR3_TARGETS: Final = 4

CR0_FIXED0: Final = Cr0.pe | Cr0.ne | Cr0.pg
CR0_FIXED1: Final = 0xFFFF_FFFF
CR4_FIXED0: Final = 1 << 13


def capabilities(processor: Processor, cr4_supported: int) -> VmxCapabilities:
    """What the capability MSRs report for a processor with VMX."""
    has = processor.features
    return VmxCapabilities(
        basic=VmxBasic(
            VmxBasic.of(revision=REVISION, region_size=REGION_SIZE, memory_type=WRITE_BACK)
            | _reported(has, VmxBasic)
        ),
        misc=VmxMisc(
            VmxMisc.of(
                preemption_timer_shift=PREEMPTION_TIMER_SHIFT
                if "vmx-preemption-timer" in has
                else 0,
                cr3_targets=CR3_TARGETS,
            )
            | _reported(has, VmxMisc)
        ),
        cr0_fixed0=CR0_FIXED0,
        cr0_fixed1=CR0_FIXED1,
        cr4_fixed0=CR4_FIXED0,
        cr4_fixed1=cr4_supported,
        ept_vpid=_ept_vpid(has),
        vmcs_enum=VmcsEnum.of(highest_index=max(f.index for f in vmcs_fields(has))),
        feature_control=FeatureControl(0),
        controls={field: _control(word, has) for field, word in CONTROL_WORDS.items()},
        processor=facts(processor),
    )


def _reported(has: Set[str], layout: type) -> int:
    """The bits of a reporting MSR that the features set."""
    value = 0
    for feature in VMX_FEATURES:
        if feature.kind is Kind.REPORTED and feature.layout is layout and feature.name in has:
            value |= feature.mask
    return value


def _ept_vpid(has: Set[str]) -> EptVpidCapability:
    """IA32_VMX_EPT_VPID_CAP; EPT paging structures may be uncacheable or write-back."""
    value = _reported(has, EptVpidCapability)
    if "vmx-ept" in has:
        value |= EptVpidCapability.memory_type_uc | EptVpidCapability.memory_type_wb
    return EptVpidCapability(value)


def _control(word: ControlWord, has: Set[str]) -> ControlCapability:
    """A control word's allowed settings: default1 bits forced unless a feature frees them."""
    must, may = word.default1, word.default1
    for feature in VMX_FEATURES:
        if feature.field is not word.field or feature.name not in has:
            continue
        if feature.kind is Kind.MAY_BE_ONE:
            may |= feature.mask
        else:
            must &= ~feature.mask
    if word.field is VmcsField.EXIT_CONTROLS and "lm" in has:
        may |= ExitControls.host_address_space_size
    if word.field is VmcsField.ENTRY_CONTROLS and "lm" not in has:
        may &= ~EntryControls.ia32e_mode_guest
    return ControlCapability(must, may)


def facts(processor: Processor) -> ProcessorFacts:
    """What the rules of VM entry need to know beside the VMX MSRs."""
    has = processor.features
    spec_ctrl = 0
    for name, bit in SPEC_CTRL_BITS.items():
        spec_ctrl |= bit if name in has else 0
    return ProcessorFacts(
        physical_address_width=processor.physical_width,
        linear_address_width=processor.linear_width,
        long_mode="lm" in has,
        no_execute="nx" in has,
        syscall="syscall" in has,
        pages_1g="pdpe1gb" in has,
        rtm="rtm" in has,
        sgx="sgx" in has,
        smx="smx" in has,
        bus_lock_detection="bus-lock-detect" in has,
        user_interrupts="uintr" in has,
        cet_shadow_stack="cet-ss" in has,
        cet_indirect_branch="cet-ibt" in has,
        lam="lam" in has,
        perf_global_ctrl=0,
        debugctl=DebugCtl.DECLARED,
        rtit_ctl=0,
        lbr_ctl=0,
        spec_ctrl=spec_ctrl,
        fred="fred" in has,
    )


# The footnotes of "Field Encoding in VMCS": a field exists only where one of these is supported.
_F = VmcsField
FIELD_NEEDS: Final[dict[VmcsField, tuple[str, ...]]] = {
    _F.VPID: ("vmx-vpid",),
    _F.POSTED_INTERRUPT_NOTIFICATION_VECTOR: ("vmx-posted-intr",),
    _F.EPTP_INDEX: ("vmx-ept-violation-ve",),
    _F.HLAT_PREFIX_SIZE: ("vmx-tertiary-ctls",),
    _F.LAST_PID_POINTER_INDEX: ("vmx-tertiary-ctls",),
    _F.VIRTUAL_TIMER_VECTOR: ("vmx-tertiary-ctls",),
    _F.GUEST_INTERRUPT_STATUS: ("vmx-apicv-vid",),
    _F.PML_INDEX: ("vmx-pml",),
    _F.GUEST_UINV: ("vmx-entry-load-uinv",),
    _F.MSR_BITMAP_ADDRESS: ("vmx-msr-bitmap",),
    _F.IO_BITMAP_A_ADDRESS: ("vmx-io-bitmap",),
    _F.IO_BITMAP_B_ADDRESS: ("vmx-io-bitmap",),
    _F.PML_ADDRESS: ("vmx-pml",),
    _F.VIRTUAL_APIC_ADDRESS: ("vmx-flexpriority",),
    _F.TPR_THRESHOLD: ("vmx-flexpriority",),
    _F.APIC_ACCESS_ADDRESS: ("vmx-apicv-xapic",),
    _F.POSTED_INTERRUPT_DESCRIPTOR_ADDRESS: ("vmx-posted-intr",),
    _F.VM_FUNCTION_CONTROLS: ("vmx-vmfunc",),
    _F.EPT_POINTER: ("vmx-ept",),
    _F.GUEST_PHYSICAL_ADDRESS: ("vmx-ept",),
    _F.GUEST_PDPTE0: ("vmx-ept",),
    _F.GUEST_PDPTE1: ("vmx-ept",),
    _F.GUEST_PDPTE2: ("vmx-ept",),
    _F.GUEST_PDPTE3: ("vmx-ept",),
    _F.EOI_EXIT_BITMAP_0: ("vmx-apicv-vid",),
    _F.EOI_EXIT_BITMAP_1: ("vmx-apicv-vid",),
    _F.EOI_EXIT_BITMAP_2: ("vmx-apicv-vid",),
    _F.EOI_EXIT_BITMAP_3: ("vmx-apicv-vid",),
    _F.EPTP_LIST_ADDRESS: ("vmx-eptp-switching",),
    _F.VMREAD_BITMAP_ADDRESS: ("vmx-shadow-vmcs",),
    _F.VMWRITE_BITMAP_ADDRESS: ("vmx-shadow-vmcs",),
    _F.VIRTUALIZATION_EXCEPTION_INFORMATION_ADDRESS: ("vmx-ept-violation-ve",),
    _F.XSS_EXITING_BITMAP: ("vmx-xsaves",),
    _F.ENCLS_EXITING_BITMAP: ("vmx-encls-exit",),
    _F.SUB_PAGE_PERMISSION_TABLE_POINTER: ("vmx-spp",),
    _F.TSC_MULTIPLIER: ("vmx-tsc-scaling",),
    _F.TERTIARY_CONTROLS: ("vmx-tertiary-ctls",),
    _F.ENCLV_EXITING_BITMAP: ("vmx-enclv-exit",),
    _F.LOW_PASID_DIRECTORY_ADDRESS: ("vmx-pasid",),
    _F.HIGH_PASID_DIRECTORY_ADDRESS: ("vmx-pasid",),
    _F.SHARED_EPT_POINTER: ("vmx-tertiary-ctls",),
    _F.PCONFIG_EXITING_BITMAP: ("vmx-pconfig-exit",),
    _F.HLAT_POINTER: ("vmx-tertiary-ctls",),
    _F.PID_POINTER_TABLE_ADDRESS: ("vmx-tertiary-ctls",),
    _F.SECONDARY_EXIT_CONTROLS: ("vmx-exit-secondary-ctls",),
    _F.SPEC_CTRL_MASK: ("vmx-tertiary-ctls",),
    _F.SPEC_CTRL_SHADOW: ("vmx-tertiary-ctls",),
    _F.GUEST_DEADLINE_SHADOW: ("vmx-tertiary-ctls",),
    _F.INJECTED_EVENT_DATA: ("vmx-entry-load-fred",),
    _F.ORIGINAL_EVENT_DATA: ("vmx-entry-load-fred",),
    _F.MSR_DATA: ("vmx-tertiary-ctls",),
    _F.GUEST_PAT: ("vmx-entry-load-pat", "vmx-exit-save-pat"),
    _F.GUEST_EFER: ("vmx-entry-load-efer", "vmx-exit-save-efer"),
    _F.GUEST_PERF_GLOBAL_CTRL: (
        "vmx-entry-load-perf-global-ctrl",
        "vmx-exit-save-perf-global-ctrl",
    ),
    _F.GUEST_BNDCFGS: ("vmx-entry-load-bndcfgs", "vmx-exit-clear-bndcfgs"),
    _F.GUEST_RTIT_CTL: ("vmx-entry-load-rtit-ctl", "vmx-exit-clear-rtit-ctl"),
    _F.GUEST_LBR_CTL: ("vmx-entry-load-lbr-ctl", "vmx-exit-clear-lbr-ctl"),
    _F.GUEST_PKRS: ("vmx-entry-load-pkrs",),
    _F.GUEST_SPEC_CTRL: ("vmx-entry-load-spec-ctrl",),
    _F.GUEST_DEADLINE: ("vmx-tertiary-ctls",),
    _F.HOST_PAT: ("vmx-exit-load-pat",),
    _F.HOST_EFER: ("vmx-exit-load-efer",),
    _F.HOST_PERF_GLOBAL_CTRL: ("vmx-exit-load-perf-global-ctrl",),
    _F.HOST_PKRS: ("vmx-exit-load-pkrs",),
    _F.HOST_SPEC_CTRL: ("vmx-exit-secondary-ctls",),
    _F.SECONDARY_CONTROLS: ("vmx-secondary-ctls",),
    _F.PLE_GAP: ("vmx-ple",),
    _F.PLE_WINDOW: ("vmx-ple",),
    _F.INSTRUCTION_TIMEOUT_CONTROL: ("vmx-instruction-timeout",),
    _F.PREEMPTION_TIMER_VALUE: ("vmx-preemption-timer",),
    _F.GUEST_S_CET: ("vmx-entry-load-cet",),
    _F.GUEST_SSP: ("vmx-entry-load-cet",),
    _F.GUEST_INTERRUPT_SSP_TABLE_ADDR: ("vmx-entry-load-cet",),
    _F.HOST_S_CET: ("vmx-exit-load-cet",),
    _F.HOST_SSP: ("vmx-exit-load-cet",),
    _F.HOST_INTERRUPT_SSP_TABLE_ADDR: ("vmx-exit-load-cet",),
    **{field: ("vmx-entry-load-fred",) for field in _F if "_FRED_" in field.name},
}


def vmcs_fields(features: Set[str]) -> frozenset[VmcsField]:
    """The VMCS fields that exist on a processor with `features`."""
    return frozenset(
        field
        for field in VmcsField
        if field not in FIELD_NEEDS or any(name in features for name in FIELD_NEEDS[field])
    )
