"""What each exit reason means, and how to read its exit qualification and instruction information.

SDM, appendix "VMX Basic Exit Reasons"; chapter "VM Exits", sections "Exit Qualification" and
"Information for VM Exits Due to Instruction Execution".
"""

from __future__ import annotations

from undervisor.arch.bits import Register
from undervisor.arch.vmx import exits as x
from undervisor.arch.vmx.exits import ExitReason as R

MEANINGS: dict[R, str] = {
    R.EXCEPTION_OR_NMI: "an exception that the exception bitmap selects, or an NMI",
    R.EXTERNAL_INTERRUPT: 'an external interrupt, with "external-interrupt exiting"',
    R.TRIPLE_FAULT: "an exception during the delivery of a double fault",
    R.INIT_SIGNAL: "an INIT signal arrived",
    R.STARTUP_IPI: "a startup IPI arrived in the wait-for-SIPI state",
    R.IO_SMI: "an SMI right after an I/O instruction, under dual-monitor treatment",
    R.OTHER_SMI: "another SMI, under dual-monitor treatment",
    R.INTERRUPT_WINDOW: "the guest became able to take an interrupt",
    R.NMI_WINDOW: "the guest became able to take a virtual NMI",
    R.TASK_SWITCH: "the guest tried to switch tasks",
    R.CPUID: "CPUID",
    R.GETSEC: "GETSEC",
    R.HLT: 'HLT, with "HLT exiting"',
    R.INVD: "INVD",
    R.INVLPG: 'INVLPG, with "INVLPG exiting"',
    R.RDPMC: 'RDPMC, with "RDPMC exiting"',
    R.RDTSC: 'RDTSC, with "RDTSC exiting"',
    R.RSM: "RSM in SMM",
    R.VMCALL: "VMCALL: the guest calls its hypervisor",
    R.VMCLEAR: "VMCLEAR",
    R.VMLAUNCH: "VMLAUNCH",
    R.VMPTRLD: "VMPTRLD",
    R.VMPTRST: "VMPTRST",
    R.VMREAD: "VMREAD of a field that is not shadowed",
    R.VMRESUME: "VMRESUME",
    R.VMWRITE: "VMWRITE of a field that is not shadowed",
    R.VMXOFF: "VMXOFF",
    R.VMXON: "VMXON",
    R.CONTROL_REGISTER_ACCESSES: "an access to CR0, CR3, CR4 or CR8 that the controls select",
    R.MOV_DR: 'MOV to or from a debug register, with "MOV-DR exiting"',
    R.IO_INSTRUCTION: "an I/O instruction that the controls or the I/O bitmaps select",
    R.RDMSR: "RDMSR of an MSR that the MSR bitmaps select, or without MSR bitmaps",
    R.WRMSR: "WRMSR to an MSR that the MSR bitmaps select, or without MSR bitmaps",
    R.ENTRY_FAILURE_INVALID_GUEST_STATE: "VM entry failed a check of the guest-state area",
    R.ENTRY_FAILURE_MSR_LOADING: "VM entry failed to load an MSR from its list",
    R.MWAIT: 'MWAIT, with "MWAIT exiting"',
    R.MONITOR_TRAP_FLAG: 'an instruction ended with "monitor trap flag", or an injected MTF',
    R.MONITOR: 'MONITOR, with "MONITOR exiting"',
    R.PAUSE: 'PAUSE, with "PAUSE exiting", or too many of them with "PAUSE-loop exiting"',
    R.ENTRY_FAILURE_MACHINE_CHECK: "a machine check occurred during VM entry",
    R.TPR_BELOW_THRESHOLD: "the virtual TPR fell below the TPR threshold",
    R.APIC_ACCESS: "an access to the APIC-access page that is not virtualized",
    R.VIRTUALIZED_EOI: "an EOI was virtualized for a vector in the EOI-exit bitmap",
    R.ACCESS_TO_GDTR_OR_IDTR: 'LGDT, LIDT, SGDT or SIDT, with "descriptor-table exiting"',
    R.ACCESS_TO_LDTR_OR_TR: 'LLDT, LTR, SLDT or STR, with "descriptor-table exiting"',
    R.EPT_VIOLATION: "an access to a guest-physical address that EPT does not allow",
    R.EPT_MISCONFIGURATION: "an EPT entry holds a setting that is reserved",
    R.INVEPT: "INVEPT",
    R.RDTSCP: 'RDTSCP, with "RDTSC exiting"',
    R.PREEMPTION_TIMER_EXPIRED: "the VMX-preemption timer counted down to zero",
    R.INVVPID: "INVVPID",
    R.WBINVD_OR_WBNOINVD: 'WBINVD or WBNOINVD, with "WBINVD exiting"',
    R.XSETBV: "XSETBV",
    R.APIC_WRITE: "a write to the virtual-APIC page that the processor leaves to the hypervisor",
    R.RDRAND: 'RDRAND, with "RDRAND exiting"',
    R.INVPCID: 'INVPCID, with "INVLPG exiting"',
    R.VMFUNC: "VMFUNC of a function that is not enabled, or that failed",
    R.ENCLS: "ENCLS of a leaf that the ENCLS-exiting bitmap selects",
    R.RDSEED: 'RDSEED, with "RDSEED exiting"',
    R.PAGE_MODIFICATION_LOG_FULL: "the page-modification log has no free entry",
    R.XSAVES: "XSAVES of a component that the XSS-exiting bitmap selects",
    R.XRSTORS: "XRSTORS of a component that the XSS-exiting bitmap selects",
    R.PCONFIG: "PCONFIG of a leaf that the PCONFIG-exiting bitmap selects",
    R.SPP_RELATED_EVENT: "the sub-page-permission table has no valid entry for a write",
    R.UMWAIT: 'UMWAIT, with "RDTSC exiting"',
    R.TPAUSE: 'TPAUSE, with "RDTSC exiting"',
    R.LOADIWKEY: 'LOADIWKEY, with "LOADIWKEY exiting"',
    R.ENCLV: "ENCLV of a leaf that the ENCLV-exiting bitmap selects",
    R.ENQCMD_PASID_TRANSLATION_FAILURE: "ENQCMD with a PASID that has no translation",
    R.ENQCMDS_PASID_TRANSLATION_FAILURE: "ENQCMDS with a PASID that has no translation",
    R.BUS_LOCK: "the guest asserted a bus lock",
    R.INSTRUCTION_TIMEOUT: "an instruction kept events away for longer than the limit",
    R.SEAMCALL: "SEAMCALL",
    R.TDCALL: "TDCALL",
    R.RDMSRLIST: "RDMSRLIST of an MSR that the MSR bitmaps select",
    R.WRMSRLIST: "WRMSRLIST to an MSR that the MSR bitmaps select",
    R.URDMSR: "URDMSR of an MSR that the MSR bitmaps select",
    R.UWRMSR: "UWRMSR to an MSR that the MSR bitmaps select",
    R.RDMSR_IMMEDIATE: "RDMSR, immediate form, of an MSR that the MSR bitmaps select",
    R.WRMSR_IMMEDIATE: "WRMSRNS, immediate form, to an MSR that the MSR bitmaps select",
}
"""In a few words, what made the processor leave the guest."""

QUALIFICATIONS: dict[R, type[Register]] = {
    R.EXCEPTION_OR_NMI: x.DebugExceptionQualification,
    R.TASK_SWITCH: x.TaskSwitchQualification,
    R.CONTROL_REGISTER_ACCESSES: x.CrAccessQualification,
    R.MOV_DR: x.MovDrQualification,
    R.IO_INSTRUCTION: x.IoQualification,
    R.APIC_ACCESS: x.ApicAccessQualification,
    R.EPT_VIOLATION: x.EptViolationQualification,
    R.PAGE_MODIFICATION_LOG_FULL: x.PmlFullQualification,
    R.SPP_RELATED_EVENT: x.SppQualification,
}
"""The reasons whose qualification has fields; for exceptions, those of #DB (#PF: an address)."""

PLAIN_QUALIFICATIONS: dict[R, str] = {
    R.STARTUP_IPI: "the SIPI vector (bits 7:0)",
    R.INVLPG: "the linear-address operand",
    R.ENTRY_FAILURE_INVALID_GUEST_STATE: "which check failed (EntryFailureQualification)",
    R.ENTRY_FAILURE_MSR_LOADING: "the number of the entry in the list, from 1",
    R.MWAIT: "bit 0: the monitor was armed",
    R.VIRTUALIZED_EOI: "the vector (bits 7:0)",
    R.APIC_WRITE: "the offset of the write in the virtual-APIC page (bits 11:0)",
    R.ACCESS_TO_GDTR_OR_IDTR: "the displacement of the memory operand",
    R.ACCESS_TO_LDTR_OR_TR: "the displacement of the memory operand",
    R.INVEPT: "the displacement of the memory operand",
    R.INVVPID: "the displacement of the memory operand",
    R.INVPCID: "the displacement of the memory operand",
    R.VMCLEAR: "the displacement of the memory operand",
    R.VMPTRLD: "the displacement of the memory operand",
    R.VMPTRST: "the displacement of the memory operand",
    R.VMREAD: "the displacement of the memory operand",
    R.VMWRITE: "the displacement of the memory operand",
    R.VMXON: "the displacement of the memory operand",
    R.XSAVES: "the displacement of the memory operand",
    R.XRSTORS: "the displacement of the memory operand",
    R.INSTRUCTION_TIMEOUT: "bit 0: the VM context is invalid; bit 12: NMI unblocking",
    R.RDMSRLIST: "the MSR index",
    R.WRMSRLIST: "the MSR index",
    R.URDMSR: "the MSR index",
    R.UWRMSR: "the MSR index",
    R.RDMSR_IMMEDIATE: "the MSR index",
    R.WRMSR_IMMEDIATE: "the MSR index",
}
"""The reasons whose qualification is one value, and what it is."""

INSTRUCTION_INFORMATION: dict[R, type[Register]] = {
    R.VMCLEAR: x.MemoryOperandInformation,
    R.VMPTRLD: x.MemoryOperandInformation,
    R.VMPTRST: x.MemoryOperandInformation,
    R.VMXON: x.MemoryOperandInformation,
    R.XSAVES: x.MemoryOperandInformation,
    R.XRSTORS: x.MemoryOperandInformation,
    R.INVEPT: x.InvalidationInformation,
    R.INVVPID: x.InvalidationInformation,
    R.INVPCID: x.InvalidationInformation,
    R.VMREAD: x.VmreadInformation,
    R.VMWRITE: x.VmreadInformation,
    R.ACCESS_TO_GDTR_OR_IDTR: x.GdtrIdtrInformation,
    R.ACCESS_TO_LDTR_OR_TR: x.LdtrTrInformation,
    R.IO_INSTRUCTION: x.InsOutsInformation,
    R.RDRAND: x.RandomInformation,
    R.RDSEED: x.RandomInformation,
    R.UMWAIT: x.RandomInformation,
    R.TPAUSE: x.RandomInformation,
    R.LOADIWKEY: x.LoadiwkeyInformation,
    R.URDMSR: x.MsrImmediateInformation,
    R.UWRMSR: x.MsrImmediateInformation,
    R.RDMSR_IMMEDIATE: x.MsrImmediateInformation,
    R.WRMSR_IMMEDIATE: x.MsrImmediateInformation,
}
"""The reasons that come with instruction information, and its layout (for I/O: INS and OUTS)."""

UNCONDITIONAL = frozenset(
    {
        R.TRIPLE_FAULT,
        R.TASK_SWITCH,
        R.CPUID,
        R.GETSEC,
        R.INVD,
        R.VMCALL,
        R.VMCLEAR,
        R.VMLAUNCH,
        R.VMPTRLD,
        R.VMPTRST,
        R.VMRESUME,
        R.VMXOFF,
        R.VMXON,
        R.INVEPT,
        R.INVVPID,
        R.XSETBV,
        R.SEAMCALL,
        R.TDCALL,
    }
)
"""What always leaves the guest: no control can keep it inside."""

TRAP_LIKE = frozenset(
    {
        R.MONITOR_TRAP_FLAG,
        R.TPR_BELOW_THRESHOLD,
        R.VIRTUALIZED_EOI,
        R.APIC_WRITE,
        R.BUS_LOCK,
    }
)
"""The exits that come after the instruction that caused them, so that RIP is the next one."""


def describe_qualification(reason: R, qualification: int) -> str:
    """The exit qualification of `reason` in words."""
    layout = QUALIFICATIONS.get(reason)
    if layout is not None:
        value = layout(qualification)
        parts = (
            f"{bits.about or name} = {(qualification & bits.mask) >> bits.lsb:#x}"
            for name, bits in layout.FIELDS.items()
            if value & bits.mask
        )
        return "; ".join(parts) or "all fields are 0"
    meaning = PLAIN_QUALIFICATIONS.get(reason)
    return f"{qualification:#x}: {meaning}" if meaning else "the reason has no qualification"
