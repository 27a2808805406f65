"""Defects of Bochs as an L0 with SVM: version 2.7, model ryzen."""

from __future__ import annotations

from typing import Final

from undervisor.conformance.known.defect import Known


def _defect(tests: str, what: str, evidence: str, message: str = "") -> Known:
    return Known(r"bochs \(.*\)", tests, what, evidence, message)


_RULES: Final = "docs/rules-compared.md names each rule and settles it from the manual's words."

DEFECTS: Final = (
    # -- VMRUN -----------------------------------------------------------------------------------
    _defect(
        r"svm.(entry.l2_sees_the_state_that_the_vmcb_holds"
        r"|exits_exceptions.an_intercepted_page_fault_leaves_cr2"
        r"|events_injection.an_injected_page_fault_brings_the_cr2_of_the_vmcb"
        r"|paging.a_nested_page_fault_leaves_cr2"
        r"|state_caching.a_change_with_a_clear_clean_bit_is_seen)",
        "Bochs's VMRUN does not load CR2: L2 finds L1's.",
        'APM, "VMRUN Instruction": CR2 is among what VMRUN loads. Bochs 2.7 reads the field from '
        "the VMCB and does not use it.",
        message="(?i)cr2",
    ),
    _defect(
        r"svm.control_registers.a_write_that_faults_does_not_happen"
        r"|svm.entry.long_mode_needs_pae_and_protection",
        "Bochs gives itself up where CR0.PG is set without PE in long mode, by VMRUN or by L2's "
        "MOV to CR0.",
        'APM, "Canonicalization and Consistency Checks" and "CR0 Register": VMRUN is '
        "VMEXIT_INVALID, and the MOV #GP(0). Bochs 2.7 lets paged real mode pass both checks "
        "whatever EFER is, and then panics at what it has loaded.",
        message="EFER.LMA is set when CR0.PE=0",
    ),
    _defect(
        r"svm.entry_rules.each_rule_of_a_section_fails_vmrun.*",
        "Bochs's VMRUN lacks checks of this section: it enters L2, or gives itself up at what it "
        "has loaded.",
        _RULES,
    ),
    _defect(
        r"svm.controls.a_permission_map_beyond_the_physical_width_is_illegal",
        "Bochs accepts permission maps that begin below the end of physical memory and reach "
        "beyond it.",
        'APM, "Canonicalization and Consistency Checks": the tables must not extend to an address '
        "at or above the maximum. Bochs 2.7 checks the first page.",
    ),
    _defect(
        r"svm.controls.an_exception_of_another_mode_cannot_be_injected",
        "Bochs injects #BR into 64-bit code.",
        'APM, "Event Injection": an event that is impossible in the guest\'s mode, for which it '
        "names this very one, is VMEXIT_INVALID.",
    ),
    _defect(
        r"svm.entry.a_high_bit_of_cr3_is_illegal_in_long_mode",
        "Bochs enters with bits of CR3 beyond the physical width, and L2 dies at its first fetch.",
        'APM, "Canonicalization and Consistency Checks": such bits must be zero. Bochs 2.7 checks '
        "N_CR3 and not CR3.",
        message="triple fault",
    ),
    _defect(
        r"svm.entry.a_code_segment_of_long_mode_is_not_both_l_and_d",
        "Bochs refuses a code segment with L and D in legacy mode as well.",
        'APM, "Canonicalization and Consistency Checks": illegal are EFER.LME, CR0.PG, CR4.PAE, '
        "CS.L and CS.D together. Bochs 2.7 looks at the last two.",
        message="in legacy mode",
    ),
    _defect(
        r"svm.msr.the_host_save_area_is_a_page_below_the_physical_width",
        "Bochs takes any address as that of the host's save area, and never uses it.",
        'APM, "VM_HSAVE_PA MSR (C001_0117h)": an address that is not aligned by 4 KiB, or that is '
        "beyond the supported width, is #GP.",
    ),
    # -- interrupts ------------------------------------------------------------------------------
    _defect(
        r"svm.apic.the_apics_priority_decides_about_interrupts_of_l1"
        r"|svm.events.(the_interrupt_flag_that_masking_names_decides"
        r"|an_interrupt_exits_before_l2s_first_instruction|an_interrupt_stops_a_busy_l2"
        r"|an_interrupt_ends_l2s_halt|an_injected_event_comes_before_a_pending_interrupt"
        r"|the_hosts_shadow_of_sti_ends_with_vmrun)",
        "With V_INTR_MASKING Bochs lets L2's IF decide about interrupts of L1 until L2 changes IF: "
        "an L2 with IF clear is not interrupted.",
        "APM, \"Virtual Interrupts, V_INTR_MASKING\": the host's IF decides, L2's is for virtual "
        "interrupts. Bochs 2.7 reconsiders what is masked only where IF changes, and at VMRUN does "
        "so before it takes itself to be in the guest; a halted processor it wakes by L2's IF.",
    ),
    _defect(
        r"svm.events_virtual.(a_virtual_interrupt_(needs_if_and_priority"
        r"|exits_before_it_is_taken|ends_l2s_halt)|interrupts_nest_in_l2s_handlers)"
        r"|svm.state.an_interrupt_shadow_(is_loaded|survives_an_exit)",
        "Bochs delivers no virtual interrupt before L2 changes IF, and wakes no halted L2 for one.",
        'APM, "Virtual Interrupts": with IF set and a priority above V_TPR it is taken at once. '
        "Bochs 2.7 masks the event at every #VMEXIT, unmasks it only where IF becomes 1 in L2, and "
        "does not have it among the events that end HLT.",
    ),
    _defect(
        r"svm.events.an_nmi_that_is_not_intercepted_is_l2s",
        "Bochs saves a wrong RIP at an exit by the first instruction of an NMI handler: that of "
        "the instruction which the NMI came behind.",
        'APM, "State Saved on Exit": RIP is that of the instruction that exits. Bochs 2.7 notes '
        "the new RIP when it delivers an interrupt, and not when it delivers an NMI.",
    ),
    _defect(
        r"svm.events_injection.a_software_interrupt_returns_to_nrip",
        "Bochs pushes RIP as the return address of an injected software interrupt, though it "
        "offers nRIP.",
        'APM, "Event Injection": where CPUID has NRIPS, the address is the nRIP of the VMCB.',
    ),
    _defect(
        r"svm.events_injection.l2s_own_events_are_named_when_their_delivery_exits",
        "Bochs does not name INT n in EXITINTINFO when its delivery exits.",
        'APM, "EXITINTINFO": the field has the event, type 4 for INT n. Bochs 2.7 notes exceptions '
        "and injected events.",
    ),
    # -- intercepts ------------------------------------------------------------------------------
    _defect(
        r"svm.exits.(a_shutdown_exits_by_its_intercept)"
        r"|svm.events_injection.a_fault_while_a_double_fault_is_delivered_is_a_shutdown",
        "Bochs does not know the intercept of shutdown: a triple fault of L2 ends the machine.",
        'APM, "Shutdown Intercept": with the bit set it is a #VMEXIT with code 7FH. Bochs 2.7 has '
        "the exit for VMX alone.",
        message="triple fault",
    ),
    _defect(
        r"svm.exits.each_instruction_(exits_by_its_intercept|exit_has_the_next_rip)",
        "Bochs raises #UD for RSM before it looks at the intercept, and does not look at that of "
        "MONITOR where the memory is not write-back, as here with the MTRRs off.",
        'APM, "Instruction Intercepts": RSM exits before any exception; MONITOR exits behind its '
        "exceptions, of which a memory type is none. Bochs 2.7 ends MONITOR early there.",
        message=r"\b2 of \d+ wrong: rsm: .* monitor: ",
    ),
    _defect(
        r"svm.exits.without_their_intercepts_instructions_run"
        r"|svm.instructions.(vmsave_in_l2_without_its_intercept_uses_l1s_physical_address"
        r"|vmload_in_l2_without_its_intercept_loads)",
        "VMLOAD and VMSAVE of L2, when they are not intercepted, make Bochs take the operand for "
        "the VMCB of L2: the next exit is written there.",
        'APM, "VMSAVE": it stores state to the VMCB in rAX and changes nothing else. Bochs 2.7 '
        "has one pointer for the operand and for the current VMCB.",
    ),
    _defect(
        r"svm.exits.the_pause_filter_lets_some_through",
        "Bochs lets one PAUSE more than the filter count through.",
        'APM, "Pause Intercept Filtering": each PAUSE counts down, and the one that reaches zero '
        "exits. Bochs 2.7 exits at the next one.",
    ),
    _defect(
        r"svm.exits_exceptions.a_fault_has_no_next_rip",
        "Bochs writes nRIP at every exit, for faults too.",
        'APM, "State Saved on Exit": nRIP is 0 for exits that are neither by an instruction nor by '
        "a trap.",
    ),
    _defect(
        r"svm.exits_exceptions.a_single_step_exits_behind_its_instruction"
        r"|svm.control_registers.general_detect_faults_in_l2",
        "Bochs exits with #DB before it has updated DR6.",
        'APM, "#DB (Debug)" among the exception intercepts: DR6 and DR7 are saved as a handler '
        "of #DB would see them. Bochs 2.7 writes DR6 when the exception is delivered.",
        message=r"DR6\.",
    ),
    # -- MSRs ------------------------------------------------------------------------------------
    _defect(
        r"svm.msr.(the_reserved_bits_of_vm_cr_fault|svmdis_cannot_be_set_while_svm_is_on"
        r"|svm_cannot_be_enabled_while_svmdis_is_set|the_lock_makes_svmdis_read_only"
        r"|the_right_key_opens_the_lock|a_lock_without_a_key_stays)"
        r"|svm.processors.(a_redirected_init_exits_as_sx|a_redirected_init_is_an_exception_of_l1"
        r"|a_redirected_init_that_is_not_intercepted_is_l2s|an_init_waits_for_gif"
        r"|the_init_intercept_comes_before_the_redirection)",
        "Bochs has no VM_CR and no SVM_KEY: they fault, though its CPUID has SVM and SVM-Lock. "
        "INIT is never redirected.",
        'APM, "VM_CR MSR (C001_0114h)": every processor with SVM has it, with SVMDIS and R_INIT. '
        "Bochs 3.0 has them.",
    ),
    _defect(
        r"svm.msr.branch_records_are_switched_with_lbr_virtualization",
        "Bochs offers LBR virtualization and has no DebugCtl: L2's access faults.",
        'APM, "LBR Virtualization": VMRUN loads DBGCTL into the MSR DebugCtl (1D9H), which must '
        "be there.",
        message="exception 13",
    ),
)
