"""The control fields of a VMCS, their capability MSRs, and the layouts of related fields.

SDM, chapter "Virtual Machine Control Structures": "VM-Execution Control Fields", "VM-Exit Control
Fields", "VM-Entry Control Fields", "Guest-State Area"; appendix "VMX Capability Reporting
Facility".  `about` is the manual's name of a bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from undervisor.arch.bits import Bits, Register, plain_members
from undervisor.arch.vmx.fields import VmcsField


class PinBasedControls(Register):
    """Pin-based VM-execution controls: how asynchronous events are handled."""

    WIDTH = 32
    external_interrupt_exiting = Bits(0, about="External-interrupt exiting")
    nmi_exiting = Bits(3, about="NMI exiting")
    virtual_nmis = Bits(5, about="Virtual NMIs")
    preemption_timer = Bits(6, about="Activate VMX-preemption timer")
    process_posted_interrupts = Bits(7, about="Process posted interrupts")


class PrimaryControls(Register):
    """Primary processor-based VM-execution controls: how synchronous events are handled."""

    WIDTH = 32
    interrupt_window_exiting = Bits(2, about="Interrupt-window exiting")
    use_tsc_offsetting = Bits(3, about="Use TSC offsetting")
    hlt_exiting = Bits(7, about="HLT exiting")
    invlpg_exiting = Bits(9, about="INVLPG exiting")
    mwait_exiting = Bits(10, about="MWAIT exiting")
    rdpmc_exiting = Bits(11, about="RDPMC exiting")
    rdtsc_exiting = Bits(12, about="RDTSC exiting")
    cr3_load_exiting = Bits(15, about="CR3-load exiting")
    cr3_store_exiting = Bits(16, about="CR3-store exiting")
    activate_tertiary_controls = Bits(17, about="Activate tertiary controls")
    cr8_load_exiting = Bits(19, about="CR8-load exiting")
    cr8_store_exiting = Bits(20, about="CR8-store exiting")
    use_tpr_shadow = Bits(21, about="Use TPR shadow")
    nmi_window_exiting = Bits(22, about="NMI-window exiting")
    mov_dr_exiting = Bits(23, about="MOV-DR exiting")
    unconditional_io_exiting = Bits(24, about="Unconditional I/O exiting")
    use_io_bitmaps = Bits(25, about="Use I/O bitmaps")
    monitor_trap_flag = Bits(27, about="Monitor trap flag")
    use_msr_bitmaps = Bits(28, about="Use MSR bitmaps")
    monitor_exiting = Bits(29, about="MONITOR exiting")
    pause_exiting = Bits(30, about="PAUSE exiting")
    activate_secondary_controls = Bits(31, about="Activate secondary controls")


class SecondaryControls(Register):
    """Secondary processor-based VM-execution controls."""

    WIDTH = 32
    virtualize_apic_accesses = Bits(0, about="Virtualize APIC accesses")
    enable_ept = Bits(1, about="Enable EPT")
    descriptor_table_exiting = Bits(2, about="Descriptor-table exiting")
    enable_rdtscp = Bits(3, about="Enable RDTSCP")
    virtualize_x2apic_mode = Bits(4, about="Virtualize x2APIC mode")
    enable_vpid = Bits(5, about="Enable VPID")
    wbinvd_exiting = Bits(6, about="WBINVD exiting")
    unrestricted_guest = Bits(7, about="Unrestricted guest")
    apic_register_virtualization = Bits(8, about="APIC-register virtualization")
    virtual_interrupt_delivery = Bits(9, about="Virtual-interrupt delivery")
    pause_loop_exiting = Bits(10, about="PAUSE-loop exiting")
    rdrand_exiting = Bits(11, about="RDRAND exiting")
    enable_invpcid = Bits(12, about="Enable INVPCID")
    enable_vm_functions = Bits(13, about="Enable VM functions")
    vmcs_shadowing = Bits(14, about="VMCS shadowing")
    enable_encls_exiting = Bits(15, about="Enable ENCLS exiting")
    rdseed_exiting = Bits(16, about="RDSEED exiting")
    enable_pml = Bits(17, about="Enable PML")
    ept_violation_ve = Bits(18, about="EPT-violation #VE")
    conceal_vmx_from_pt = Bits(19, about="Conceal VMX from PT")
    enable_xsaves = Bits(20, about="Enable XSAVES/XRSTORS")
    pasid_translation = Bits(21, about="PASID translation")
    mode_based_execute_control = Bits(22, about="Mode-based execute control for EPT")
    sub_page_write_permissions = Bits(23, about="Sub-page write permissions for EPT")
    pt_uses_guest_physical_addresses = Bits(24, about="Intel PT uses guest physical addresses")
    use_tsc_scaling = Bits(25, about="Use TSC scaling")
    enable_user_wait_and_pause = Bits(26, about="Enable user wait and pause")
    enable_pconfig = Bits(27, about="Enable PCONFIG")
    enable_enclv_exiting = Bits(28, about="Enable ENCLV exiting")
    vmm_bus_lock_detection = Bits(30, about="VMM bus-lock detection")
    instruction_timeout = Bits(31, about="Instruction timeout")


class TertiaryControls(Register):
    """Tertiary processor-based VM-execution controls: 64 bits, none of which must be 1."""

    loadiwkey_exiting = Bits(0, about="LOADIWKEY exiting")
    enable_hlat = Bits(1, about="Enable HLAT")
    ept_paging_write_control = Bits(2, about="EPT paging-write control")
    guest_paging_verification = Bits(3, about="Guest-paging verification")
    ipi_virtualization = Bits(4, about="IPI virtualization")
    enable_msr_list_instructions = Bits(6, about="Enable MSR-list instructions")
    virtualize_spec_ctrl = Bits(7, about="Virtualize IA32_SPEC_CTRL")
    apic_timer_virtualization = Bits(8, about="APIC-timer virtualization")


class ExitControls(Register):
    """Primary VM-exit controls."""

    WIDTH = 32
    save_debug_controls = Bits(2, about="Save debug controls")
    host_address_space_size = Bits(9, about="Host address-space size")
    load_perf_global_ctrl = Bits(12, about="Load IA32_PERF_GLOBAL_CTRL")
    acknowledge_interrupt = Bits(15, about="Acknowledge interrupt on exit")
    save_pat = Bits(18, about="Save IA32_PAT")
    load_pat = Bits(19, about="Load IA32_PAT")
    save_efer = Bits(20, about="Save IA32_EFER")
    load_efer = Bits(21, about="Load IA32_EFER")
    save_preemption_timer = Bits(22, about="Save VMX-preemption timer value")
    clear_bndcfgs = Bits(23, about="Clear IA32_BNDCFGS")
    conceal_vmx_from_pt = Bits(24, about="Conceal VMX from PT")
    clear_rtit_ctl = Bits(25, about="Clear IA32_RTIT_CTL")
    clear_lbr_ctl = Bits(26, about="Clear IA32_LBR_CTL")
    clear_uinv = Bits(27, about="Clear UINV")
    load_cet_state = Bits(28, about="Load CET state")
    load_pkrs = Bits(29, about="Load PKRS")
    save_perf_global_ctrl = Bits(30, about="Save IA32_PERF_GLOBAL_CTRL")
    activate_secondary_controls = Bits(31, about="Activate secondary controls")


class SecondaryExitControls(Register):
    """Secondary VM-exit controls: 64 bits, none of which must be 1."""

    save_fred = Bits(0, about="Save FRED")
    load_fred = Bits(1, about="Load FRED")
    load_spec_ctrl = Bits(2, about="Load IA32_SPEC_CTRL")
    prematurely_busy_shadow_stack = Bits(3, about="Prematurely busy shadow stack")


class EntryControls(Register):
    """VM-entry controls."""

    WIDTH = 32
    load_debug_controls = Bits(2, about="Load debug controls")
    ia32e_mode_guest = Bits(9, about="IA-32e mode guest")
    entry_to_smm = Bits(10, about="Entry to SMM")
    deactivate_dual_monitor_treatment = Bits(11, about="Deactivate dual-monitor treatment")
    load_perf_global_ctrl = Bits(13, about="Load IA32_PERF_GLOBAL_CTRL")
    load_pat = Bits(14, about="Load IA32_PAT")
    load_efer = Bits(15, about="Load IA32_EFER")
    load_bndcfgs = Bits(16, about="Load IA32_BNDCFGS")
    conceal_vmx_from_pt = Bits(17, about="Conceal VMX from PT")
    load_rtit_ctl = Bits(18, about="Load IA32_RTIT_CTL")
    load_uinv = Bits(19, about="Load UINV")
    load_cet_state = Bits(20, about="Load CET state")
    load_lbr_ctl = Bits(21, about="Load guest IA32_LBR_CTL")
    load_pkrs = Bits(22, about="Load PKRS")
    load_fred = Bits(23, about="Load FRED")
    load_spec_ctrl = Bits(24, about="Load IA32_SPEC_CTRL")


class VmFunctionControls(Register):
    """VM-function controls: which functions VMFUNC may invoke."""

    eptp_switching = Bits(0, about="EPTP switching")


@dataclass(frozen=True, slots=True)
class ControlWord:
    """A control field, its layout and where a processor reports what it supports.

    `msr` gives allowed 0-settings (31:0) and allowed 1-settings (63:32), or, where `flexible`,
    just the bits that may be 1.  `true_msr` replaces it when IA32_VMX_BASIC bit 55 is 1.
    `default1` are the bits reported as 1 by `msr` on every processor ("default1 class").
    """

    field: VmcsField
    layout: type[Register]
    msr: int
    true_msr: int | None = None
    default1: int = 0
    flexible: bool = False


CONTROL_WORDS = {
    word.field: word
    for word in (
        ControlWord(VmcsField.PIN_BASED_CONTROLS, PinBasedControls, 0x481, 0x48D, 0x0000_0016),
        ControlWord(VmcsField.PRIMARY_CONTROLS, PrimaryControls, 0x482, 0x48E, 0x0401_E172),
        ControlWord(VmcsField.SECONDARY_CONTROLS, SecondaryControls, 0x48B),
        ControlWord(VmcsField.TERTIARY_CONTROLS, TertiaryControls, 0x492, flexible=True),
        ControlWord(VmcsField.VM_FUNCTION_CONTROLS, VmFunctionControls, 0x491, flexible=True),
        ControlWord(VmcsField.EXIT_CONTROLS, ExitControls, 0x483, 0x48F, 0x0003_6DFF),
        ControlWord(VmcsField.SECONDARY_EXIT_CONTROLS, SecondaryExitControls, 0x493, flexible=True),
        ControlWord(VmcsField.ENTRY_CONTROLS, EntryControls, 0x484, 0x490, 0x0000_11FF),
    )
}
"""Every control word with a capability MSR, in the order in which the manual checks them."""


class AccessRights(Register):
    """A segment register's access rights ("Guest Register State", Format of Access Rights)."""

    WIDTH = 32
    type = Bits(3, 0, "Segment type")
    s = Bits(4, about="S: 0 system, 1 code or data")
    dpl = Bits(6, 5, "DPL")
    present = Bits(7, about="P")
    available = Bits(12, about="AVL")
    long_mode = Bits(13, about="L: 64-bit mode active (CS only)")
    default_big = Bits(14, about="D/B")
    granularity = Bits(15, about="G")
    unusable = Bits(16, about="Segment unusable")


class InterruptibilityState(Register):
    """Guest interruptibility state ("Guest Non-Register State")."""

    WIDTH = 32
    blocking_by_sti = Bits(0, about="Blocking by STI")
    blocking_by_mov_ss = Bits(1, about="Blocking by MOV SS")
    blocking_by_smi = Bits(2, about="Blocking by SMI")
    blocking_by_nmi = Bits(3, about="Blocking by NMI")
    enclave_interruption = Bits(4, about="Enclave interruption")


@plain_members
class ActivityState(IntEnum):
    """Guest activity state."""

    ACTIVE = 0
    HLT = 1
    SHUTDOWN = 2
    WAIT_FOR_SIPI = 3


class PendingDebugExceptions(Register):
    """Guest pending debug exceptions, laid out like DR6."""

    b0 = Bits(0, about="B0")
    b1 = Bits(1, about="B1")
    b2 = Bits(2, about="B2")
    b3 = Bits(3, about="B3")
    bld = Bits(11, about="BLD: bus-lock detected")
    enabled_breakpoint = Bits(12, about="Enabled breakpoint")
    bs = Bits(14, about="BS: single step")
    rtm = Bits(16, about="RTM")


class InterruptionType(IntEnum):
    """Bits 10:8 of VM-entry interruption information, VM-exit and IDT-vectoring information."""

    EXTERNAL_INTERRUPT = 0
    RESERVED = 1
    NMI = 2
    HARDWARE_EXCEPTION = 3
    SOFTWARE_INTERRUPT = 4
    PRIVILEGED_SOFTWARE_EXCEPTION = 5
    SOFTWARE_EXCEPTION = 6
    OTHER_EVENT = 7


class EntryInterruptionInformation(Register):
    """VM-entry interruption-information field."""

    WIDTH = 32
    vector = Bits(7, 0, "Vector of interrupt or exception")
    type = Bits(10, 8, "Interruption type")
    deliver_error_code = Bits(11, about="Deliver error code")
    nested_exception = Bits(13, about="Nested exception (FRED)")
    valid = Bits(31, about="Valid")


class ExitInterruptionInformation(Register):
    """VM-exit interruption-information field."""

    WIDTH = 32
    vector = Bits(7, 0, "Vector of interrupt or exception")
    type = Bits(10, 8, "Interruption type")
    error_code_valid = Bits(11, about="Error code valid")
    nmi_unblocking_due_to_iret = Bits(12, about="NMI unblocking due to IRET")
    nested_exception = Bits(13, about="Nested exception (FRED)")
    valid = Bits(31, about="Valid")


class IdtVectoringInformation(Register):
    """IDT-vectoring information field: the event whose delivery the exit interrupted."""

    WIDTH = 32
    vector = Bits(7, 0, "Vector of interrupt or exception")
    type = Bits(10, 8, "Interruption type")
    error_code_valid = Bits(11, about="Error code valid")
    nested_exception = Bits(13, about="Nested exception (FRED)")
    valid = Bits(31, about="Valid")


class GuestInterruptStatus(Register):
    """Guest interrupt status, for virtual-interrupt delivery."""

    WIDTH = 16
    rvi = Bits(7, 0, "Requesting virtual interrupt")
    svi = Bits(15, 8, "Servicing virtual interrupt")


class ExitReasonField(Register):
    """The exit-reason field ("Basic VM-Exit Information")."""

    WIDTH = 32
    basic = Bits(15, 0, "Basic exit reason")
    prematurely_busy_shadow_stack = Bits(25, about="Shadow stack marked prematurely busy")
    bus_lock = Bits(26, about="Bus lock asserted while in VMX non-root operation")
    enclave_mode = Bits(27, about="VM exit from enclave mode")
    pending_mtf = Bits(28, about="Pending MTF VM exit")
    from_root_operation = Bits(29, about="VM exit from VMX root operation")
    entry_failure = Bits(31, about="VM-entry failure")


class TprThreshold(Register):
    """TPR threshold."""

    WIDTH = 32
    threshold = Bits(3, 0, "TPR threshold")
