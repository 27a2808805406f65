"""How a VMX instruction fails, and how a VMX transition aborts.

SDM, chapter "VMX Instruction Reference", sections "Conventions" and "VM Instruction Error
Numbers", and "VMX Aborts".
"""

from __future__ import annotations

from enum import IntEnum


class VmInstructionError(IntEnum):
    """The value that VMfailValid leaves in the VM-instruction error field."""

    VMCALL_IN_VMX_ROOT_OPERATION = 1
    VMCLEAR_WITH_INVALID_PHYSICAL_ADDRESS = 2
    VMCLEAR_WITH_VMXON_POINTER = 3
    VMLAUNCH_WITH_NON_CLEAR_VMCS = 4
    VMRESUME_WITH_NON_LAUNCHED_VMCS = 5
    VMRESUME_AFTER_VMXOFF = 6
    ENTRY_WITH_INVALID_CONTROL_FIELDS = 7
    ENTRY_WITH_INVALID_HOST_STATE_FIELDS = 8
    VMPTRLD_WITH_INVALID_PHYSICAL_ADDRESS = 9
    VMPTRLD_WITH_VMXON_POINTER = 10
    VMPTRLD_WITH_INCORRECT_REVISION_IDENTIFIER = 11
    ACCESS_TO_UNSUPPORTED_COMPONENT = 12
    VMWRITE_TO_READ_ONLY_COMPONENT = 13
    VMXON_IN_VMX_ROOT_OPERATION = 15
    ENTRY_WITH_INVALID_EXECUTIVE_VMCS_POINTER = 16
    ENTRY_WITH_NON_LAUNCHED_EXECUTIVE_VMCS = 17
    ENTRY_WITH_EXECUTIVE_VMCS_POINTER_NOT_VMXON_POINTER = 18
    VMCALL_WITH_NON_CLEAR_VMCS = 19
    VMCALL_WITH_INVALID_EXIT_CONTROL_FIELDS = 20
    VMCALL_WITH_INCORRECT_MSEG_REVISION_IDENTIFIER = 22
    VMXOFF_UNDER_DUAL_MONITOR_TREATMENT = 23
    VMCALL_WITH_INVALID_SMM_MONITOR_FEATURES = 24
    ENTRY_WITH_INVALID_EXECUTION_CONTROLS_IN_EXECUTIVE_VMCS = 25
    ENTRY_WITH_EVENTS_BLOCKED_BY_MOV_SS = 26
    INVALID_OPERAND_TO_INVEPT_OR_INVVPID = 28

    @property
    def sentence(self) -> str:
        """What went wrong, as a sentence."""
        return SENTENCES[self]


_E = VmInstructionError

SENTENCES: dict[VmInstructionError, str] = {
    _E.VMCALL_IN_VMX_ROOT_OPERATION: "VMCALL executed in VMX root operation",
    _E.VMCLEAR_WITH_INVALID_PHYSICAL_ADDRESS: "VMCLEAR with invalid physical address",
    _E.VMCLEAR_WITH_VMXON_POINTER: "VMCLEAR with VMXON pointer",
    _E.VMLAUNCH_WITH_NON_CLEAR_VMCS: "VMLAUNCH with non-clear VMCS",
    _E.VMRESUME_WITH_NON_LAUNCHED_VMCS: "VMRESUME with non-launched VMCS",
    _E.VMRESUME_AFTER_VMXOFF: "VMRESUME after VMXOFF (VMXOFF and VMXON between VMLAUNCH and "
    "VMRESUME)",
    _E.ENTRY_WITH_INVALID_CONTROL_FIELDS: "VM entry with invalid control field(s)",
    _E.ENTRY_WITH_INVALID_HOST_STATE_FIELDS: "VM entry with invalid host-state field(s)",
    _E.VMPTRLD_WITH_INVALID_PHYSICAL_ADDRESS: "VMPTRLD with invalid physical address",
    _E.VMPTRLD_WITH_VMXON_POINTER: "VMPTRLD with VMXON pointer",
    _E.VMPTRLD_WITH_INCORRECT_REVISION_IDENTIFIER: "VMPTRLD with incorrect VMCS revision "
    "identifier",
    _E.ACCESS_TO_UNSUPPORTED_COMPONENT: "VMREAD/VMWRITE from/to unsupported VMCS component",
    _E.VMWRITE_TO_READ_ONLY_COMPONENT: "VMWRITE to read-only VMCS component",
    _E.VMXON_IN_VMX_ROOT_OPERATION: "VMXON executed in VMX root operation",
    _E.ENTRY_WITH_INVALID_EXECUTIVE_VMCS_POINTER: "VM entry with invalid executive-VMCS pointer",
    _E.ENTRY_WITH_NON_LAUNCHED_EXECUTIVE_VMCS: "VM entry with non-launched executive VMCS",
    _E.ENTRY_WITH_EXECUTIVE_VMCS_POINTER_NOT_VMXON_POINTER: "VM entry with executive-VMCS "
    "pointer not VMXON pointer (when leaving SMM for VMX root operation)",
    _E.VMCALL_WITH_NON_CLEAR_VMCS: "VMCALL with non-clear VMCS (when activating the dual-monitor "
    "treatment)",
    _E.VMCALL_WITH_INVALID_EXIT_CONTROL_FIELDS: "VMCALL with invalid VM-exit control fields",
    _E.VMCALL_WITH_INCORRECT_MSEG_REVISION_IDENTIFIER: "VMCALL with incorrect MSEG revision "
    "identifier (when activating the dual-monitor treatment)",
    _E.VMXOFF_UNDER_DUAL_MONITOR_TREATMENT: "VMXOFF under dual-monitor treatment of SMIs and SMM",
    _E.VMCALL_WITH_INVALID_SMM_MONITOR_FEATURES: "VMCALL with invalid SMM-monitor features (when "
    "activating the dual-monitor treatment)",
    _E.ENTRY_WITH_INVALID_EXECUTION_CONTROLS_IN_EXECUTIVE_VMCS: "VM entry with invalid "
    "VM-execution control fields in executive VMCS (when returning from SMM)",
    _E.ENTRY_WITH_EVENTS_BLOCKED_BY_MOV_SS: "VM entry with events blocked by MOV SS",
    _E.INVALID_OPERAND_TO_INVEPT_OR_INVVPID: "Invalid operand to INVEPT/INVVPID",
}


class VmxAbort(IntEnum):
    """The VMX-abort indicator, at byte 4 of the VMCS region ("VMX Aborts")."""

    SAVING_GUEST_MSRS_FAILED = 1
    HOST_PDPTE_CHECKING_FAILED = 2
    CURRENT_VMCS_CORRUPTED = 3
    LOADING_HOST_MSRS_FAILED = 4
    MACHINE_CHECK_DURING_EXIT = 5
    HOST_IN_32_BIT_FROM_IA32E_GUEST = 6
