"""The VMX features by name: which bit of which capability MSR each of them is.

Names are QEMU's where QEMU has one.  Source of the bits: SDM, appendix "VMX Capability Reporting
Facility"; names of controls are in `arch.vmx.controls`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from undervisor.arch.bits import Register
from undervisor.arch.vmx import controls as c
from undervisor.arch.vmx.capabilities import EptVpidCapability, VmxBasic, VmxMisc
from undervisor.arch.vmx.fields import VmcsField


class Kind(Enum):
    """What a VMX feature changes in the capability MSRs."""

    MAY_BE_ONE = "the control's 1-setting is allowed"
    MAY_BE_ZERO = "the control's 0-setting is allowed though it is in the default1 class"
    REPORTED = "the bit is set in the MSR"


@dataclass(frozen=True, slots=True)
class VmxFeature:
    """One VMX feature: `mask` of a control word (`field`) or of a reporting MSR (`layout`)."""

    name: str
    kind: Kind
    mask: int
    layout: type[Register]
    field: VmcsField | None = None

    @property
    def manual(self) -> str:
        """The manual's name of the bit."""
        return next(bits.about for bits in self.layout.FIELDS.values() if bits.mask & self.mask)


def _controls(
    field: VmcsField, layout: type[Register], rows: dict[str, int], kind: Kind = Kind.MAY_BE_ONE
) -> tuple[VmxFeature, ...]:
    """Features that are bits of a control word."""
    return tuple(VmxFeature(name, kind, mask, layout, field) for name, mask in rows.items())


def _reported(layout: type[Register], rows: dict[str, int]) -> tuple[VmxFeature, ...]:
    """Features that are bits of an MSR that reports facts."""
    return tuple(VmxFeature(name, Kind.REPORTED, mask, layout) for name, mask in rows.items())


_PIN = {
    "vmx-intr-exit": c.PinBasedControls.external_interrupt_exiting,
    "vmx-nmi-exit": c.PinBasedControls.nmi_exiting,
    "vmx-vnmi": c.PinBasedControls.virtual_nmis,
    "vmx-preemption-timer": c.PinBasedControls.preemption_timer,
    "vmx-posted-intr": c.PinBasedControls.process_posted_interrupts,
}

_PRIMARY = {
    "vmx-vintr-pending": c.PrimaryControls.interrupt_window_exiting,
    "vmx-tsc-offset": c.PrimaryControls.use_tsc_offsetting,
    "vmx-hlt-exit": c.PrimaryControls.hlt_exiting,
    "vmx-invlpg-exit": c.PrimaryControls.invlpg_exiting,
    "vmx-mwait-exit": c.PrimaryControls.mwait_exiting,
    "vmx-rdpmc-exit": c.PrimaryControls.rdpmc_exiting,
    "vmx-rdtsc-exit": c.PrimaryControls.rdtsc_exiting,
    "vmx-tertiary-ctls": c.PrimaryControls.activate_tertiary_controls,
    "vmx-cr8-load-exit": c.PrimaryControls.cr8_load_exiting,
    "vmx-cr8-store-exit": c.PrimaryControls.cr8_store_exiting,
    "vmx-flexpriority": c.PrimaryControls.use_tpr_shadow,
    "vmx-vnmi-pending": c.PrimaryControls.nmi_window_exiting,
    "vmx-movdr-exit": c.PrimaryControls.mov_dr_exiting,
    "vmx-io-exit": c.PrimaryControls.unconditional_io_exiting,
    "vmx-io-bitmap": c.PrimaryControls.use_io_bitmaps,
    "vmx-mtf": c.PrimaryControls.monitor_trap_flag,
    "vmx-msr-bitmap": c.PrimaryControls.use_msr_bitmaps,
    "vmx-monitor-exit": c.PrimaryControls.monitor_exiting,
    "vmx-pause-exit": c.PrimaryControls.pause_exiting,
    "vmx-secondary-ctls": c.PrimaryControls.activate_secondary_controls,
}

_PRIMARY_MAY_BE_ZERO = {
    "vmx-cr3-load-noexit": c.PrimaryControls.cr3_load_exiting,
    "vmx-cr3-store-noexit": c.PrimaryControls.cr3_store_exiting,
}

_SECONDARY = {
    "vmx-apicv-xapic": c.SecondaryControls.virtualize_apic_accesses,
    "vmx-ept": c.SecondaryControls.enable_ept,
    "vmx-desc-exit": c.SecondaryControls.descriptor_table_exiting,
    "vmx-rdtscp-exit": c.SecondaryControls.enable_rdtscp,
    "vmx-apicv-x2apic": c.SecondaryControls.virtualize_x2apic_mode,
    "vmx-vpid": c.SecondaryControls.enable_vpid,
    "vmx-wbinvd-exit": c.SecondaryControls.wbinvd_exiting,
    "vmx-unrestricted-guest": c.SecondaryControls.unrestricted_guest,
    "vmx-apicv-register": c.SecondaryControls.apic_register_virtualization,
    "vmx-apicv-vid": c.SecondaryControls.virtual_interrupt_delivery,
    "vmx-ple": c.SecondaryControls.pause_loop_exiting,
    "vmx-rdrand-exit": c.SecondaryControls.rdrand_exiting,
    "vmx-invpcid-exit": c.SecondaryControls.enable_invpcid,
    "vmx-vmfunc": c.SecondaryControls.enable_vm_functions,
    "vmx-shadow-vmcs": c.SecondaryControls.vmcs_shadowing,
    "vmx-encls-exit": c.SecondaryControls.enable_encls_exiting,
    "vmx-rdseed-exit": c.SecondaryControls.rdseed_exiting,
    "vmx-pml": c.SecondaryControls.enable_pml,
    "vmx-ept-violation-ve": c.SecondaryControls.ept_violation_ve,
    "vmx-pt-conceal": c.SecondaryControls.conceal_vmx_from_pt,
    "vmx-xsaves": c.SecondaryControls.enable_xsaves,
    "vmx-pasid": c.SecondaryControls.pasid_translation,
    "vmx-mbec": c.SecondaryControls.mode_based_execute_control,
    "vmx-spp": c.SecondaryControls.sub_page_write_permissions,
    "vmx-pt-guest-physical": c.SecondaryControls.pt_uses_guest_physical_addresses,
    "vmx-tsc-scaling": c.SecondaryControls.use_tsc_scaling,
    "vmx-user-wait-pause": c.SecondaryControls.enable_user_wait_and_pause,
    "vmx-pconfig-exit": c.SecondaryControls.enable_pconfig,
    "vmx-enclv-exit": c.SecondaryControls.enable_enclv_exiting,
    "vmx-bus-lock-detection": c.SecondaryControls.vmm_bus_lock_detection,
    "vmx-instruction-timeout": c.SecondaryControls.instruction_timeout,
}

_EXIT = {
    "vmx-exit-load-perf-global-ctrl": c.ExitControls.load_perf_global_ctrl,
    "vmx-exit-ack-intr": c.ExitControls.acknowledge_interrupt,
    "vmx-exit-save-pat": c.ExitControls.save_pat,
    "vmx-exit-load-pat": c.ExitControls.load_pat,
    "vmx-exit-save-efer": c.ExitControls.save_efer,
    "vmx-exit-load-efer": c.ExitControls.load_efer,
    "vmx-exit-save-preemption-timer": c.ExitControls.save_preemption_timer,
    "vmx-exit-clear-bndcfgs": c.ExitControls.clear_bndcfgs,
    "vmx-pt-conceal-exit": c.ExitControls.conceal_vmx_from_pt,
    "vmx-exit-clear-rtit-ctl": c.ExitControls.clear_rtit_ctl,
    "vmx-exit-clear-lbr-ctl": c.ExitControls.clear_lbr_ctl,
    "vmx-exit-clear-uinv": c.ExitControls.clear_uinv,
    "vmx-exit-load-cet": c.ExitControls.load_cet_state,
    "vmx-exit-load-pkrs": c.ExitControls.load_pkrs,
    "vmx-exit-save-perf-global-ctrl": c.ExitControls.save_perf_global_ctrl,
    "vmx-exit-secondary-ctls": c.ExitControls.activate_secondary_controls,
}

_ENTRY = {
    "vmx-entry-ia32e-mode": c.EntryControls.ia32e_mode_guest,
    "vmx-entry-load-perf-global-ctrl": c.EntryControls.load_perf_global_ctrl,
    "vmx-entry-load-pat": c.EntryControls.load_pat,
    "vmx-entry-load-efer": c.EntryControls.load_efer,
    "vmx-entry-load-bndcfgs": c.EntryControls.load_bndcfgs,
    "vmx-pt-conceal-entry": c.EntryControls.conceal_vmx_from_pt,
    "vmx-entry-load-rtit-ctl": c.EntryControls.load_rtit_ctl,
    "vmx-entry-load-uinv": c.EntryControls.load_uinv,
    "vmx-entry-load-cet": c.EntryControls.load_cet_state,
    "vmx-entry-load-lbr-ctl": c.EntryControls.load_lbr_ctl,
    "vmx-entry-load-pkrs": c.EntryControls.load_pkrs,
    "vmx-entry-load-fred": c.EntryControls.load_fred,
    "vmx-entry-load-spec-ctrl": c.EntryControls.load_spec_ctrl,
}

_BASIC = {
    "vmx-dual-monitor": VmxBasic.dual_monitor,
    "vmx-ins-outs": VmxBasic.ins_outs_information,
    "vmx-true-ctls": VmxBasic.true_controls,
    "vmx-any-errcode": VmxBasic.exceptions_without_error_code,
    "vmx-nested-exception": VmxBasic.nested_exception,
}

_MISC = {
    "vmx-store-lma": VmxMisc.exit_stores_efer_lma,
    "vmx-activity-hlt": VmxMisc.activity_hlt,
    "vmx-activity-shutdown": VmxMisc.activity_shutdown,
    "vmx-activity-wait-sipi": VmxMisc.activity_wait_for_sipi,
    "vmx-vmwrite-vmexit-fields": VmxMisc.vmwrite_any_field,
    "vmx-zero-len-inject": VmxMisc.inject_zero_length,
}

_EPT_VPID = {
    "vmx-ept-execonly": EptVpidCapability.execute_only,
    "vmx-page-walk-4": EptVpidCapability.walk_length_4,
    "vmx-page-walk-5": EptVpidCapability.walk_length_5,
    "vmx-ept-2mb": EptVpidCapability.page_2m,
    "vmx-ept-1gb": EptVpidCapability.page_1g,
    "vmx-invept": EptVpidCapability.invept,
    "vmx-eptad": EptVpidCapability.accessed_dirty,
    "vmx-ept-advanced-exitinfo": EptVpidCapability.advanced_exit_information,
    "vmx-ept-supervisor-shadow-stack": EptVpidCapability.supervisor_shadow_stack,
    "vmx-invept-single-context": EptVpidCapability.invept_single_context,
    "vmx-invept-all-context": EptVpidCapability.invept_all_context,
    "vmx-invvpid": EptVpidCapability.invvpid,
    "vmx-invvpid-single-addr": EptVpidCapability.invvpid_individual_address,
    "vmx-invvpid-single-context": EptVpidCapability.invvpid_single_context,
    "vmx-invvpid-all-context": EptVpidCapability.invvpid_all_context,
    "vmx-invvpid-single-context-noglobals": EptVpidCapability.invvpid_retaining_globals,
}

_F = VmcsField
VMX_FEATURES: tuple[VmxFeature, ...] = (
    *_reported(VmxBasic, _BASIC),
    *_controls(_F.PIN_BASED_CONTROLS, c.PinBasedControls, _PIN),
    *_controls(_F.PRIMARY_CONTROLS, c.PrimaryControls, _PRIMARY),
    *_controls(_F.PRIMARY_CONTROLS, c.PrimaryControls, _PRIMARY_MAY_BE_ZERO, kind=Kind.MAY_BE_ZERO),
    *_controls(_F.SECONDARY_CONTROLS, c.SecondaryControls, _SECONDARY),
    *_controls(_F.EXIT_CONTROLS, c.ExitControls, _EXIT),
    *_controls(
        _F.EXIT_CONTROLS,
        c.ExitControls,
        {"vmx-exit-nosave-debugctl": c.ExitControls.save_debug_controls},
        kind=Kind.MAY_BE_ZERO,
    ),
    *_controls(_F.ENTRY_CONTROLS, c.EntryControls, _ENTRY),
    *_controls(
        _F.ENTRY_CONTROLS,
        c.EntryControls,
        {"vmx-entry-noload-debugctl": c.EntryControls.load_debug_controls},
        kind=Kind.MAY_BE_ZERO,
    ),
    *_controls(
        _F.VM_FUNCTION_CONTROLS,
        c.VmFunctionControls,
        {"vmx-eptp-switching": c.VmFunctionControls.eptp_switching},
    ),
    *_reported(VmxMisc, _MISC),
    *_reported(EptVpidCapability, _EPT_VPID),
)

VMX_BY_NAME: dict[str, VmxFeature] = {feature.name: feature for feature in VMX_FEATURES}
if len(VMX_BY_NAME) != len(VMX_FEATURES):
    raise TypeError("a VMX feature is declared twice")
