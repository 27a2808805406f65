"""What the manual says where a target does something else than a rule: one text for each rule.

The words in quotation marks are the manual's: Intel SDM volume 3C, chapters "VM Entries" and "VM
Exits"; AMD APM volume 2, chapter "Secure Virtual Machine".  The editions are in `arch/SOURCES.md`.
"""

from __future__ import annotations

from typing import Final

_MSR_STORE: Final = (
    'SDM, "Saving MSRs": such an entry causes a VMX abort, and "VMX Aborts": the processor first '
    "saves a nonzero value in the VMX-abort indicator of the VMCS region, then enters the shutdown "
    "state. Bochs stops the processor at this VM exit, and its neighbour finds the indicator still "
    "0. The rule stands; Bochs leaves out the record."
)
_COUNTERS: Final = (
    'SDM: if the control that loads IA32_PERF_GLOBAL_CTRL is 1, "bits reserved in the '
    "IA32_PERF_GLOBAL_CTRL MSR must be 0 in the field for that register\". Bit 40 is no counter's. "
    "The rule stands; Bochs does not look."
)
_ERROR_CODE: Final = (
    'SDM, "VM-Entry Control Fields": the deliver-error-code bit may be 1 only if "the interruption '
    "type is hardware exception\" and, in the guest's CR0, PE is 1. IA32_VMX_BASIC[56] lifts only "
    "the third condition, that the vector is one with an error code. The rule stands; on a "
    "processor with that bit Bochs leaves out all three (on one without it, it agrees)."
)
_STEP: Final = (
    'SDM, "Checks on Guest Non-Register State": while events are blocked by STI or MOV SS, or in '
    "the activity state HLT, BS (bit 14) must be 1 if RFLAGS.TF is 1 and IA32_DEBUGCTL.BTF is 0, "
    "and 0 otherwise. The entry has blocking by MOV SS. The rule stands; Bochs enters."
)
_EXCEPTION: Final = (
    'APM, "Event Injection": VMRUN exits with VMEXIT_INVALID for an exception with "a vector that '
    'does not correspond to an exception". On a processor without the feature the vector is a '
    "reserved one and corresponds to none. That the feature counts is our reading; the sentence "
    "names none. Bochs and QEMU refuse vector 2 and deliver this one."
)
_WIDTH: Final = (
    'APM, "Canonicalization and Consistency Checks": illegal if "any MBZ bit of CR3 is set". In '
    "long mode bits 63:52 must be zero, and so must be the bits of the table's base address that "
    "the processor does not implement. The rule stands; Bochs enters, and the first walk of the "
    "guest's tables goes astray."
)
_TABLES: Final = (
    'APM, "Canonicalization and Consistency Checks": illegal if "the MSR or IOIO intercept tables '
    "extend to a physical address that is greater than or equal to the maximum supported physical "
    'address". The rule stands; Bochs does not look.'
)
_NESTED: Final = (
    'APM, "Nested Paging and VMRUN/#VMEXIT": illegal in addition are "any MBZ bit of nCR3 is set" '
    'and "any G_PAT.PA field has an unsupported type encoding or any reserved field in G_PAT has a '
    'nonzero value". The rule stands; QEMU does not look.'
)
_MBZ: Final = (
    'APM, "Canonicalization and Consistency Checks": illegal if "any MBZ bit" of the register is '
    "set, and the bit of a feature that CPUID does not report is one. The rule stands; QEMU takes "
    "the bit although its CPUID hides the feature."
)

SETTLED: Final[dict[str, str]] = {
    "vmx.controls.entry.event.error-code-type": _ERROR_CODE,
    "vmx.controls.entry.event.error-code-real-mode": _ERROR_CODE,
    "vmx.controls.entry.event.other": (
        'SDM, "VM-Entry Control Fields": the type must not be "other event" on a processor that '
        'does not support the 1-setting of "monitor trap flag", and the entry fails with error 7. '
        "The rule stands; Bochs passes the check and then gives itself up."
    ),
    "vmx.controls.entry.smm.entry": (
        'SDM, "VM-Entry Control Fields": outside SMM the controls "entry to SMM" and "deactivate '
        'dual-monitor treatment" must be 0. That is a check of control fields, which come before '
        "the guest state and fail with error 7. The rule stands; Bochs, which offers the control, "
        "finds only the interruptibility state wrong."
    ),
    "vmx.host.cr4.cet": (
        'SDM, "Checks on Host Control Registers, MSRs, and SSP": "If bit 23 in the CR4 field '
        '(corresponding to CET) is 1, bit 16 in the CR0 field (WP) must also be 1". The rule '
        "stands; Bochs checks that of the guest only."
    ),
    "vmx.host.perf-global-ctrl": _COUNTERS,
    "vmx.guest.perf-global-ctrl": _COUNTERS,
    "vmx.guest.debugctl": (
        'SDM, "Checks on Guest Control Registers, Debug Registers, and MSRs": if "load debug '
        'controls" is 1, bits that are reserved in IA32_DEBUGCTL must be 0, and bit 5 is. The rule '
        "stands; Bochs does not look."
    ),
    "vmx.guest.ia32e.pg": (
        'SDM, "Checks on Guest Control Registers, Debug Registers, and MSRs": if "IA-32e mode '
        'guest" is 1, CR0.PG and CR4.PAE must each be 1. That an unrestricted guest may have PG '
        "clear lifts another check, the one of bits fixed in CR0. The rule stands; Bochs enters."
    ),
    "vmx.guest.rip.canonical": (
        'SDM, "Checks on Guest RIP, RFLAGS, and SSP": with N linear-address bits, "bits 63:N must '
        'be identical" for a 64-bit guest. Bit 62 alone is set here. (Bit N-1 is not among them, '
        "so that 0000800000000000H may be entered.) The rule stands; Bochs enters and the first "
        "fetch faults."
    ),
    "vmx.guest.rflags.vm-real": (
        'SDM, "Checks on Guest RIP, RFLAGS, and SSP": RFLAGS.VM must be 0 if "IA-32e mode guest" '
        "is 1 or CR0.PE is 0. The rule stands; Bochs checks the first half."
    ),
    "vmx.guest.activity.hlt-event": (
        'SDM, "Checks on Guest Non-Register State": the events that may be injected in the '
        "activity state HLT are external interrupts, NMIs, the hardware exceptions 1 and 18, and "
        "a pending MTF VM exit. The entry injects #UD. The rule stands; Bochs delivers it."
    ),
    "vmx.guest.interruptibility.nmi-sti": (
        'Both refuse. SDM, "VM-Entry Failures During or After Loading Guest State": the exit '
        "qualification is 3 where the failure was due to an attempt to inject an NMI into a guest "
        "that blocks events by STI. The rule stands; Bochs gives 0. (A processor may also accept "
        "this NMI; these two do not.)"
    ),
    "vmx.guest.interruptibility.virtual-nmi": (
        'SDM, "Checks on Guest Non-Register State": with "virtual NMIs", bit 3 (blocking by NMI) '
        "must be 0 if an NMI is injected. The rule stands; Bochs delivers it."
    ),
    "vmx.guest.pending-debug.bs-missing": _STEP,
    "vmx.guest.pending-debug.bs-excess": _STEP,
    "vmx.msr-store.x2apic": _MSR_STORE,
    "vmx.msr-store.smm-only": _MSR_STORE,
    "vmx.msr-store.reserved": _MSR_STORE,
    "vmx.msr-store.readable": _MSR_STORE,
    "svm.cr3.high": _WIDTH,
    "svm.cr3.width": _WIDTH,
    "svm.long_mode.pe": (
        'APM, "Canonicalization and Consistency Checks": illegal if "EFER.LME and CR0.PG are both '
        'non-zero and CR0.PE is zero". The rule stands; Bochs loads the state and gives itself up.'
    ),
    "svm.msrpm.range": _TABLES,
    "svm.iopm.range": _TABLES,
    "svm.eventinj.cp": _EXCEPTION,
    "svm.eventinj.vc": _EXCEPTION,
    "svm.eventinj.mode": (
        'APM, "Event Injection": an event "that is impossible for the guest mode (e.g., a #BR '
        'exception when the guest is in 64-bit mode)" gives VMEXIT_INVALID. The entry injects #OF '
        "into 64-bit code. The rule stands; Bochs and QEMU deliver it."
    ),
    "svm.efer.nxe": _MBZ,
    "svm.efer.ffxsr": _MBZ,
    "svm.cr4.pcide": _MBZ,
    "svm.np.host_paging": (
        'APM, "Enabling Nested Paging": VMRUN "with hCR0.PG cleared to zero and NP_ENABLE set to '
        '1" terminates with VMEXIT_INVALID. The rule stands; QEMU enters.'
    ),
    "svm.np.n_cr3.high": _NESTED,
    "svm.np.n_cr3.width": _NESTED,
    "svm.np.g_pat.reserved": _NESTED,
    "svm.np.g_pat.type": _NESTED,
}
"""Rule -> what the manual says, and who is right."""


def settlement(rule: str) -> str:
    """What the manual says of a disagreement; empty where nobody has looked yet."""
    return SETTLED.get(rule, "")
