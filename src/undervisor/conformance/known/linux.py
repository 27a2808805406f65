"""Defects of the KVM of Linux 6.1.192, kvm_intel, on the built-in L0's Intel model.

What is named of KVM's source was read there.  Where the processor under it had been wrong instead,
the built-in L0 was mended: its own column shows that it passes.
"""

from __future__ import annotations

from typing import Final

from undervisor.conformance.known.defect import Known


def _defect(tests: str, what: str, evidence: str, message: str = "") -> Known:
    return Known(r"linux \(intel\)", tests, what, evidence, message)


DEFECTS: Final = (
    # -- VM entry ----------------------------------------------------------------------------------
    _defect(
        r"vmx.entry_rules.each_rule_of_a_section_fails_the_entry\[Checks on Guest Segment Registers"
        r"\]",
        "KVM drops the reserved bits of access rights at VMWRITE, so that no entry can fail by "
        "them.",
        'SDM, "Checks on Guest Segment Registers": reserved bits must be 0. vmcs12_write_any and '
        "handle_vmwrite of Linux 6.1 keep 1F0FFH of these fields, and say that some processors do "
        "the same.",
    ),
    _defect(
        r"vmx.entry_checks.bad_guest_state_is_failure_33"
        r"|vmx.entry_rules.each_rule_of_a_section_fails_the_entry\[Checks on Guest Non-Register "
        r"State\]",
        "KVM enters the HLT state where it is not allowed, and stays in it.",
        'SDM, "Checks on Guest Non-Register State": with blocking by STI or MOV SS, an SS.DPL that '
        "is not 0, or an event that HLT cannot take, the entry fails. "
        "nested_check_guest_non_reg_state of Linux 6.1 looks at the state's number alone; "
        "nested_vmx_run then halts the vCPU without the processor's VM entry, which would have "
        "looked.",
    ),
    _defect(
        r"vmx.entry_checks.a_bad_link_pointer_is_failure_33_with_qualification_4",
        "KVM enters with a link pointer that is the current VMCS.",
        'SDM, "Checks on Guest Non-Register State": outside SMM the link pointer is not the '
        "current-VMCS pointer. nested_vmx_check_vmcs_link_ptr of Linux 6.1 looks at the address "
        "and at the revision identifier.",
    ),
    _defect(
        r"vmx.entry_modes.outside_ia32e_mode_efer_has_lma_0_and_lme_0_under_paging",
        "KVM clears LME at an entry outside IA-32e mode, without paging too.",
        'SDM, "Loading Guest Control Registers, Debug Registers, and MSRs": LME is loaded with '
        "the control only where CR0.PG is 1. nested_vmx_calc_efer of Linux 6.1 does not look at "
        "CR0.",
    ),
    _defect(
        r"vmx.controls_addresses.cr3_just_past_the_width_is_refused",
        "KVM ends the whole machine, L1 too, when L2's tables are where no memory is.",
        'SDM, "Information for VM Exits That Occur During Event Delivery": an EPT misconfiguration '
        "is one of them. The delivery of L2's page fault meets one, which KVM has put where no "
        "memory is; __vmx_handle_exit of Linux 6.1 does not expect that exit in a delivery and "
        "stops the vCPU with KVM_INTERNAL_ERROR_DELIVERY_EV. An L2 so ends its L1.",
    ),
    # -- events ------------------------------------------------------------------------------------
    _defect(
        r"vmx.events_injection.(an_event_is_delivered_through_l2s_idt\[INT1\]"
        r"|a_gp_of_the_delivery_exits_with_the_event"
        r"|a_page_fault_of_the_delivery_exits_with_the_event"
        r"|an_ept_violation_of_the_delivery_exits_with_the_event"
        r"|l2s_own_event_is_told_where_its_delivery_exits)",
        "KVM loses a privileged software exception (INT1) whose delivery it interrupted itself.",
        'SDM, "Information for VM Exits That Occur During Event Delivery": type 5 is named like '
        "the others. __vmx_complete_interrupts of Linux 6.1 puts back NMIs, interrupts and "
        "exceptions of types 3, 4 and 6, and drops all else: an EPT violation of its own in the "
        "delivery is enough. It has no word for ICEBP, which it takes for a #DB of type 3.",
        r"INT1|0x620001|\.byte 0xf1",
    ),
    _defect(
        r"vmx.events.what_iret_unblocks_goes_by_the_nmi_controls",
        "KVM lets IRET unblock NMIs though L1 has them exit without virtual NMIs.",
        'SDM, "Changes to Instruction Behavior in VMX Non-Root Operation": with NMI exiting and '
        "no virtual NMIs IRET does not unblock. vmcs02 of Linux 6.1 always has virtual NMIs, as "
        "KVM needs them for itself.",
    ),
    _defect(
        r"vmx.events.a_fault_of_iret_tells_that_it_unblocked_nmis",
        "KVM hands on a fault of IRET with bit 12 set and NMIs blocked again.",
        'SDM, "Information About NMI Unblocking Due to IRET": bit 12 says that NMIs were blocked '
        "before, and L1 is to block them again. vmx_recover_nmi_blocking of Linux 6.1 has done so "
        "before the exit is reflected.",
    ),
    _defect(
        r"vmx.events_trap.an_ept_violation_of_iret_tells_that_it_unblocked_nmis",
        "KVM drops bit 12 of the qualification of an EPT violation.",
        'SDM, "Information About NMI Unblocking Due to IRET". The walk of Linux 6.1 that finds '
        "that the violation is L1's keeps two bits of the qualification, 8 and 7.",
    ),
    _defect(
        r"vmx.events.hlt_is_an_activity_state_that_entry_loads|vmx.timers.the_timer_wakes_from_hlt",
        "KVM saves the activity state as active when an event ends HLT.",
        'SDM, "Saving Non-Register State": the state before the exit is saved. The vCPU of Linux '
        "6.1 has become runnable before the nested exit is made, and sync_vmcs02_to_vmcs12 takes "
        "what it is then.",
    ),
    _defect(
        r"vmx.apic_posted.requests_are_taken_though_no_notification_is_outstanding",
        "KVM processes posted interrupts only where the outstanding-notification bit is 1.",
        'SDM, "Posted-Interrupt Processing": the vector starts it, and the bit is cleared without '
        "being looked at. vmx_complete_nested_posted_interrupt of Linux 6.1 returns where it is 0.",
    ),
    _defect(
        r"vmx.apic_posted.what_cannot_be_delivered_leaves_l2_in_hlt",
        "KVM lets an interrupt of lower priority exit before the notification is processed.",
        'SDM, "Posted-Interrupt Processing": the local APIC delivers the notification, the higher '
        "vector, first. vmx_check_nested_events of Linux 6.1 makes the exit, and processes what is "
        "posted only where there was none.",
    ),
    # -- instructions ------------------------------------------------------------------------------
    _defect(
        r"vmx.instructions.vmcall_fails_in_root_operation"
        r"|vmx.instructions_modes.every_instruction_(is_undefined_outside_vmx_operation"
        r"|faults_above_cpl_0_in_root_operation|is_undefined_in_compatibility_mode)",
        "VMCALL of L1 is a hypercall to KVM, wherever it is executed.",
        'SDM, "VMCALL": #UD outside VMX operation, a failure in root operation. That KVM takes it '
        "is its interface to guests, and on purpose.",
        r"vmcall|VMCALL",
    ),
)
