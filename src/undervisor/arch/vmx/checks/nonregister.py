"""Checks on guest non-register state and PDPTEs: a broken one gives a VM exit with reason 33.

SDM, chapter "VM Entries", sections "Checks on Guest Non-Register State" and "Checks on Guest
Page-Directory-Pointer-Table Entries".
"""

from __future__ import annotations

from undervisor.arch.rules import Outcome
from undervisor.arch.vmx.capabilities import VmxCapabilities, VmxMisc
from undervisor.arch.vmx.checks.declare import SECONDARY, Section, State, secondary
from undervisor.arch.vmx.checks.inputs import ALL_ONES, EntryInput
from undervisor.arch.vmx.controls import ActivityState, InterruptionType
from undervisor.arch.vmx.controls import EntryControls as Entry
from undervisor.arch.vmx.controls import EntryInterruptionInformation as Info
from undervisor.arch.vmx.controls import InterruptibilityState as Blocking
from undervisor.arch.vmx.controls import PinBasedControls as Pin
from undervisor.arch.vmx.controls import SecondaryControls as Secondary
from undervisor.arch.vmx.exits import EntryFailureQualification as Qualification
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.msr import DebugCtl
from undervisor.arch.x86.registers import Cr0, Cr4, Rflags

ACTIVITY_RULES = Section(
    "vmx.guest.activity", "Checks on Guest Non-Register State", Outcome.EXIT_GUEST_STATE
)
BLOCKING_RULES = Section(
    "vmx.guest.interruptibility", "Checks on Guest Non-Register State", Outcome.EXIT_GUEST_STATE
)
PENDING_RULES = Section(
    "vmx.guest.pending-debug", "Checks on Guest Non-Register State", Outcome.EXIT_GUEST_STATE
)
LINK_RULES = Section(
    "vmx.guest.link", "Checks on Guest Non-Register State", Outcome.EXIT_GUEST_STATE
)
PDPTE_RULES = Section(
    "vmx.guest",
    "Checks on Guest Page-Directory-Pointer-Table Entries",
    Outcome.EXIT_GUEST_STATE,
)

ACTIVITY = F.GUEST_ACTIVITY_STATE
BLOCKED = F.GUEST_INTERRUPTIBILITY_STATE
INFO = F.ENTRY_INTERRUPTION_INFORMATION
PENDING = F.GUEST_PENDING_DEBUG_EXCEPTIONS
LINK = F.VMCS_LINK_POINTER
IN_SMM, CURRENT = EntryInput.IN_SMM, EntryInput.CURRENT_VMCS
STI, MOV_SS = Blocking.blocking_by_sti, Blocking.blocking_by_mov_ss
RFLAGS_TF, RFLAGS_IF = Rflags.tf, Rflags.if_
DEBUGCTL_BTF = DebugCtl.btf
PENDING_BS, PENDING_RTM, PENDING_ENABLED = 1 << 14, 1 << 16, 1 << 12
BUS_LOCK = 1 << 11
KIND = Info.valid | Info.type
NMI = Info.valid | InterruptionType.NMI << 8
EXTERNAL = Info.valid | InterruptionType.EXTERNAL_INTERRUPT << 8
EXCEPTION = Info.valid | InterruptionType.HARDWARE_EXCEPTION << 8
OTHER = Info.valid | InterruptionType.OTHER_EVENT << 8
DEBUG, MACHINE_CHECK = 1, 18

# --- Activity state -------------------------------------------------------------------------------

SUPPORT_BITS: dict[int, int] = {
    ActivityState.HLT: VmxMisc.activity_hlt,
    ActivityState.SHUTDOWN: VmxMisc.activity_shutdown,
    ActivityState.WAIT_FOR_SIPI: VmxMisc.activity_wait_for_sipi,
}
ACTIVITY_RULES.rule(
    "range",
    "The activity state must be 0 (active), 1 (HLT), 2 (shutdown) or 3 (wait-for-SIPI)",
    (ACTIVITY,),
    lambda s, c: s[ACTIVITY] <= ActivityState.WAIT_FOR_SIPI,
    "set it to 0",
)
ACTIVITY_RULES.rule(
    "supported",
    "The activity state must be one that the processor supports",
    (ACTIVITY,),
    lambda s, c: (
        not s[ACTIVITY] or s[ACTIVITY] not in SUPPORT_BITS or c.misc & SUPPORT_BITS[s[ACTIVITY]]
    ),
    "set it to 0",
    assumes="IA32_VMX_MISC[8:6]",
)
ACTIVITY_RULES.rule(
    "hlt-dpl",
    "The activity state must not be HLT unless the DPL of SS is 0",
    (ACTIVITY, F.GUEST_SS_ACCESS_RIGHTS),
    lambda s, c: s[ACTIVITY] != ActivityState.HLT or not s[F.GUEST_SS_ACCESS_RIGHTS] & 0x60,
    "set the activity state to active: only CPL 0 can execute HLT",
)
ACTIVITY_RULES.rule(
    "blocking",
    "The activity state must be active if events are blocked by STI or by MOV SS",
    (ACTIVITY, BLOCKED),
    lambda s, c: not s[ACTIVITY] or not s[BLOCKED] & (STI | MOV_SS),
    "clear bits 1:0 of the interruptibility state when the guest halts",
)


def _hlt_event(s: State, c: VmxCapabilities) -> bool:
    info = s[INFO]
    if s[ACTIVITY] != ActivityState.HLT or not info & Info.valid:
        return True
    kind, vector = info & KIND, info & 0xFF
    if kind == EXCEPTION:
        return vector in (DEBUG, MACHINE_CHECK)
    return kind in (EXTERNAL, NMI) or (kind == OTHER and vector == 0)


def _shutdown_event(s: State, c: VmxCapabilities) -> bool:
    info = s[INFO]
    if s[ACTIVITY] != ActivityState.SHUTDOWN or not info & Info.valid:
        return True
    return info & KIND == NMI or (info & KIND == EXCEPTION and info & 0xFF == MACHINE_CHECK)


ACTIVITY_RULES.rule(
    "hlt-event",
    "In activity state HLT, only an external interrupt, an NMI, #DB, #MC or a pending MTF VM exit "
    "may be injected",
    (ACTIVITY, INFO),
    _hlt_event,
    "set the activity state to active when another event is injected",
)
ACTIVITY_RULES.rule(
    "shutdown-event",
    "In activity state shutdown, only an NMI or #MC may be injected",
    (ACTIVITY, INFO),
    _shutdown_event,
    "set the activity state to active when another event is injected",
)
ACTIVITY_RULES.rule(
    "wait-for-sipi-event",
    "In activity state wait-for-SIPI, no event may be injected",
    (ACTIVITY, INFO),
    lambda s, c: s[ACTIVITY] != ActivityState.WAIT_FOR_SIPI or not s[INFO] & Info.valid,
    "clear the valid bit of the VM-entry interruption information",
)
ACTIVITY_RULES.rule(
    "smm",
    'The activity state must not be wait-for-SIPI if "entry to SMM" is 1',
    (ACTIVITY, F.ENTRY_CONTROLS),
    lambda s, c: (
        s[ACTIVITY] != ActivityState.WAIT_FOR_SIPI or not s[F.ENTRY_CONTROLS] & Entry.entry_to_smm
    ),
    "set the activity state to active",
)

# --- Interruptibility state -----------------------------------------------------------------------

BLOCKING_RULES.rule(
    "reserved",
    "Bits 31:5 of the interruptibility state must be 0",
    (BLOCKED,),
    lambda s, c: not s[BLOCKED] & 0xFFFF_FFE0,
    "clear them",
)
BLOCKING_RULES.rule(
    "sti-and-mov-ss",
    "Events must not be blocked both by STI and by MOV SS",
    (BLOCKED,),
    lambda s, c: s[BLOCKED] & (STI | MOV_SS) != STI | MOV_SS,
    "clear one of bits 1:0",
)
BLOCKING_RULES.rule(
    "sti-if",
    "Events must not be blocked by STI if RFLAGS.IF is 0",
    (BLOCKED, F.GUEST_RFLAGS),
    lambda s, c: not s[BLOCKED] & STI or s[F.GUEST_RFLAGS] & RFLAGS_IF,
    "clear bit 0 of the interruptibility state",
)
BLOCKING_RULES.rule(
    "external-sti",
    "Events must not be blocked by STI if an external interrupt is injected",
    (BLOCKED, INFO),
    lambda s, c: not s[BLOCKED] & STI or s[INFO] & KIND != EXTERNAL,
    'wait with "interrupt-window exiting" until the guest can take the interrupt',
)
BLOCKING_RULES.rule(
    "external-mov-ss",
    "Events must not be blocked by MOV SS if an external interrupt is injected",
    (BLOCKED, INFO),
    lambda s, c: not s[BLOCKED] & MOV_SS or s[INFO] & KIND != EXTERNAL,
    'wait with "interrupt-window exiting" until the guest can take the interrupt',
)
BLOCKING_RULES.rule(
    "nmi-mov-ss",
    "Events must not be blocked by MOV SS if an NMI is injected",
    (BLOCKED, INFO),
    lambda s, c: not s[BLOCKED] & MOV_SS or s[INFO] & KIND != NMI,
    'wait with "NMI-window exiting" until the guest can take the NMI',
)
BLOCKING_RULES.rule(
    "smi",
    "Events must not be blocked by SMI if the processor is not in SMM",
    (BLOCKED, IN_SMM),
    lambda s, c: not s[BLOCKED] & Blocking.blocking_by_smi or s[IN_SMM],
    "clear bit 2",
)
BLOCKING_RULES.rule(
    "smm",
    'Events must be blocked by SMI if "entry to SMM" is 1',
    (BLOCKED, F.ENTRY_CONTROLS),
    lambda s, c: (
        not s[F.ENTRY_CONTROLS] & Entry.entry_to_smm or s[BLOCKED] & Blocking.blocking_by_smi
    ),
    "set bit 2",
)
BLOCKING_RULES.rule(
    "nmi-sti",
    "On this processor, events must not be blocked by STI if an NMI is injected",
    (BLOCKED, INFO),
    lambda s, c: (
        not s[BLOCKED] & STI or s[INFO] & KIND != NMI or not c.processor.nmi_needs_no_sti_blocking
    ),
    'clear bit 0, or wait with "NMI-window exiting"; other processors allow this',
    assumes="that the processor is one that checks this, as the manual allows",
    qualification=Qualification.NMI_INTO_BLOCKING_BY_STI,
)
BLOCKING_RULES.rule(
    "virtual-nmi",
    'With "virtual NMIs", NMIs must not be blocked if an NMI is injected',
    (BLOCKED, INFO, F.PIN_BASED_CONTROLS),
    lambda s, c: (
        not s[BLOCKED] & Blocking.blocking_by_nmi
        or s[INFO] & KIND != NMI
        or not s[F.PIN_BASED_CONTROLS] & Pin.virtual_nmis
    ),
    'clear bit 3, or wait with "NMI-window exiting" until the guest executes IRET',
)
ENCLAVE = Blocking.enclave_interruption
BLOCKING_RULES.rule(
    "enclave-mov-ss",
    "With bit 4 (enclave interruption) set, events must not be blocked by MOV SS",
    (BLOCKED,),
    lambda s, c: s[BLOCKED] & (ENCLAVE | MOV_SS) != ENCLAVE | MOV_SS,
    "clear bit 1 or bit 4",
)
BLOCKING_RULES.rule(
    "enclave-sgx",
    "Bit 4 (enclave interruption) may be 1 only on a processor that supports SGX",
    (BLOCKED,),
    lambda s, c: not s[BLOCKED] & ENCLAVE or c.processor.sgx,
    "clear bit 4",
    assumes="CPUID.07H:EBX.SGX",
)

# --- Pending debug exceptions ---------------------------------------------------------------------

PENDING_RESERVED = ALL_ONES & ~0x1_580F
PENDING_RULES.rule(
    "reserved",
    "Bits 10:4, 13, 15 and 63:17 of the pending debug exceptions must be 0, and bit 11 unless the "
    "processor supports OS bus-lock detection",
    (PENDING,),
    lambda s, c: (
        not s[PENDING] & PENDING_RESERVED
        and (not s[PENDING] & BUS_LOCK or c.processor.bus_lock_detection)
    ),
    "clear them; the layout is that of DR6 but bits 11:4 are not 1 when clear",
    assumes="CPUID.07H:ECX.BUS_LOCK_DETECT",
)


def _single_step_pending(s: State) -> bool:
    """Whether the state says that a single step would be pending, and must say so in BS."""
    return bool(s[F.GUEST_RFLAGS] & RFLAGS_TF and not s[F.GUEST_DEBUGCTL] & DEBUGCTL_BTF)


def _step_applies(s: State) -> bool:
    return bool(s[BLOCKED] & (STI | MOV_SS)) or s[ACTIVITY] == ActivityState.HLT


STEP_READS = (PENDING, F.GUEST_RFLAGS, F.GUEST_DEBUGCTL, BLOCKED, ACTIVITY)
PENDING_RULES.rule(
    "bs-missing",
    "If events are blocked by STI or MOV SS or the activity state is HLT: BS (bit 14) must be 1 "
    "if RFLAGS.TF is 1 and IA32_DEBUGCTL.BTF is 0",
    STEP_READS,
    lambda s, c: s[PENDING] & PENDING_BS or not _step_applies(s) or not _single_step_pending(s),
    "set bit 14 while the guest single-steps",
)
PENDING_RULES.rule(
    "bs-excess",
    "If events are blocked by STI or MOV SS or the activity state is HLT: BS (bit 14) must be 0 "
    "if RFLAGS.TF is 0 or IA32_DEBUGCTL.BTF is 1",
    STEP_READS,
    lambda s, c: not s[PENDING] & PENDING_BS or not _step_applies(s) or _single_step_pending(s),
    "clear bit 14",
)
PENDING_RULES.rule(
    "rtm-others",
    "If bit 16 (RTM) is 1, bits 11:0, 15:13 and 63:17 must be 0 and bit 12 must be 1",
    (PENDING,),
    lambda s, c: not s[PENDING] & PENDING_RTM or s[PENDING] == PENDING_RTM | PENDING_ENABLED,
    "set the field to 11000H, or clear bit 16",
)
PENDING_RULES.rule(
    "rtm-supported",
    "Bit 16 (RTM) may be 1 only on a processor that supports RTM",
    (PENDING,),
    lambda s, c: not s[PENDING] & PENDING_RTM or c.processor.rtm,
    "clear bit 16",
    assumes="CPUID.07H:EBX.RTM",
)
PENDING_RULES.rule(
    "rtm-mov-ss",
    "If bit 16 (RTM) is 1, events must not be blocked by MOV SS",
    (PENDING, BLOCKED),
    lambda s, c: not s[PENDING] & PENDING_RTM or not s[BLOCKED] & MOV_SS,
    "clear bit 16, or bit 1 of the interruptibility state",
)

# --- VMCS link pointer ----------------------------------------------------------------------------

SHADOWING = secondary(Secondary.vmcs_shadowing)
LINK_QUALIFICATION = Qualification.VMCS_LINK_POINTER
SHADOW_INDICATOR = 1 << 31
LINKED = EntryInput.LINKED_VMCS
UNLESS = "Unless it is FFFFFFFF_FFFFFFFFH, "


def _readable(s: State, c: VmxCapabilities) -> bool:
    """Whether the link pointer names memory: else the address rules already say what is wrong."""
    link = s[LINK]
    return link != ALL_ONES and not link & 0xFFF and not link & c.beyond_width


LINK_RULES.rule(
    "aligned",
    f"{UNLESS}bits 11:0 of the VMCS link pointer must be 0",
    (LINK,),
    lambda s, c: s[LINK] == ALL_ONES or not s[LINK] & 0xFFF,
    "set it to all ones if VMCS shadowing is not used; both halves if it is written as two",
    qualification=LINK_QUALIFICATION,
)
LINK_RULES.rule(
    "width",
    f"{UNLESS}the VMCS link pointer must not set bits beyond the physical-address width",
    (LINK,),
    lambda s, c: s[LINK] == ALL_ONES or not s[LINK] & c.beyond_width,
    "set it to all ones (64 bits of them) if VMCS shadowing is not used",
    assumes="the processor's physical-address width",
    qualification=LINK_QUALIFICATION,
)
LINK_RULES.rule(
    "revision",
    f"{UNLESS}bits 30:0 of the region at the VMCS link pointer must be the VMCS revision "
    "identifier",
    (LINK, LINKED),
    lambda s, c: not _readable(s, c) or s[LINKED] & ~SHADOW_INDICATOR == c.basic.revision,
    "write IA32_VMX_BASIC[30:0] to the first 4 bytes of the shadow VMCS, or set the pointer to "
    "all ones",
    assumes="IA32_VMX_BASIC[30:0]",
    qualification=LINK_QUALIFICATION,
)
LINK_RULES.rule(
    "shadow",
    f'{UNLESS}bit 31 of the region at the VMCS link pointer must equal "VMCS shadowing"',
    (LINK, LINKED, *SECONDARY),
    lambda s, c: not _readable(s, c) or bool(s[LINKED] & SHADOW_INDICATOR) == bool(SHADOWING(s)),
    "set bit 31 of the first 4 bytes of a shadow VMCS, or set the pointer to all ones",
    qualification=LINK_QUALIFICATION,
)
LINK_RULES.rule(
    "current",
    f'{UNLESS}the VMCS link pointer must not be the current VMCS (outside SMM, or if "entry to '
    'SMM" is 1)',
    (LINK, CURRENT, F.ENTRY_CONTROLS, IN_SMM),
    lambda s, c: (
        s[LINK] == ALL_ONES
        or s[LINK] != s[CURRENT]
        or (s[IN_SMM] and not s[F.ENTRY_CONTROLS] & Entry.entry_to_smm)
    ),
    "give the shadow VMCS a region of its own",
    qualification=LINK_QUALIFICATION,
)
LINK_RULES.rule(
    "executive",
    f'{UNLESS}in SMM and if "entry to SMM" is 0, the VMCS link pointer must not be the '
    "executive-VMCS pointer",
    (LINK, F.EXECUTIVE_VMCS_POINTER, F.ENTRY_CONTROLS, IN_SMM),
    lambda s, c: (
        s[LINK] == ALL_ONES
        or s[LINK] != s[F.EXECUTIVE_VMCS_POINTER]
        or s[F.ENTRY_CONTROLS] & Entry.entry_to_smm
        or not s[IN_SMM]
    ),
    "give the shadow VMCS a region of its own",
    qualification=LINK_QUALIFICATION,
)

# --- PDPTEs ---------------------------------------------------------------------------------------

CR0_PG, CR4_PAE = Cr0.pg, Cr4.pae
PDPTE_PRESENT = 1
PDPTE_RESERVED = 0x1E6
EPT = secondary(Secondary.enable_ept)
PAE_READS = (F.GUEST_CR0, F.GUEST_CR4, F.ENTRY_CONTROLS, *SECONDARY)


def pae_paging(s: State) -> bool:
    """Whether the guest will use PAE paging."""
    return bool(
        s[F.GUEST_CR4] & CR4_PAE
        and s[F.GUEST_CR0] & CR0_PG
        and not s[F.ENTRY_CONTROLS] & Entry.ia32e_mode_guest
    )


def pdpte_rule(number: int, field: int, *, with_ept: bool) -> None:
    """A present PDPTE has no reserved bit set; with EPT it comes from the VMCS."""
    source = "the VMCS field" if with_ept else "the entry in memory at CR3"
    PDPTE_RULES.rule(
        f"pdpte{number}.{'ept' if with_ept else 'memory'}",
        f"With PAE paging {'and' if with_ept else 'without'} EPT, if {source} PDPTE{number} is "
        "present, its bits 2:1, 8:5 and those beyond the physical-address width must be 0",
        (field, *PAE_READS),
        lambda s, c: (
            not pae_paging(s)
            or bool(EPT(s)) is not with_ept
            or not s[field] & PDPTE_PRESENT
            or not s[field] & (PDPTE_RESERVED | c.beyond_maxphyaddr)
        ),
        "copy the guest's PDPTEs to the VMCS, or clear bit 0 of those it does not use",
        assumes="the processor's physical-address width",
        qualification=Qualification.PDPTE_LOADING,
    )


for _number in range(4):
    pdpte_rule(_number, F[f"GUEST_PDPTE{_number}"], with_ept=True)
for _number in range(4):
    pdpte_rule(_number, EntryInput[f"MEMORY_PDPTE{_number}"], with_ept=False)

RULES = (
    *ACTIVITY_RULES.rules,
    *BLOCKING_RULES.rules,
    *PENDING_RULES.rules,
    *LINK_RULES.rules,
    *PDPTE_RULES.rules,
)
"""All checks on guest non-register state and PDPTEs, in the manual's order."""
