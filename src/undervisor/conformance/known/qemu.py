"""Defects of QEMU's TCG as an L0: SVM of version 7.2.22."""

from __future__ import annotations

from typing import Final

from undervisor.conformance.known.defect import Known


def _defect(tests: str, what: str, evidence: str, message: str = "") -> Known:
    return Known(r"qemu \(.*\)", tests, what, evidence, message)


_RULES: Final = "docs/rules-compared.md names each rule and settles it from the manual's words."

DEFECTS: Final = (
    # -- VMRUN -----------------------------------------------------------------------------------
    _defect(
        r"svm.controls.vmexit_invalid_has_64_bits",
        "QEMU writes VMEXIT_INVALID as FFFFFFFFH: the upper half of EXITCODE is 0.",
        'APM, "SVM Intercept Exit Codes": the code is -1, and EXITCODE has 64 bits. QEMU 7.2 hands '
        "the code on as a 32-bit number without sign.",
    ),
    _defect(
        r"svm.controls.the_low_bits_of_a_maps_address_are_ignored",
        "QEMU uses bits 11:0 of IOPM_BASE_PA and MSRPM_BASE_PA, and so looks up the wrong bits.",
        'APM, "VMCB Layout, Control Area": bits 11:0 of both fields are ignored. QEMU 7.2 adds a '
        "port's or an MSR's offset to the field as it is.",
    ),
    _defect(
        r"svm.controls.an_exception_of_another_mode_cannot_be_injected",
        "QEMU injects #BR into 64-bit code.",
        'APM, "Event Injection": an event that is impossible in the guest\'s mode, for which it '
        "names this very one, is VMEXIT_INVALID.",
    ),
    _defect(
        r"svm.controls.(nested_cr3_beyond_the_physical_width_is_illegal"
        r"|g_pat_must_have_memory_types)|svm.paging_host.nested_paging_needs_a_host_with_paging",
        "QEMU makes none of the checks of nested paging: N_CR3, G_PAT and the host's CR0.PG may be "
        "anything.",
        'APM, "Nested Paging and VMRUN/#VMEXIT" and "Enabling Nested Paging": each of the three is '
        "VMEXIT_INVALID. QEMU 7.2's VMRUN loads N_CR3 and looks at none.",
    ),
    _defect(
        r"svm.entry.(a_reserved_bit_of_efer_is_illegal"
        r"|a_bit_of_cr4_without_its_feature_is_illegal)",
        "QEMU enters with EFER.FFXSR or CR4.PCIDE set, though its CPUID has not the feature.",
        'APM, "Canonicalization and Consistency Checks": a bit that must be zero, which that of an '
        "absent feature is, is illegal in either register.",
        message=r"1 of \d+ wrong: (ffxsr|pcide)",
    ),
    _defect(
        r"svm.entry_rules.each_rule_of_a_section_fails_vmrun.*",
        "QEMU's VMRUN lacks these checks and enters L2.",
        _RULES,
    ),
    _defect(
        r"svm.state.an_interrupt_shadow_(is_loaded|survives_an_exit)",
        "QEMU's VMRUN does not load INTERRUPT_SHADOW: L2 is interrupted in its shadow.",
        'APM, "Interrupt Shadows": VMRUN loads the shadow from the VMCB, and #VMEXIT saves it. '
        "QEMU 7.2 saves it and never reads it.",
    ),
    _defect(
        r"svm.paging.l2_has_a_pat_of_its_own",
        "QEMU has one PAT for L1 and L2: VMRUN does not load G_PAT.",
        'APM, "Nested Paging": a guest has its own copy of PAT, in G_PAT. QEMU 7.2 does not read '
        "that field.",
    ),
    _defect(
        r"svm.state.the_hosts_flags_come_back_and_its_breakpoints_do_not",
        "QEMU's #VMEXIT brings L1's DR7 back, with its breakpoints enabled.",
        'APM, "#VMEXIT": DR7 is set to "all disabled". QEMU 7.2 saves DR7 in the host\'s area at '
        "VMRUN and loads it again.",
    ),
    # -- intercepts ------------------------------------------------------------------------------
    _defect(
        r"svm.exits.each_instruction_exits_by_its_intercept",
        "QEMU does not know the intercepts of RDTSCP and XSETBV, takes WBINVD's for that of INVD, "
        "and has no ICEBP.",
        'APM, "Instruction Intercepts": each of the four has its own bit and its own code. QEMU '
        "7.2 asks for RDTSC's at RDTSCP and for WBINVD's at INVD, and has F1H not compiled in.",
    ),
    _defect(
        r"svm.exits.without_their_intercepts_instructions_run",
        "QEMU lets RDTSCP exit by the intercept of RDTSC. VMLOAD and VMSAVE exit from an L2 without"
        " nested paging although they are not intercepted.",
        'APM, "Intercept Operation": an intercept is a bit for one instruction. QEMU 7.2 decides '
        "about virtualized VMLOAD and VMSAVE first, and exits where those cannot be.",
    ),
    _defect(
        r"svm.instructions.vmload_in_l2_without_its_intercept_loads",
        "QEMU's VMLOAD and VMSAVE exit from an L2 without nested paging though not intercepted.",
        'APM, "VMLOAD": it exits if the intercept bit is 1. QEMU 7.2 decides about the virtualized '
        "form first, and exits where that cannot be.",
    ),
    _defect(
        r"svm.timers.rdtsc_and_rdtscp_have_an_intercept_each",
        "QEMU lets RDTSCP exit by the intercept of RDTSC.",
        'APM, "Instruction Intercepts": RDTSCP has a bit and an exit code of its own, 87H.',
    ),
    _defect(
        r"svm.control_registers.xsetbv_exits_between_its_exceptions",
        "QEMU does not know the intercept of XSETBV.",
        'APM, "Instruction Intercepts": XSETBV exits with code 8DH, before its #GP.',
    ),
    _defect(
        r"svm.exits_exceptions.icebp_is_not_the_debug_exception_to_the_intercepts",
        "QEMU has no ICEBP: F1H is #UD.",
        'APM, "INT1": the byte raises #DB, and has an intercept of its own. QEMU 7.2 is compiled '
        "without it; later versions have it.",
    ),
    _defect(
        r"svm.(exits.int3_and_into_are_no_software_interrupts_to_the_intercepts"
        r"|exits_exceptions.(an_intercepted_exception_exits_at_its_instruction"
        r"|legacy_exceptions_exit_too)"
        r"|events_injection.l2s_own_events_are_named_when_their_delivery_exits)",
        "QEMU treats INT3 and INTO as INT n: they exit by the intercept of software interrupts, and"
        " are named as such in EXITINTINFO.",
        'APM, "Exception Intercepts" and "EXITINTINFO": #BP and #OF have exception intercepts and '
        'are exceptions (type 3) in EXITINTINFO; "software interrupt" is INT n. QEMU 7.2 raises '
        "both by the path of INT n.",
    ),
    _defect(
        r"svm.events_injection.two_contributory_exceptions_are_a_double_fault",
        "QEMU delivers a double fault to L2 though L1 intercepts #DF.",
        'APM, "Exception Intercepts": #DF is one like any other. QEMU 7.2 looks at the intercept '
        "of the second exception before it makes a double fault of the two, and not again.",
    ),
    _defect(
        r"svm.exits.a_shutdown_without_its_intercept_ends_the_machine",
        "QEMU exits with SHUTDOWN from every triple fault of L2, intercepted or not.",
        'APM, "Shutdown Intercept": the exit comes if the bit is 1; else the processor shuts down. '
        "QEMU 7.2 does not ask for the bit.",
    ),
    _defect(
        r"svm.exits.the_conditional_mwait_intercept_asks_for_an_armed_monitor",
        "QEMU arms no monitor: its MWAIT halts the processor whatever MONITOR did, for ever where "
        "no interrupt comes.",
        'APM, "MWAIT": without an armed monitor the instruction ends at once. QEMU 7.2 knows the '
        "intercept of MWAIT, not the conditional one.",
    ),
    _defect(
        r"svm.exits_io.(string_io_says_so|real_mode_io_exits_as_well)",
        "QEMU's EXITINFO1 of INS and OUTS lacks the address size.",
        'APM, "IOIO Intercept": bits 9:7 say whether addresses have 64, 32 or 16 bits. QEMU 7.2 '
        "leaves all three 0.",
    ),
    # -- events ----------------------------------------------------------------------------------
    _defect(
        r"svm.events_injection.a_fault_in_the_delivery_names_the_injected_event.*",
        "QEMU's error code of a fault in the IDT of 64-bit mode has the vector doubled: 16 for "
        "each, where it must be 8.",
        'APM, "Selector-Error Code": bits 15:3 are the index of the gate, which is the vector. '
        "QEMU 7.2 calculates 16 times the vector, the gate's offset, plus 2.",
        message="the error code's gate",
    ),
    _defect(
        r"svm.events_injection.(an_injected_exception_counts_for_the_double_fault"
        r"|a_fault_while_a_double_fault_is_delivered_is_a_shutdown)",
        "QEMU forgets that the event whose delivery faults was injected: the second exception is "
        "delivered alone, and a fault in the delivery of #DF is no shutdown.",
        'APM, "Event Injection": injected events are treated as if they had happened in the guest, '
        "which they do for the double fault too. QEMU 7.2 clears its note of the first exception "
        "before VMRUN's injection and does not set it.",
    ),
    _defect(
        r"svm.events_virtual.a_virtual_interrupt_(needs_if_and_priority"
        r"|exits_before_it_is_taken)",
        "QEMU takes a virtual interrupt whose priority is equal to V_TPR.",
        'APM, "Virtual Interrupts": it is taken if V_INTR_PRIO is above V_TPR, as a class of '
        "interrupts must be above the TPR's. QEMU 7.2 compares by at least.",
        message=r"\d of \d+ wrong: priority 8, TPR 8: ",
    ),
    _defect(
        r"svm.events_virtual.(lowering_cr8_lets_a_virtual_interrupt_in|a_virtual_interrupt_.*)",
        "QEMU aborts: MOV to CR8 by L2 with a virtual interrupt pending fails an assertion about "
        "its own lock.",
        'APM, "Virtual Interrupts, V_INTR_MASKING": CR8 is then V_TPR, which L2 may write. QEMU '
        "7.2 notes the interrupt without holding the lock that this takes.",
        message="tcg_handle_interrupt",
    ),
    _defect(
        r"svm.events_virtual.virtual_gif_holds_virtual_interrupts",
        "QEMU delivers virtual interrupts while V_GIF is 0, though it offers virtual GIF.",
        'APM, "Virtual GIF": with V_GIF_ENABLE virtual interrupts wait for V_GIF. QEMU 7.2 sets '
        "its flag at a VMRUN with V_GIF, and does not clear it at one without.",
    ),
    # -- nested paging ---------------------------------------------------------------------------
    _defect(
        r"svm.paging.(a_refused_access_exits_with_its_reason_and_address"
        r"|each_address_bit_beyond_the_physical_width_is_reserved"
        r"|the_address_of_a_large_page_is_aligned)",
        "QEMU's EXITINFO1 of a reserved bit in a nested table has RSV without P.",
        'APM, "Page-Fault Error Code" and "Nested versus Guest Page Faults, Fault Ordering": '
        "EXITINFO1 has a page fault's error code, where RSV comes from an entry that is present, "
        "so that P is 1 as well.",
    ),
    _defect(
        r"svm.paging_host.a_host_with_two_level_paging_has_two_level_nested_tables",
        "QEMU walks no nested tables where L1 uses two-level paging: L2 has all of L1's memory.",
        'APM, "Nested Paging": the nested tables have the format of the host\'s paging mode. QEMU '
        "7.2.22 takes a paging mode without any flag for none, and two-level paging has no flag: "
        "QEMU's issue 2654, repaired for the guest's tables and not for the nested ones.",
    ),
    # -- registers -------------------------------------------------------------------------------
    _defect(
        r"svm.control_registers.a_write_that_faults_does_not_happen",
        "QEMU lets L2 write reserved and impossible values to control registers. A reserved bit of "
        "CR4 is VMEXIT_INVALID, and clearing PAE in long mode a shutdown.",
        'APM, "System-Control Registers": such a write is #GP(0). QEMU 7.2 checks CR4 alone.',
    ),
    _defect(
        r"svm.control_registers.a_bad_efer_of_l2_faults|svm.msr.the_reserved_bits_of_efer_fault",
        "QEMU ignores writes of reserved bits of EFER, and of LME while paging is on.",
        'APM, "Extended Feature Enable Register (EFER)": both are #GP. QEMU 7.2 masks the value.',
    ),
    _defect(
        r"svm.control_registers.general_detect_faults_in_l2",
        "QEMU does not know DR7.GD: MOV of a debug register never is #DB.",
        'APM, "Debug-Control Register (DR7)": with GD set each access to a debug register is #DB '
        "with DR6.BD.",
    ),
    _defect(
        r"svm.msr.(the_reserved_bits_of_vm_cr_fault|svmdis_cannot_be_set_while_svm_is_on"
        r"|svm_cannot_be_enabled_while_svmdis_is_set)"
        r"|svm.processors.(a_redirected_init_exits_as_sx|a_redirected_init_is_an_exception_of_l1"
        r"|a_redirected_init_that_is_not_intercepted_is_l2s|an_init_waits_for_gif"
        r"|the_init_intercept_comes_before_the_redirection)",
        "QEMU has no VM_CR: writes are ignored, reads are 0. SVM cannot be disabled, and INIT is "
        "never redirected: it resets a processor that L1 wants #SX from.",
        'APM, "VM_CR MSR (C001_0114h)": every processor with SVM has it, with SVMDIS and R_INIT.',
    ),
    _defect(
        r"svm.timers.l2s_tsc_has_the_offset.*",
        "QEMU has no TSC among its MSRs: RDMSR of 10H is 0. RDTSC and RDTSCP have the offset.",
        'APM, "Time-Stamp Counter": MSR 10H is the counter. QEMU 7.2 reads MSRs that it does not '
        "know as 0.",
        message="RDMSR of TSC",
    ),
)
