"""Defects of Bochs as an L0 with VMX: version 2.7, model corei7_skylake_x."""

from __future__ import annotations

from typing import Final

from undervisor.conformance.known.defect import Known


def _defect(tests: str, what: str, evidence: str, message: str = "") -> Known:
    return Known(r"bochs \(.*\)", tests, what, evidence, message)


_RULES: Final = "docs/rules-compared.md names each rule and settles it from the manual's words."

DEFECTS: Final = (
    # -- VM entry --------------------------------------------------------------------------------
    _defect(
        r"vmx.entry_rules.each_rule_of_a_section_fails_the_entry.*",
        "Bochs lacks checks of this section: it enters L2, or gives itself up at an event that it "
        "does not know.",
        _RULES,
    ),
    _defect(
        r"vmx.entry_checks.bad_guest_state_is_failure_33",
        "Bochs enters with a RIP of 64-bit code that is not canonical, and with reserved bits in "
        "IA32_DEBUGCTL.",
        _RULES,
        message=r"2 of \d+ wrong: RIP not canonical: .* DEBUGCTL reserved bits: ",
    ),
    _defect(
        r"vmx.instructions.a_shadow_vmcs_is_loaded_only_with_vmcs_shadowing",
        "Bochs's VMLAUNCH with a shadow VMCS current is VMfailValid.",
        'SDM, "VMLAUNCH/VMRESUME—Launch/Resume Virtual Machine": VMfailInvalid, as without a '
        "current VMCS.",
        message="the outcome of VMLAUNCH",
    ),
    # -- events ----------------------------------------------------------------------------------
    _defect(
        r"vmx.events.an_interrupt_exits_whatever_if_is\[IF = 0\]"
        r"|vmx.control_registers_shadow.the_cr4_read_shadow_holds_through_timer_interrupts",
        "With external-interrupt exiting Bochs does not interrupt an L2 that was entered with IF "
        "clear.",
        'SDM, "External-Interrupt Exiting" among the pin-based controls, and "Changes to '
        'Instruction Behavior": interrupts then exit whatever IF is. Bochs 2.7 reconsiders what '
        "is masked only where IF changes, and at VM entry does so before it takes itself to be in "
        "the guest.",
    ),
    _defect(
        r"vmx.events.(an_interrupt_exits_from_hlt_and_the_state_is_saved"
        r"|the_interrupt_window_opens_when_nothing_blocks)"
        r"|vmx.apic_interrupts.a_virtual_interrupt_ends_hlt",
        "Bochs leaves L2 in HLT for ever: no interrupt wakes it while IF is 0, and no interrupt "
        "window or virtual interrupt does.",
        'SDM, "Other Causes of VM Exits" and "Virtual-Interrupt Delivery": both wake from HLT as '
        "an external interrupt would, and the exit of that does not depend on IF. Bochs 2.7 asks "
        "for IF, and has neither among the events that end HLT.",
        message="gave no answer",
    ),
    _defect(
        r"vmx.events.(hlt|shutdown)_is_an_activity_state_that_entry_loads"
        r"|vmx.processors.a_startup_ipi_exits_from_wait_for_sipi",
        "Bochs saves the activity state as active, whatever it was before the exit.",
        'SDM, "Saving Non-Register State" and "Architectural State Before a VM Exit": the state '
        "before the exit is saved; the return to the active state comes after it.",
        message="activity state",
    ),
    _defect(
        r"vmx.events.an_nmi_exits_by_its_control",
        "Bochs saves a wrong RIP at an exit by the first instruction of an NMI handler: that of "
        "the instruction which the NMI came behind.",
        'SDM, "Saving RIP, RSP, RFLAGS, and SSP": RIP is that of the instruction that exits. '
        "Bochs 2.7 notes the new RIP when it delivers an interrupt, and not when it delivers an "
        "NMI.",
        message="L2's handler of vector 2",
    ),
    _defect(
        r"vmx.processors.init_exits_from_l2_and_changes_nothing",
        "Bochs keeps an INIT that has caused a VM exit: the next entry exits for it again.",
        'SDM, "Other Causes of VM Exits": the signal causes the exit, one for each. An INIT that '
        "stayed would let no L2 run again.",
        message="exit 3 ",
    ),
    _defect(
        r"vmx.processors.(init_is_blocked_in_root_operation_until_l2_runs"
        r"|a_blocked_init_is_taken_at_vmxoff)",
        "Bochs drops an INIT that comes in VMX root operation.",
        'SDM, "Restrictions on VMX Operation" and "VMXOFF": INIT is blocked there, and VMXOFF '
        "unblocks it: what is blocked stays pending. Bochs 2.7 does not note it.",
    ),
    # -- exits -----------------------------------------------------------------------------------
    _defect(
        r"vmx.exits_exceptions.an_exception_whose_bit_is_1_exits_with_its_information",
        "Bochs saves RFLAGS with RF clear when a fault exits.",
        'SDM, "Saving RIP, RSP, RFLAGS, and SSP": RF is saved as the delivery of the event would '
        "have pushed it, which for a fault is 1.",
        message="RF is saved as 1",
    ),
    _defect(
        r"vmx.exits.rdrand_and_rdseed_tell_their_destination",
        "Bochs tells an operand size of 32 bits for RDRAND and RDSEED of 16.",
        'SDM, "Format of the VM-Exit Instruction-Information Field as Used for RDRAND and RDSEED": '
        "bits 12:11 are 0 for 16 bits. Bochs 2.7 looks at the address size there.",
    ),
    _defect(
        r"vmx.instructions.vmcall_fails_.*in_root_operation",
        "Bochs gives itself up at VMCALL in VMX root operation: not implemented yet.",
        'SDM, "VMCALL—Call to VM Monitor": without a dual-monitor treatment of SMIs it is '
        "VMfailValid with error 1.",
        message="VMCALL: not implemented yet",
    ),
    _defect(
        r"vmx.apic.a_fetch_from_the_page_exits",
        "Bochs gives itself up at an instruction fetch from the APIC-access page.",
        'SDM, "Virtualizing Memory-Mapped APIC Accesses": the fetch is an APIC-access VM exit with '
        "access type 2.",
        message="vetoed direct read",
    ),
    # -- EPT -------------------------------------------------------------------------------------
    _defect(
        r"vmx.paging.reserved_memory_types_and_address_bits_are_misconfigured\[(2 M|1 G)iB\]",
        "Bochs accepts bit 12 in an EPT entry that maps a large page.",
        'SDM, "Format of an EPT Page-Directory Entry that Maps a 2-MByte Page", and that of a '
        "1-GByte page: bits 12 and above, up to the page's size, are reserved. Bochs 2.7 "
        "leaves out bit 12, which is PAT's in an ordinary entry of that level.",
        message=r"1 of \d+ wrong: \(bit, 0xc\)",
    ),
    _defect(
        r"vmx.paging_walks.a_walk_writes_only_to_set_flags",
        "Bochs sets accessed and dirty flags of L2's page tables in pages that EPT makes "
        "read-only.",
        'SDM, "EPT Violations": the update of such a flag is a write, and a violation where the '
        "EPT entry does not allow writes. Bochs 2.7 writes without asking.",
    ),
    _defect(
        r"vmx.paging_walks.a_dirty_flag_that_is_set_is_logged",
        "Bochs logs the address of the access where it must log that of the page.",
        'SDM, "Page-Modification Logging": the entry is the guest-physical address aligned by 4 '
        "KBytes.",
        message="the page is logged",
    ),
    _defect(
        r"vmx.tlb.(invept_fails_for_bad_types_and_eptps"
        r"|invvpid_fails_for_bad_types_and_descriptors)",
        "Bochs ignores bits 63:32 of the type of INVEPT and INVVPID in 64-bit mode.",
        'SDM, "INVEPT" and "INVVPID": the register operand has 64 bits there, and a type that is '
        "not supported is VMfail.",
        message="1 of .* wrong: .*0x100000",
    ),
)
