"""Defects of a lab's L0: KVM of Linux 6.1.192 on an AMD processor that QEMU 7.2.22's TCG emulates.

A defect is KVM's own, or the processor's below it that KVM hands on; each row says which.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from undervisor.conformance.known.defect import Known
from undervisor.conformance.known.qemu import DEFECTS as QEMU


def _defect(tests: str, what: str, evidence: str, message: str = "") -> Known:
    return Known("lab", tests, what, evidence, message)


_KVM: Final = (
    # -- VMRUN -----------------------------------------------------------------------------------
    _defect(
        r"svm.paging_host.nested_paging_needs_a_host_with_paging"
        r"|svm.entry_rules.each_rule_of_a_section_fails_vmrun\[Enabling Nested Paging\]",
        "KVM raises #UD at VMRUN of an L1 without paging.",
        'APM, "VMRUN": the instruction needs protected mode, not paging; nested paging without '
        "paging in L1 is VMEXIT_INVALID. nested_svm_check_permissions of Linux 6.1 demands CR0.PG. "
        "The test's L1 has no handler there and ends in a triple fault.",
    ),
    _defect(
        r"svm.controls.nested_cr3_below_the_physical_width_is_accepted",
        "KVM shuts L1 down where N_CR3 names memory that the machine has not.",
        'APM, "Nested Paging and VMRUN/#VMEXIT": an N_CR3 below the physical width is legal; its '
        "walk is a nested page fault at worst. mmu_check_root of Linux 6.1 requests a triple fault "
        "for a root outside all memory slots; later kernels enter with an empty dummy root.",
    ),
    _defect(
        r"svm.controls.g_pat_must_have_memory_types|svm.paging.l2_has_a_pat_of_its_own"
        r"|svm.entry_rules.each_rule_of_a_section_fails_vmrun\[Nested Paging and VMRUN/#VMEXIT\]",
        "KVM has one PAT for L1 and L2: it neither checks nor loads G_PAT.",
        'APM, "Nested Paging" and "Nested Paging and VMRUN/#VMEXIT": G_PAT is L2\'s own PAT, and '
        "VMRUN checks it. nested_vmcb02_compute_g_pat of Linux 6.1 gives L2 that of L1, with a note"
        " that this is to be repaired.",
    ),
    # -- instructions ----------------------------------------------------------------------------
    _defect(
        r"svm.instructions.vmmcall_(in_l2_without_its_intercept_is_undefined"
        r"|without_its_intercept_is_an_undefined_opcode_exit)",
        "KVM keeps L2 for ever at a VMMCALL that L1 does not intercept.",
        'APM, "VMMCALL": it is #UD where it is not intercepted. recalc_intercepts of Linux 6.1 '
        "leaves KVM's own intercept away; but KVM intercepts #UD, takes VMMCALL for a hypercall "
        "instruction of another vendor, writes VMMCALL in its place and runs it again. A VMM that "
        "disables KVM_X86_QUIRK_FIX_HYPERCALL_INSN gets the #UD.",
    ),
    _defect(
        r"svm.instructions.(the_address_size_decides_how_much_of_rax_counts"
        r"|instructions_work_in_compatibility_mode)",
        "KVM uses all of RAX as the address of VMLOAD and VMSAVE, whatever the address size.",
        'APM, "VMSAVE": the address is in rAX, of which the effective address size tells the part. '
        "vmload_vmsave_interception of Linux 6.1 takes RAX from the VMCB as it is.",
    ),
    _defect(
        r"svm.instructions.l2s_privilege_is_checked_before_the_intercept",
        "KVM makes VMRUN, VMLOAD and VMSAVE at CPL 3 of L2 exit as if they were intercepted, where "
        "they are #GP.",
        'APM, "Instruction Intercepts": exceptions for privilege come before the intercepts. '
        "gp_interception of Linux 6.1, which works around an erratum about the three instructions, "
        "does not look at CPL.",
    ),
    _defect(
        r"svm.state.the_hosts_flags_come_back_and_its_breakpoints_do_not",
        "KVM leaves DR7 as it is where VMRUN fails.",
        'APM, "VMRUN Instruction": a VMRUN that finds illegal state is a #VMEXIT, and "#VMEXIT" '
        'sets DR7 to "all disabled". nested_svm_vmrun of Linux 6.1 writes the exit code and does '
        "nothing else.",
    ),
    # -- events ----------------------------------------------------------------------------------
    _defect(
        r"svm.events_injection.(an_injected_event_is_delivered_first\[INT (80|21)H\]"
        r"|a_fault_in_the_delivery_names_the_injected_event\[(INT n|#BP)\])",
        "KVM loses a software interrupt or INT3 that L1 injects where its delivery meets a page "
        "that KVM has yet to map.",
        "APM, \"Event Injection\": the event is delivered before L2's first instruction. KVM's "
        "tracepoints show the event injected, a nested page fault of KVM's own in its delivery, the"
        " instruction at RIP decoded to be skipped, and L2 entered without the event. Linux 6.1 "
        "goes that way where the processor has no NRIPS, which QEMU 7.2 has not and hardware has.",
    ),
    _defect(
        r"svm.events_injection.(a_fault_in_the_delivery_names_the_injected_event\[NMI\]"
        r"|a_nested_page_fault_in_the_delivery_names_the_event)",
        "KVM gives an NMI the vector 0 in EXITINTINFO.",
        'APM, "EXITINTINFO": the field has the event\'s vector, which is 2 for an NMI. '
        "nested_save_pending_event_to_vmcb12 of Linux 6.1 writes the valid bit and the type only.",
        message="the vector in EXITINTINFO: 0, must be 2",
    ),
    _defect(
        r"svm.events_virtual.a_virtual_interrupt_ends_l2s_halt",
        "KVM does not wake L2 from HLT for a virtual interrupt of L1.",
        'APM, "Virtual Interrupts": one that can be taken is, and ends HLT. KVM intercepts HLT of '
        "L2 even where L1 does not, and the conditions by which Linux 6.1 wakes a processor leave "
        "V_IRQ out.",
    ),
    # -- registers -------------------------------------------------------------------------------
    _defect(
        r"svm.control_registers.a_write_that_faults_does_not_happen",
        "KVM drops bits 63:32 of what L2 writes to CR0 and CR4. Below it, QEMU drops bits 7:4 of "
        "CR8, and takes a CR3 that its VMRUN then refuses.",
        'APM, "System-Control Registers": such a write is #GP(0). mk_cr_64 of Linux 6.1 takes 32 '
        "bits; KVM comes there where the processor has no decode assists, which QEMU 7.2 has not.",
    ),
    _defect(
        r"svm.msr.(svmdis_cannot_be_set_while_svm_is_on"
        r"|svm_cannot_be_enabled_while_svmdis_is_set)",
        "KVM keeps SVMDIS after the #GP that its write causes, and lets EFER.SVME be set while "
        "SVMDIS is.",
        'APM, "VM_CR MSR (C001_0114h)" and "Enabling SVM": a write that faults changes nothing, and'
        " SVME cannot be set while SVMDIS is 1. svm_set_vm_cr of Linux 6.1 writes before it checks,"
        " and svm_set_efer does not ask.",
    ),
    _defect(
        r"svm.processors.(a_redirected_init_exits_as_sx|a_redirected_init_is_an_exception_of_l1"
        r"|a_redirected_init_that_is_not_intercepted_is_l2s|an_init_waits_for_gif"
        r"|the_init_intercept_comes_before_the_redirection)",
        "KVM keeps R_INIT and does not obey it: INIT resets a processor that L1 wants #SX from.",
        'APM, "INIT Support": with VM_CR.R_INIT an INIT becomes #SX. Linux 6.1 only stores VM_CR.',
    ),
)
_TCG: Final = (
    _defect(
        r"svm.entry_rules.each_rule_of_a_section_fails_vmrun"
        r"\[Canonicalization and Consistency Checks\]",
        "QEMU sets the accessed bit in the page-directory pointers of PAE paging; KVM refuses the "
        "second VMRUN with them.",
        'APM, "PAE Paging Legacy-Mode": bits 8:5 of a PDPE are reserved; there is no accessed bit. '
        "KVM's tracepoints show the first VMRUN with these tables succeed, and each later one fail "
        "in load_pdptrs.",
    ),
    _defect(
        r"svm.paging_host.(a_host_with_pae_paging_has_pae_nested_tables"
        r"|pae_nested_tables_are_aligned_by_32_bytes"
        r"|a_host_with_pae_paging_runs_an_l2_without_nested_paging)",
        "QEMU sets the accessed bit in the page-directory pointers of PAE paging; KVM's #VMEXIT to "
        "an L1 with such tables fails, and L1 is shut down.",
        'APM, "PAE Paging Legacy-Mode": bits 8:5 of a PDPE are reserved; there is no accessed bit. '
        "nested_svm_vmexit of Linux 6.1 loads them by load_pdptrs, which asks for zeros there.",
    ),
    _defect(
        r"svm.events_virtual.(the_interrupt_window_opens_behind_stis_shadow"
        r"|interrupts_nest_in_l2s_handlers|a_virtual_interrupt_needs_if_and_priority)"
        r"|svm.state.an_interrupt_shadow_(is_loaded|survives_an_exit)",
        "QEMU notes a virtual interrupt whose delivery exits as an exception of its vector; KVM "
        "injects that again, and QEMU's VMRUN refuses it.",
        'APM, "EXITINTINFO": an external or virtual interrupt has type 0. The exit is a nested page'
        " fault of KVM's own, which L1 never sees; L1 gets VMEXIT_INVALID.",
        message="INVALID|wrong: priority 8, TPR 0: False",
    ),
    _defect(
        r"svm.state.(a_breakpoint_on_vmrun_comes_before_it"
        r"|floating_point_and_breakpoint_addresses_are_not_switched)"
        r"|svm.state_caching.a_checked_vmcb_is_the_one_that_is_used",
        "QEMU goes on with breakpoints of a DR7 that VMRUN or #VMEXIT has replaced: a #DB that no "
        "debug register asks for, in this test or a later one on the same L1.",
        'APM, "VMRUN Instruction" and "#VMEXIT": DR7 is loaded. KVM\'s tracepoints show a #DB with '
        "no bit of DR6 set, at an address that was in DR0 before. VMRUN of QEMU 7.2 writes its DR7 "
        "and not the list of breakpoints that it keeps beside.",
    ),
    _defect(
        r"svm.events_injection.two_contributory_exceptions_are_a_double_fault",
        "QEMU forgets that the event whose delivery faults was injected: the second exception is "
        "delivered alone.",
        'APM, "Event Injection": injected events are treated as if they had happened in the guest. '
        "KVM intercepts #GP for an erratum, and injects that of L2 again.",
    ),
)
"""What shows only under KVM."""
_THROUGH: Final = (
    "svm.control_registers.general_detect_faults_in_l2",
    "svm.controls.an_exception_of_another_mode_cannot_be_injected",
    "svm.entry_rules.each_rule_of_a_section_fails_vmrun[Event Injection]",
    "svm.exits.each_instruction_exits_by_its_intercept",
    "svm.exits.without_their_intercepts_instructions_run",
    "svm.exits.int3_and_into_are_no_software_interrupts_to_the_intercepts",
    "svm.exits_exceptions.an_intercepted_exception_exits_at_its_instruction",
    "svm.exits_exceptions.legacy_exceptions_exit_too",
    "svm.exits_exceptions.icebp_is_not_the_debug_exception_to_the_intercepts",
    "svm.exits_io.string_io_says_so",
    "svm.exits_io.real_mode_io_exits_as_well",
    "svm.events_injection.a_fault_in_the_delivery_names_the_injected_event[interrupt]",
    "svm.events_injection.a_fault_in_the_delivery_names_the_injected_event[interrupt 3]",
    "svm.events_injection.a_fault_in_the_delivery_names_the_injected_event[#GP]",
    "svm.events_injection.a_fault_in_the_delivery_names_the_injected_event[#UD]",
    "svm.events_injection.l2s_own_events_are_named_when_their_delivery_exits",
    "svm.events_injection.an_injected_exception_counts_for_the_double_fault",
    "svm.events_injection.a_fault_while_a_double_fault_is_delivered_is_a_shutdown",
    "svm.events_virtual.a_virtual_interrupt_exits_before_it_is_taken",
    "svm.events_virtual.a_virtual_interrupt_needs_if_and_priority",
    "svm.events_virtual.lowering_cr8_lets_a_virtual_interrupt_in",
    "svm.timers.rdtsc_and_rdtscp_have_an_intercept_each",
)
"""Tests that show the same defect of QEMU with KVM above it and without."""


def _through() -> Iterator[Known]:
    """QEMU's own rows, for the tests of `_THROUGH`."""
    for known in QEMU:
        tests = [re.escape(name) for name in _THROUGH if re.fullmatch(known.tests, name)]
        if tests:
            yield replace(known, target="lab", tests="|".join(tests))


DEFECTS: Final = (*_KVM, *_TCG, *_through())
