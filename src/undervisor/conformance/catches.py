"""Which tests must fail under which quirk of the built-in L0, and the words that they then say."""

from __future__ import annotations

from typing import Final

from undervisor.conformance.proof import Catch

CATCHES: Final[dict[str, tuple[Catch, ...]]] = {
    "ap-starts-at-garbage": (
        Catch(
            "svm.processors.a_processor_starts_exactly_where_startup_says",
            "INIT-SIPI-SIPI to 1 processors",
        ),
    ),
    "vmx-xsaves-control-withheld": (
        Catch(
            "vmx.controls.the_xsaves_control_is_there_exactly_if_cpuid_shows_xsaves",
            'whether "enable XSAVES/XRSTORS" may be 1',
        ),
    ),
    "vmx-address-width-one-less": (
        Catch(
            "vmx.controls_addresses.an_address_just_below_the_width_is_accepted",
            "the error of bad host state with the last address in",
        ),
    ),
    "vmx-address-width-one-more": (
        Catch(
            "vmx.controls_addresses.pointers_of_vmx_instructions_keep_the_width",
            "the error of VMCLEAR past the width",
        ),
    ),
    "vmx-stale-cr4-read-shadow": (
        Catch(
            "vmx.control_registers_shadow.the_cr4_read_shadow_holds_while_another_processor_works",
            "CR4 as L2 read it",
        ),
    ),
    "vmx-guest-cr4-unchecked": (
        Catch(
            "vmx.entry_checks.a_guest_cr_with_a_fixed_bit_the_wrong_way_is_refused",
            "the exit reason with bit of",
        ),
    ),
    "vmx-host-state-unchecked": (
        Catch("vmx.entry_checks.bad_host_state_is_error_8", "the error of"),
    ),
    "vmx-reserved-rights-unchecked": (
        Catch("vmx.entry_checks.bad_guest_state_is_failure_33", "with: 1 of"),
    ),
    "vmx-hlt-state-unchecked": (
        Catch("vmx.entry_checks.bad_guest_state_is_failure_33", "gave no answer in"),
    ),
    "vmx-link-pointer-current": (
        Catch(
            "vmx.entry_checks.a_bad_link_pointer_is_failure_33_with_qualification_4",
            "must be the VM-entry failure",
        ),
    ),
    "vmx-lme-cleared": (
        Catch(
            "vmx.entry_modes.outside_ia32e_mode_efer_has_lma_0_and_lme_0_under_paging",
            "no paging: 0, must be 0x100",
        ),
    ),
    "vmx-posted-needs-outstanding": (
        Catch(
            "vmx.apic_posted.requests_are_taken_though_no_notification_is_outstanding",
            "must be L2's handler of vector 134",
        ),
    ),
    "vmx-privilege-unchecked": (
        Catch(
            "vmx.instructions_modes.every_instruction_faults_above_cpl_0_in_root_operation",
            "the fault at CPL 3",
        ),
    ),
    "vmx-io-bitmap-first-port-only": (
        Catch(
            "vmx.exits_io.io_bitmaps_decide_port_by_port[32 bits]", "(port, port whose bit is 1)"
        ),
    ),
    "vmx-msr-bitmap-reads-for-writes": (
        Catch(
            "vmx.exits_msr.a_bit_makes_its_msr_exit_and_no_other",
            "the reason, length and qualification of",
        ),
    ),
    "vmx-monitor-trap-flag-lost": (
        Catch(
            "vmx.events_trap.each_instruction_is_followed_by_an_exit",
            "reason, distance of RIP and qualification behind",
        ),
    ),
    "vmx-tsc-offset-ignored": (
        Catch(
            "vmx.timers.the_offset_is_added_to_every_read_of_the_tsc",
            "RDTSC less the offset is between L1's",
        ),
    ),
    "vmx-entry-failure-without-bit-31": (
        Catch(
            "vmx.entry.a_failure_with_guest_state_sets_bit_31_and_loads_the_host", "the exit reason"
        ),
    ),
    "vmx-msr-load-list-skipped": (
        Catch(
            "vmx.msr.lists_are_loaded_and_stored_in_their_order", "KERNEL_GS_BASE and LSTAR in L2"
        ),
    ),
    "vmx-vmclear-keeps-launched": (
        Catch(
            "vmx.instructions.the_launch_state_decides_between_vmlaunch_and_vmresume",
            "the error of VMRESUME of a clear VMCS",
        ),
    ),
    "vmx-init-dropped-in-l2": (
        Catch(
            "vmx.processors.init_is_blocked_in_root_operation_until_l2_runs",
            "must be exit 3 (INIT_SIGNAL)",
        ),
    ),
    "vmx-nmi-not-blocked": (
        Catch(
            "vmx.events_injection.an_injected_nmi_blocks_nmis",
            "the interruptibility state in the handler",
        ),
    ),
    "vmx-ept-1g-hangs": (
        Catch("vmx.paging.an_l2_works_on_identity_maps[1 GiB]", "gave no answer in"),
    ),
    "vmx-ept-flags-not-set": (
        Catch(
            "vmx.paging_walks.accessed_and_dirty_flags_are_set_as_the_access_needs[4 KiB]",
            "the accessed flags above",
        ),
    ),
    "vmx-invept-ignored": (
        Catch(
            "vmx.tlb.a_changed_ept_entry_is_seen_after_invept[single-context]",
            "what L2 reads with the one and the other EPTP",
        ),
    ),
    "vmx-ept-linear-address-missing": (
        Catch(
            "vmx.paging_walks.a_violation_of_a_page_walk_tells_that_it_is_one", "the qualification"
        ),
    ),
    "vmx-ept-violation-page-address": (
        Catch(
            "vmx.paging.permissions_decide_and_a_violation_tells_them[4 KiB]",
            "(permissions, access)",
        ),
    ),
    "vmx-idt-vectoring-lost": (
        Catch(
            "vmx.events_injection.a_gp_of_the_delivery_exits_with_the_event", "external interrupt"
        ),
    ),
    "vmx-int1-vectoring-lost": (
        Catch("vmx.events_injection.a_gp_of_the_delivery_exits_with_the_event", "INT1: the IDT"),
    ),
    "vmx-interrupt-shadow-lost": (
        Catch(
            "vmx.events.the_shadow_of_sti_and_mov_ss_is_saved",
            "the interruptibility state of sti; cpuid",
        ),
    ),
    "vmx-preemption-timer-not-saved": (
        Catch("vmx.timers.the_timers_value_is_saved_on_demand", "less is left, but not nothing"),
    ),
    "svm-init-redirection-ignored": (
        Catch("svm.processors.a_redirected_init_exits_as_sx", "must be #VMEXIT 0x5e (EXCP_SX)"),
    ),
    "svm-npt-1g-hangs": (
        Catch("svm.paging.l2_works_under_nested_pages_of_1_gib", "gave no answer in"),
    ),
    "svm-vmmcall-answered-by-l0": (
        Catch(
            "svm.instructions.vmmcall_in_l2_without_its_intercept_is_undefined",
            "the vector whose handler L2 stops in",
        ),
    ),
    "svm-vmload-not-intercepted": (
        Catch("svm.instructions.l2s_instructions_exit_with_their_intercepts", "exit and RIP"),
    ),
    "svm-interrupt-masking-ignored": (
        Catch(
            "svm.events.the_interrupt_flag_that_masking_names_decides",
            "the exit, and deliveries before and after STGI",
        ),
    ),
    "svm-vmcb-read-twice": (
        Catch(
            "svm.state_caching.a_checked_vmcb_is_the_one_that_is_used",
            "L2s that ran with an illegal register",
        ),
    ),
    "svm-control-registers-unchecked": (
        Catch("svm.entry.cr0_nw_without_cd_is_illegal", "the exit of VMRUN with NW without CD"),
        Catch("svm.entry.a_reserved_bit_of_cr4_is_illegal", "the exit of VMRUN with CR4"),
    ),
    "svm-event-injection-unchecked": (
        Catch(
            "svm.controls.an_injected_event_of_a_reserved_type_is_illegal",
            "the exit of VMRUN with an event of a reserved type",
        ),
    ),
    "svm-ncr3-low-bits-used": (
        Catch(
            "svm.paging_host.pae_nested_tables_are_aligned_by_32_bytes", "exit, and what L2 copied"
        ),
    ),
    "svm-nothing-flushed": (
        Catch(
            "svm.tlb.a_flush_makes_a_changed_nested_entry_hold[this ASID]",
            "after the change and the flush",
        ),
    ),
    "svm-shutdown-not-intercepted": (
        Catch("svm.exits.a_shutdown_exits_by_its_intercept", "triple fault of L2 on vCPU 0"),
    ),
    "svm-interrupt-shadow-lost": (Catch("svm.state.an_interrupt_shadow_is_saved", "the shadow"),),
    "svm-clean-bits-written": (
        Catch(
            "svm.state_caching.an_exit_does_not_change_the_clean_bits",
            "the clean bits after the exit",
        ),
    ),
    "svm-cpl-not-saved": (
        Catch("svm.entry.l2_may_begin_in_any_mode[64-bit, CPL 3]", "CPL at the exit"),
    ),
    "svm-tsc-offset-ignored": (
        Catch(
            "svm.timers.l2s_tsc_has_the_offset[positive]",
            "RDTSC in L2 less the offset is between L1's before and after",
        ),
    ),
    "svm-iopm-first-port-only": (
        Catch("svm.exits_io.an_access_exits_when_any_of_its_ports_is_in_the_map", "the exit"),
    ),
    "svm-msrpm-reads-for-writes": (
        Catch("svm.exits_msr.an_msr_in_the_map_exits", "exit and EXITINFO1"),
    ),
    "svm-nested-fault-without-stage": (
        Catch(
            "svm.paging.a_fault_in_the_walk_of_l2s_tables_is_told_apart",
            "exit, EXITINFO1, EXITINFO2, RIP",
        ),
    ),
    "svm-nested-fault-page-address": (
        Catch(
            "svm.paging.a_refused_access_exits_with_its_reason_and_address",
            "exit, EXITINFO1, EXITINFO2, RIP",
        ),
    ),
    "svm-exitintinfo-lost": (
        Catch(
            "svm.events_injection.l2s_own_events_are_named_when_their_delivery_exits",
            "the valid bit of EXITINTINFO",
        ),
    ),
    "svm-clgi-ignored": (
        Catch("svm.events.clear_gif_holds_interrupts_and_nmis", "deliveries while GIF is 0"),
    ),
    "svm-virtual-interrupt-priority-ignored": (
        Catch(
            "svm.events_virtual.a_virtual_interrupt_needs_if_and_priority", "L2 got the interrupt"
        ),
    ),
}
