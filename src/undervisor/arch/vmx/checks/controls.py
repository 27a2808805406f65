"""Checks on VMX controls: a broken one gives VMfailValid with error 7.

SDM, chapter "VM Entries", section "Checks on VMX Controls", in the manual's order.
"""

from __future__ import annotations

from undervisor.arch.bits import Register
from undervisor.arch.rules import Outcome
from undervisor.arch.vmx.checks.declare import (
    EXIT_2,
    SECONDARY,
    TERTIARY,
    Condition,
    Section,
    State,
    address,
    primary,
    secondary,
    tertiary,
)
from undervisor.arch.vmx.checks.inputs import EntryInput
from undervisor.arch.vmx.controls import CONTROL_WORDS, InterruptionType
from undervisor.arch.vmx.controls import EntryControls as Entry
from undervisor.arch.vmx.controls import EntryInterruptionInformation as Info
from undervisor.arch.vmx.controls import ExitControls as Exit
from undervisor.arch.vmx.controls import PinBasedControls as Pin
from undervisor.arch.vmx.controls import PrimaryControls as Primary
from undervisor.arch.vmx.controls import SecondaryControls as Secondary
from undervisor.arch.vmx.controls import TertiaryControls as Tertiary
from undervisor.arch.vmx.controls import VmFunctionControls as VmFunctions
from undervisor.arch.vmx.fields import VmcsField as F

EXECUTION = Section("vmx.controls", "VM-Execution Control Fields", Outcome.FAIL_CONTROL)
EXIT = Section("vmx.controls.exit", "VM-Exit Control Fields", Outcome.FAIL_CONTROL)
ENTRY = Section("vmx.controls.entry", "VM-Entry Control Fields", Outcome.FAIL_CONTROL)

PIN = F.PIN_BASED_CONTROLS
PRIMARY = (F.PRIMARY_CONTROLS,)
INFO = F.ENTRY_INTERRUPTION_INFORMATION
PAGE = 4096
VALID = Info.valid
ERROR_CODE = Info.deliver_error_code
EPT = secondary(Secondary.enable_ept)
TPR_SHADOW = Primary.use_tpr_shadow
VID = secondary(Secondary.virtual_interrupt_delivery)
VPID = secondary(Secondary.enable_vpid)
TSC_SCALING = secondary(Secondary.use_tsc_scaling)


def always(state: object) -> bool:
    """The condition of a rule that has none."""
    return True


def reserved(
    section: Section,
    name: str,
    field: F,
    condition: Condition = always,
    reads: tuple[int, ...] = (),
    given: str = "",
) -> None:
    """Two rules for a control word's reserved bits: those that must be 1, and must be 0."""
    word = CONTROL_WORDS[field]
    msr = f"MSR {word.msr:#x}" + (f" (or {word.true_msr:#x})" if word.true_msr else "")
    if not word.flexible:
        section.rule(
            f"{name}.must-be-one",
            f"{given}Bits that the processor requires to be 1 must be 1 in {field.name}",
            (field, *reads),
            lambda s, c: not c.controls[field].must_be_one & ~s[field] or not condition(s),
            f"OR the field with bits 31:0 of {msr}, its allowed 0-settings",
            assumes=msr,
        )
    which = f"bits 63:32 of {msr}" if not word.flexible else msr
    section.rule(
        f"{name}.may-be-one",
        f"{given}Bits that the processor does not support must be 0 in {field.name}",
        (field, *reads),
        lambda s, c: not s[field] & ~c.controls[field].may_be_one or not condition(s),
        f"AND the field with {which}, its allowed 1-settings",
        assumes=msr,
    )


def needs(
    section: Section,
    name: str,
    one: tuple[str, Condition, tuple[int, ...]],
    other: tuple[str, Condition, tuple[int, ...]],
    *,
    value: int = 1,
) -> None:
    """If control `one` is 1, control `other` must be `value`."""
    (label, condition, reads), (label2, condition2, reads2) = one, other
    section.rule(
        name,
        f'If "{label}" is 1, "{label2}" must be {value}',
        (*reads, *reads2),
        (lambda s, c: not condition(s) or condition2(s))
        if value
        else (lambda s, c: not condition(s) or not condition2(s)),
        f'clear "{label}" or {"set" if value else "clear"} "{label2}"',
    )


def named(
    layout: type[Register], bit: str, condition: Condition, reads: tuple[int, ...]
) -> tuple[str, Condition, tuple[int, ...]]:
    """A control as `needs` takes it, named by its layout."""
    return layout.FIELDS[bit].about, condition, reads


def of_secondary(bit: str) -> tuple[str, Condition, tuple[int, ...]]:
    """A secondary control as `needs` takes it."""
    return named(Secondary, bit, secondary(Secondary.FIELDS[bit].mask), SECONDARY)


def of_tertiary(bit: str) -> tuple[str, Condition, tuple[int, ...]]:
    """A tertiary control as `needs` takes it."""
    return named(Tertiary, bit, tertiary(Tertiary.FIELDS[bit].mask), TERTIARY)


def of_primary(bit: str) -> tuple[str, Condition, tuple[int, ...]]:
    """A primary control as `needs` takes it."""
    return named(Primary, bit, primary(Primary.FIELDS[bit].mask), PRIMARY)


def of_field(layout: type[Register], field: F, bit: str) -> tuple[str, Condition, tuple[int, ...]]:
    """A control of a word that is always active, as `needs` takes it."""
    mask: int = layout.FIELDS[bit].mask
    return named(layout, bit, lambda s: s[field] & mask, (field,))


def page(
    name: str, label: str, field: F, control: tuple[str, Condition, tuple[int, ...]], align: int
) -> None:
    """Two rules for the address of a structure that an execution control uses."""
    title, condition, reads = control
    address(
        EXECUTION,
        name,
        label,
        field,
        alignment=align,
        condition=condition,
        given=f'"{title}" is 1',
        reads=reads,
    )


# --- VM-Execution Control Fields -----------------------------------------------------------------

reserved(EXECUTION, "pin", F.PIN_BASED_CONTROLS)
reserved(EXECUTION, "primary", F.PRIMARY_CONTROLS)
reserved(
    EXECUTION,
    "secondary",
    F.SECONDARY_CONTROLS,
    primary(Primary.activate_secondary_controls),
    PRIMARY,
    'If "activate secondary controls" is 1: ',
)
reserved(
    EXECUTION,
    "tertiary",
    F.TERTIARY_CONTROLS,
    primary(Primary.activate_tertiary_controls),
    PRIMARY,
    'If "activate tertiary controls" is 1: ',
)
EXECUTION.rule(
    "cr3-target-count",
    "The CR3-target count must not be greater than the number of CR3-target values supported",
    (F.CR3_TARGET_COUNT,),
    lambda s, c: s[F.CR3_TARGET_COUNT] <= c.misc.cr3_targets,
    "use at most as many CR3-target values as IA32_VMX_MISC bits 24:16 report (4 on every "
    "processor so far)",
    assumes="IA32_VMX_MISC[24:16]",
)
IO_BITMAPS = of_primary("use_io_bitmaps")
page("io-bitmap-a", "address of I/O bitmap A", F.IO_BITMAP_A_ADDRESS, IO_BITMAPS, PAGE)
page("io-bitmap-b", "address of I/O bitmap B", F.IO_BITMAP_B_ADDRESS, IO_BITMAPS, PAGE)
page(
    "msr-bitmap",
    "MSR-bitmap address",
    F.MSR_BITMAP_ADDRESS,
    of_primary("use_msr_bitmaps"),
    PAGE,
)
page(
    "virtual-apic",
    "virtual-APIC address",
    F.VIRTUAL_APIC_ADDRESS,
    of_primary("use_tpr_shadow"),
    PAGE,
)
EXECUTION.rule(
    "tpr-threshold.reserved",
    'If "use TPR shadow" is 1 and "virtual-interrupt delivery" is 0, bits 31:4 of the TPR '
    "threshold must be 0",
    (F.TPR_THRESHOLD, *SECONDARY),
    lambda s, c: (
        not s[F.TPR_THRESHOLD] & 0xFFFF_FFF0 or not s[F.PRIMARY_CONTROLS] & TPR_SHADOW or VID(s)
    ),
    "give the TPR threshold as a priority class 0 to 15",
)
_APIC_ACCESSES = secondary(Secondary.virtualize_apic_accesses)
EXECUTION.rule(
    "tpr-threshold.vtpr",
    'If "use TPR shadow" is 1 and "virtualize APIC accesses" and "virtual-interrupt delivery" '
    "are 0, bits 3:0 of the TPR threshold must not be greater than bits 7:4 of VTPR",
    (F.TPR_THRESHOLD, EntryInput.VIRTUAL_TPR, F.VIRTUAL_APIC_ADDRESS, *SECONDARY),
    lambda s, c: (
        not s[F.PRIMARY_CONTROLS] & TPR_SHADOW
        or not s[F.TPR_THRESHOLD] & 0xF
        or VID(s)
        or _APIC_ACCESSES(s)
        or s[F.TPR_THRESHOLD] & 0xF <= s[EntryInput.VIRTUAL_TPR] >> 4
    ),
    "lower the TPR threshold, or raise the task priority at offset 80H of the virtual-APIC page",
)
NMI_EXITING = of_field(Pin, PIN, "nmi_exiting")
VIRTUAL_NMIS = of_field(Pin, PIN, "virtual_nmis")
needs(EXECUTION, "virtual-nmis.nmi-exiting", VIRTUAL_NMIS, NMI_EXITING)
needs(EXECUTION, "nmi-window.virtual-nmis", of_primary("nmi_window_exiting"), VIRTUAL_NMIS)
page(
    "apic-access",
    "APIC-access address",
    F.APIC_ACCESS_ADDRESS,
    of_secondary("virtualize_apic_accesses"),
    PAGE,
)
needs(
    EXECUTION,
    "x2apic.tpr-shadow",
    of_secondary("virtualize_x2apic_mode"),
    of_primary("use_tpr_shadow"),
)
needs(
    EXECUTION,
    "apic-registers.tpr-shadow",
    of_secondary("apic_register_virtualization"),
    of_primary("use_tpr_shadow"),
)
needs(
    EXECUTION,
    "virtual-interrupts.tpr-shadow",
    of_secondary("virtual_interrupt_delivery"),
    of_primary("use_tpr_shadow"),
)
needs(
    EXECUTION,
    "ipi-virtualization.tpr-shadow",
    of_tertiary("ipi_virtualization"),
    of_primary("use_tpr_shadow"),
)
needs(
    EXECUTION,
    "x2apic.apic-accesses",
    of_secondary("virtualize_x2apic_mode"),
    of_secondary("virtualize_apic_accesses"),
    value=0,
)
needs(
    EXECUTION,
    "virtual-interrupts.external-interrupt-exiting",
    of_secondary("virtual_interrupt_delivery"),
    of_field(Pin, PIN, "external_interrupt_exiting"),
)
POSTED = of_field(Pin, PIN, "process_posted_interrupts")
needs(
    EXECUTION,
    "posted-interrupts.virtual-interrupts",
    POSTED,
    of_secondary("virtual_interrupt_delivery"),
)
needs(
    EXECUTION,
    "posted-interrupts.acknowledge",
    POSTED,
    of_field(Exit, F.EXIT_CONTROLS, "acknowledge_interrupt"),
)
EXECUTION.rule(
    "posted-interrupts.vector",
    'If "process posted interrupts" is 1, the posted-interrupt notification vector must be 0 to '
    "255 (bits 15:8 are 0)",
    (F.POSTED_INTERRUPT_NOTIFICATION_VECTOR, PIN),
    lambda s, c: (
        s[F.POSTED_INTERRUPT_NOTIFICATION_VECTOR] <= 0xFF
        or not s[PIN] & Pin.process_posted_interrupts
    ),
    "give a vector of 8 bits",
)
page(
    "posted-interrupts.descriptor",
    "posted-interrupt descriptor address",
    F.POSTED_INTERRUPT_DESCRIPTOR_ADDRESS,
    POSTED,
    64,
)
EXECUTION.rule(
    "vpid.zero",
    'If "enable VPID" is 1, the VPID must not be 0000H',
    (F.VPID, *SECONDARY),
    lambda s, c: s[F.VPID] != 0 or not VPID(s),
    "give each guest processor a VPID of its own; 0 is that of VMX root operation",
)

# EPTP.
EXECUTION.rule(
    "eptp.memory-type",
    'If "enable EPT" is 1, the EPT memory type (bits 2:0 of the EPTP) must be one the processor '
    "supports: 0 (UC) or 6 (WB)",
    (F.EPT_POINTER, *SECONDARY),
    lambda s, c: (
        not EPT(s)
        or (s[F.EPT_POINTER] & 7 == 6 and bool(c.ept_vpid.memory_type_wb))
        or (s[F.EPT_POINTER] & 7 == 0 and bool(c.ept_vpid.memory_type_uc))
    ),
    "set bits 2:0 to 6 (write-back)",
    assumes="IA32_VMX_EPT_VPID_CAP[8] and [14]",
)
EXECUTION.rule(
    "eptp.walk-length",
    'If "enable EPT" is 1, bits 5:3 of the EPTP (page-walk length minus 1) must be a length the '
    "processor supports",
    (F.EPT_POINTER, *SECONDARY),
    lambda s, c: (
        not EPT(s)
        or (s[F.EPT_POINTER] >> 3 & 7 == 3 and bool(c.ept_vpid.walk_length_4))
        or (s[F.EPT_POINTER] >> 3 & 7 == 4 and bool(c.ept_vpid.walk_length_5))
    ),
    "set bits 5:3 to 3 for four levels, one less than the number of levels",
    assumes="IA32_VMX_EPT_VPID_CAP[6] and [7]",
)
EXECUTION.rule(
    "eptp.accessed-dirty",
    'If "enable EPT" is 1, bit 6 of the EPTP must be 0 unless the processor supports accessed '
    "and dirty flags for EPT",
    (F.EPT_POINTER, *SECONDARY),
    lambda s, c: not s[F.EPT_POINTER] & 0x40 or c.ept_vpid.accessed_dirty or not EPT(s),
    "clear bit 6",
    assumes="IA32_VMX_EPT_VPID_CAP[21]",
)
EXECUTION.rule(
    "eptp.supervisor-shadow-stack",
    'If "enable EPT" is 1, bit 7 of the EPTP must be 0 unless the processor supports '
    "supervisor shadow-stack control",
    (F.EPT_POINTER, *SECONDARY),
    lambda s, c: not s[F.EPT_POINTER] & 0x80 or c.ept_vpid.supervisor_shadow_stack or not EPT(s),
    "clear bit 7",
    assumes="IA32_VMX_EPT_VPID_CAP[23]",
)
EXECUTION.rule(
    "eptp.reserved",
    'If "enable EPT" is 1, bits 11:8 of the EPTP must be 0',
    (F.EPT_POINTER, *SECONDARY),
    lambda s, c: not s[F.EPT_POINTER] & 0xF00 or not EPT(s),
    "clear bits 11:8; the address of the top table is aligned to 4096 bytes",
)
EXECUTION.rule(
    "eptp.width",
    'If "enable EPT" is 1, the EPTP must not set bits beyond the physical-address width',
    (F.EPT_POINTER, *SECONDARY),
    lambda s, c: not s[F.EPT_POINTER] & c.beyond_maxphyaddr or not EPT(s),
    "give the physical address of the top table, not a virtual one",
    assumes="the processor's physical-address width",
)

ENABLE_EPT = of_secondary("enable_ept")
PML = of_secondary("enable_pml")
needs(EXECUTION, "pml.ept", PML, ENABLE_EPT)
page("pml", "PML address", F.PML_ADDRESS, PML, PAGE)
needs(EXECUTION, "unrestricted-guest.ept", of_secondary("unrestricted_guest"), ENABLE_EPT)
needs(EXECUTION, "mode-based-execute.ept", of_secondary("mode_based_execute_control"), ENABLE_EPT)
SPP = of_secondary("sub_page_write_permissions")
needs(EXECUTION, "sub-page-permissions.ept", SPP, ENABLE_EPT)
page(
    "sub-page-permissions.table",
    "sub-page-permission-table pointer",
    F.SUB_PAGE_PERMISSION_TABLE_POINTER,
    SPP,
    PAGE,
)

# VM functions.
_VM_FUNCTIONS = secondary(Secondary.enable_vm_functions)
reserved(
    EXECUTION,
    "vm-functions",
    F.VM_FUNCTION_CONTROLS,
    _VM_FUNCTIONS,
    SECONDARY,
    'If "enable VM functions" is 1: ',
)
EPTP_SWITCHING: tuple[str, Condition, tuple[int, ...]] = (
    "EPTP switching",
    lambda s: s[F.VM_FUNCTION_CONTROLS] & VmFunctions.eptp_switching and _VM_FUNCTIONS(s),
    (F.VM_FUNCTION_CONTROLS, *SECONDARY),
)
needs(EXECUTION, "eptp-switching.ept", EPTP_SWITCHING, ENABLE_EPT)
page("eptp-list", "EPTP-list address", F.EPTP_LIST_ADDRESS, EPTP_SWITCHING, PAGE)

SHADOWING = of_secondary("vmcs_shadowing")
page("vmread-bitmap", "VMREAD-bitmap address", F.VMREAD_BITMAP_ADDRESS, SHADOWING, PAGE)
page("vmwrite-bitmap", "VMWRITE-bitmap address", F.VMWRITE_BITMAP_ADDRESS, SHADOWING, PAGE)
page(
    "virtualization-exception",
    "virtualization-exception information address",
    F.VIRTUALIZATION_EXCEPTION_INFORMATION_ADDRESS,
    of_secondary("ept_violation_ve"),
    PAGE,
)

# Intel PT.
PT_GPA = of_secondary("pt_uses_guest_physical_addresses")
needs(EXECUTION, "pt.ept", PT_GPA, ENABLE_EPT)
needs(EXECUTION, "pt.load-rtit-ctl", PT_GPA, of_field(Entry, F.ENTRY_CONTROLS, "load_rtit_ctl"))
needs(EXECUTION, "pt.clear-rtit-ctl", PT_GPA, of_field(Exit, F.EXIT_CONTROLS, "clear_rtit_ctl"))

EXECUTION.rule(
    "tsc-multiplier.zero",
    'If "use TSC scaling" is 1, the TSC multiplier must not be 0',
    (F.TSC_MULTIPLIER, *SECONDARY),
    lambda s, c: s[F.TSC_MULTIPLIER] != 0 or not TSC_SCALING(s),
    "set the multiplier to 1 << 48 for an unscaled TSC",
)
PASID = of_secondary("pasid_translation")
page(
    "pasid.low-directory",
    "low PASID directory address",
    F.LOW_PASID_DIRECTORY_ADDRESS,
    PASID,
    PAGE,
)
page(
    "pasid.high-directory",
    "high PASID directory address",
    F.HIGH_PASID_DIRECTORY_ADDRESS,
    PASID,
    PAGE,
)

# Tertiary controls.
HLAT = of_tertiary("enable_hlat")
needs(EXECUTION, "hlat.ept", HLAT, ENABLE_EPT)
needs(EXECUTION, "paging-write.ept", of_tertiary("ept_paging_write_control"), ENABLE_EPT)
needs(EXECUTION, "guest-paging.ept", of_tertiary("guest_paging_verification"), ENABLE_EPT)
EXECUTION.rule(
    "hlat.reserved",
    'If "enable HLAT" is 1, bits 2:0 and 11:5 of the HLAT pointer must be 0',
    (F.HLAT_POINTER, *TERTIARY),
    lambda s, c: not s[F.HLAT_POINTER] & 0xFE7 or not HLAT[1](s),
    "clear all low bits but PWT and PCD (bits 3 and 4)",
)
EXECUTION.rule(
    "hlat.width",
    'If "enable HLAT" is 1, the HLAT pointer must not set bits beyond the physical-address width',
    (F.HLAT_POINTER, *TERTIARY),
    lambda s, c: not s[F.HLAT_POINTER] & c.beyond_maxphyaddr or not HLAT[1](s),
    "give the guest-physical address of the top HLAT table",
    assumes="the processor's physical-address width",
)
IPI = of_tertiary("ipi_virtualization")
page("pid-pointers", "PID-pointer table address", F.PID_POINTER_TABLE_ADDRESS, IPI, 8)
EXECUTION.rule(
    "pid-pointers.last",
    'If "IPI virtualization" is 1, the address of the last PID-pointer table entry must not set '
    "bits beyond the physical-address width",
    (F.LAST_PID_POINTER_INDEX, F.PID_POINTER_TABLE_ADDRESS, *TERTIARY),
    lambda s, c: (
        not IPI[1](s)
        or not (s[F.PID_POINTER_TABLE_ADDRESS] + 8 * s[F.LAST_PID_POINTER_INDEX]) & c.beyond_width
        or bool(s[F.PID_POINTER_TABLE_ADDRESS] & c.beyond_width)
    ),
    "move the table lower, or shorten it",
    assumes="the processor's physical-address width",
)


# --- VM-Exit Control Fields ----------------------------------------------------------------------


def msr_list(section: Section, name: str, label: str, count: F, where: F) -> None:
    """Three rules for an MSR-load or MSR-store area that is not empty."""
    address(
        section,
        name,
        f"{label} address",
        where,
        alignment=16,
        condition=lambda s: s[count],
        given=f"the {label} count is not 0",
        reads=(count,),
    )
    section.rule(
        f"{name}.last",
        f"If the {label} count is not 0, the address of the last byte of the area must not set "
        "bits beyond the physical-address width",
        (count, where),
        lambda s, c: (
            not s[count]
            or not (s[where] + 16 * s[count] - 1) & c.beyond_width
            # The rule for the first byte says it where the address itself is too high.
            or bool(s[where] & c.beyond_width)
        ),
        "shorten the list or move it lower",
        assumes="the processor's physical-address width",
    )


reserved(EXIT, "primary", F.EXIT_CONTROLS)
reserved(
    EXIT,
    "secondary",
    F.SECONDARY_EXIT_CONTROLS,
    lambda s: s[F.EXIT_CONTROLS] & Exit.activate_secondary_controls,
    EXIT_2[1:],
    'If "activate secondary controls" is 1: ',
)
needs(
    EXIT,
    "save-preemption-timer",
    of_field(Exit, F.EXIT_CONTROLS, "save_preemption_timer"),
    of_field(Pin, PIN, "preemption_timer"),
)
msr_list(EXIT, "msr-store", "VM-exit MSR-store", F.EXIT_MSR_STORE_COUNT, F.EXIT_MSR_STORE_ADDRESS)
msr_list(EXIT, "msr-load", "VM-exit MSR-load", F.EXIT_MSR_LOAD_COUNT, F.EXIT_MSR_LOAD_ADDRESS)


# --- VM-Entry Control Fields ---------------------------------------------------------------------

reserved(ENTRY, "controls", F.ENTRY_CONTROLS)

HARDWARE_EXCEPTION = InterruptionType.HARDWARE_EXCEPTION << 8
NMI = InterruptionType.NMI << 8
OTHER_EVENT = InterruptionType.OTHER_EVENT << 8
SOFTWARE_TYPES = frozenset(
    {
        InterruptionType.SOFTWARE_INTERRUPT,
        InterruptionType.PRIVILEGED_SOFTWARE_EXCEPTION,
        InterruptionType.SOFTWARE_EXCEPTION,
    }
)
WITH_ERROR_CODE = sum(1 << vector for vector in (8, 10, 11, 12, 13, 14, 17, 21))
"""The exceptions that push an error code: #DF #TS #NP #SS #GP #PF #AC #CP."""
TYPE = Info.type
UNRESTRICTED = secondary(Secondary.unrestricted_guest)


def protected(s: State) -> bool:
    """Whether the guest will be in protected mode: CR0.PE can be 0 only if unrestricted."""
    return bool(s[F.GUEST_CR0] & 1 or not UNRESTRICTED(s))


PROTECTED_READS = (F.GUEST_CR0, *SECONDARY)

ENTRY.rule(
    "event.type",
    "The interruption type of a valid VM-entry interruption information must not be reserved (1)",
    (INFO,),
    lambda s, c: not s[INFO] & VALID or s[INFO] & TYPE != InterruptionType.RESERVED << 8,
    "set bits 10:8 to 0 (external interrupt), 2 (NMI), 3 (hardware exception), 4 (software "
    "interrupt), 5 (privileged software exception) or 6 (software exception)",
)
ENTRY.rule(
    "event.other",
    'Interruption type 7 (other event) needs a processor that supports "monitor trap flag"',
    (INFO,),
    lambda s, c: (
        not s[INFO] & VALID
        or s[INFO] & TYPE != OTHER_EVENT
        or c.controls[F.PRIMARY_CONTROLS].may_be_one & Primary.monitor_trap_flag
    ),
    "use another interruption type",
    assumes='the 1-setting of "monitor trap flag"',
)
ENTRY.rule(
    "event.nmi-vector",
    "If the interruption type is NMI, the vector must be 2",
    (INFO,),
    lambda s, c: not s[INFO] & VALID or s[INFO] & TYPE != NMI or s[INFO] & 0xFF == 2,
    "set bits 7:0 to 2",
)
ENTRY.rule(
    "event.exception-vector",
    "If the interruption type is hardware exception, the vector must be at most 31",
    (INFO,),
    lambda s, c: (
        not s[INFO] & VALID or s[INFO] & TYPE != HARDWARE_EXCEPTION or s[INFO] & 0xFF <= 31
    ),
    "use type 0 (external interrupt) for vectors above 31",
)
ENTRY.rule(
    "event.other-vector",
    "If the interruption type is other event, the vector must be 0 (pending MTF VM exit), or 1 "
    "or 2 (SYSCALL, SYSENTER) on a processor with FRED",
    (INFO,),
    lambda s, c: (
        not s[INFO] & VALID
        or s[INFO] & TYPE != OTHER_EVENT
        or s[INFO] & 0xFF <= (2 if c.processor.fred else 0)
    ),
    "set bits 7:0 to 0",
    assumes="FRED",
)
ENTRY.rule(
    "event.error-code-type",
    "The deliver-error-code bit may be 1 only for a hardware exception",
    (INFO,),
    lambda s, c: (
        s[INFO] & (VALID | ERROR_CODE) != VALID | ERROR_CODE or s[INFO] & TYPE == HARDWARE_EXCEPTION
    ),
    "clear bit 11",
)
ENTRY.rule(
    "event.error-code-real-mode",
    "The deliver-error-code bit must be 0 if the guest's CR0.PE is 0",
    (INFO, *PROTECTED_READS),
    lambda s, c: (
        s[INFO] & (VALID | ERROR_CODE) != VALID | ERROR_CODE
        or s[INFO] & TYPE != HARDWARE_EXCEPTION
        or protected(s)
    ),
    "clear bit 11: exceptions push no error code in real mode",
)
ENTRY.rule(
    "event.error-code-missing",
    "A hardware exception that delivers an error code (#DF #TS #NP #SS #GP #PF #AC #CP) must "
    "have the deliver-error-code bit set, unless the processor leaves the choice",
    (INFO, *PROTECTED_READS),
    lambda s, c: (
        not s[INFO] & VALID
        or s[INFO] & ERROR_CODE
        or s[INFO] & TYPE != HARDWARE_EXCEPTION
        or not WITH_ERROR_CODE >> (s[INFO] & 0xFF) & 1
        or c.basic.exceptions_without_error_code
        or not protected(s)
    ),
    "set bit 11",
    assumes="IA32_VMX_BASIC[56]",
)
ENTRY.rule(
    "event.error-code-excess",
    "A hardware exception that delivers no error code must have the deliver-error-code bit "
    "clear, unless the processor leaves the choice",
    (INFO,),
    lambda s, c: (
        s[INFO] & (VALID | ERROR_CODE) != VALID | ERROR_CODE
        or s[INFO] & TYPE != HARDWARE_EXCEPTION
        or WITH_ERROR_CODE >> (s[INFO] & 0xFF) & 1
        or c.basic.exceptions_without_error_code
    ),
    "clear bit 11",
    assumes="IA32_VMX_BASIC[56]",
)
ENTRY.rule(
    "event.reserved",
    "Bits 30:14 and 12 of a valid VM-entry interruption information must be 0",
    (INFO,),
    lambda s, c: not s[INFO] & VALID or not s[INFO] & 0x7FFF_D000,
    "clear them",
)
ENTRY.rule(
    "event.nested",
    "Bit 13 (nested exception) of a valid VM-entry interruption information must be 0 unless "
    "the processor supports VMX nested exceptions",
    (INFO,),
    lambda s, c: (
        not s[INFO] & VALID or not s[INFO] & Info.nested_exception or c.basic.nested_exception
    ),
    "clear bit 13",
    assumes="IA32_VMX_BASIC[58]",
)
ENTRY.rule(
    "event.error-code-value",
    "If the deliver-error-code bit is 1, bits 31:16 of the VM-entry exception error code must be 0",
    (F.ENTRY_EXCEPTION_ERROR_CODE, INFO),
    lambda s, c: (
        s[INFO] & (VALID | ERROR_CODE) != VALID | ERROR_CODE
        or not s[F.ENTRY_EXCEPTION_ERROR_CODE] & 0xFFFF_0000
    ),
    "give an error code of 16 bits",
)
ENTRY.rule(
    "event.length-zero",
    "For a software interrupt or software exception, the VM-entry instruction length must not "
    "be 0 unless the processor allows it",
    (F.ENTRY_INSTRUCTION_LENGTH, INFO),
    lambda s, c: (
        not s[INFO] & VALID
        or s[F.ENTRY_INSTRUCTION_LENGTH] != 0
        or s[INFO] >> 8 & 7 not in SOFTWARE_TYPES
        or c.misc.inject_zero_length
    ),
    "set the length of the instruction that raises the event, 1 to 15 (2 for INT n)",
    assumes="IA32_VMX_MISC[30]",
)
ENTRY.rule(
    "event.length-range",
    "For a software interrupt or software exception, the VM-entry instruction length must be at "
    "most 15",
    (F.ENTRY_INSTRUCTION_LENGTH, INFO),
    lambda s, c: (
        not s[INFO] & VALID
        or s[F.ENTRY_INSTRUCTION_LENGTH] <= 15
        or s[INFO] >> 8 & 7 not in SOFTWARE_TYPES
    ),
    "set the length of the instruction that raises the event, 1 to 15 (2 for INT n)",
)
msr_list(ENTRY, "msr-load", "VM-entry MSR-load", F.ENTRY_MSR_LOAD_COUNT, F.ENTRY_MSR_LOAD_ADDRESS)
ENTRY.rule(
    "smm.entry",
    'If the processor is not in SMM, "entry to SMM" must be 0',
    (F.ENTRY_CONTROLS, EntryInput.IN_SMM),
    lambda s, c: not s[F.ENTRY_CONTROLS] & Entry.entry_to_smm or s[EntryInput.IN_SMM],
    'clear "entry to SMM"; only an SMM-transfer monitor uses it',
)
ENTRY.rule(
    "smm.deactivate",
    'If the processor is not in SMM, "deactivate dual-monitor treatment" must be 0',
    (F.ENTRY_CONTROLS, EntryInput.IN_SMM),
    lambda s, c: (
        not s[F.ENTRY_CONTROLS] & Entry.deactivate_dual_monitor_treatment or s[EntryInput.IN_SMM]
    ),
    'clear "deactivate dual-monitor treatment"',
)
_BOTH_SMM = Entry.entry_to_smm | Entry.deactivate_dual_monitor_treatment
ENTRY.rule(
    "smm.both",
    '"Entry to SMM" and "deactivate dual-monitor treatment" must not both be 1',
    (F.ENTRY_CONTROLS,),
    lambda s, c: s[F.ENTRY_CONTROLS] & _BOTH_SMM != _BOTH_SMM,
    "clear one of them",
)
ENTRY.rule(
    "rtit-ctl.tracing",
    'If Intel PT is tracing (IA32_RTIT_CTL.TraceEn is 1), "load IA32_RTIT_CTL" must be 0',
    (F.ENTRY_CONTROLS, EntryInput.TRACING),
    lambda s, c: not s[F.ENTRY_CONTROLS] & Entry.load_rtit_ctl or not s[EntryInput.TRACING],
    "clear IA32_RTIT_CTL.TraceEn before VM entry",
)

RULES = (*EXECUTION.rules, *EXIT.rules, *ENTRY.rules)
"""All checks on VMX controls, in the manual's order."""
