"""Checks on guest registers: a broken one gives a VM exit with reason 33.

SDM, chapter "VM Entries", section "Checks on the Guest State Area", in the manual's order; the
segment registers are in `segments`, the non-register state in `nonregister`.
"""

from __future__ import annotations

from undervisor.arch.rules import Outcome
from undervisor.arch.vmx.capabilities import VmxCapabilities
from undervisor.arch.vmx.checks.declare import SECONDARY, Condition, Section, State, secondary
from undervisor.arch.vmx.checks.state import (
    CR0_NEVER_CHECKED,
    HIGH_HALF,
    Side,
    cet_rules,
    cr3_rule,
    cr_rules,
    efer_reserved,
    fred_rules,
    pat_rule,
    pkrs_rule,
    sysenter_rules,
)
from undervisor.arch.vmx.controls import AccessRights, InterruptionType
from undervisor.arch.vmx.controls import EntryControls as Entry
from undervisor.arch.vmx.controls import EntryInterruptionInformation as Info
from undervisor.arch.vmx.controls import SecondaryControls as Secondary
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.registers import Cr0, Cr4, Efer, Rflags

REGISTERS = Section(
    "vmx.guest",
    "Checks on Guest Control Registers, Debug Registers, and MSRs",
    Outcome.EXIT_GUEST_STATE,
)
DESCRIPTOR_TABLES = Section(
    "vmx.guest", "Checks on Guest Descriptor-Table Registers", Outcome.EXIT_GUEST_STATE
)
RIP_RFLAGS = Section("vmx.guest", "Checks on Guest RIP, RFLAGS, and SSP", Outcome.EXIT_GUEST_STATE)

GUEST = Side(REGISTERS, "GUEST")
ENTRY = (F.ENTRY_CONTROLS,)
IA32E = Entry.ia32e_mode_guest
IA32E_GUEST = 'the "IA-32e mode guest" VM-entry control'
CR0_PE, CR0_PG = Cr0.pe, Cr0.pg
CR4_PAE, CR4_PCIDE, CR4_FRED = Cr4.pae, Cr4.pcide, Cr4.fred
EFER_LME, EFER_LMA = Efer.lme, Efer.lma
RFLAGS_IF, RFLAGS_VM = Rflags.if_, Rflags.vm
RFLAGS_RESERVED = Rflags.reserved()
CS_L = AccessRights.long_mode
UNRESTRICTED = secondary(Secondary.unrestricted_guest)


def entry(bit: int) -> Condition:
    """Whether a VM-entry control is 1."""
    field = F.ENTRY_CONTROLS
    return lambda s: s[field] & bit


def loads(what: str) -> str:
    """The premise of the rules for what a VM-entry control loads."""
    return f'the "load {what}" VM-entry control is 1'


# --- Checks on Guest Control Registers, Debug Registers, and MSRs ---------------------------------


def _cr0_forced(s: State, c: VmxCapabilities) -> bool:
    """No forced bit is 0; PE and PG may be for an unrestricted guest."""
    missing = c.cr0_fixed0 & ~s[F.GUEST_CR0]
    return not missing or (not missing & ~(CR0_PE | CR0_PG) and bool(UNRESTRICTED(s)))


REGISTERS.rule(
    "cr0.must-be-one",
    "Bits that VMX operation requires to be 1 must be 1 in GUEST_CR0; PE and PG may be 0 if "
    '"unrestricted guest" is 1',
    (F.GUEST_CR0, *SECONDARY),
    _cr0_forced,
    'OR the value with IA32_VMX_CR0_FIXED0, or set "unrestricted guest" for a guest without '
    "paging; the guest sees CR0 through the read shadow",
    assumes="IA32_VMX_CR0_FIXED0",
)
REGISTERS.rule(
    "cr0.may-be-one",
    "Bits that VMX operation does not support must be 0 in GUEST_CR0 (CD and NW are not checked)",
    (F.GUEST_CR0,),
    lambda s, c: not s[F.GUEST_CR0] & ~(c.cr0_fixed1 | CR0_NEVER_CHECKED),
    "AND the value with IA32_VMX_CR0_FIXED1",
    assumes="IA32_VMX_CR0_FIXED1",
)
REGISTERS.rule(
    "cr0.pg-without-pe",
    "If CR0.PG is 1 in GUEST_CR0, CR0.PE must be 1",
    (F.GUEST_CR0,),
    lambda s, c: s[F.GUEST_CR0] & (CR0_PG | CR0_PE) != CR0_PG,
    "set bit 0",
)
cr_rules(GUEST)
GUEST.supported(
    "debugctl",
    "DEBUGCTL",
    lambda p: p.debugctl,
    entry(Entry.load_debug_controls),
    ENTRY,
    loads("debug controls"),
)
REGISTERS.rule(
    "ia32e.pg",
    f"If {IA32E_GUEST} is 1, CR0.PG must be 1 in GUEST_CR0",
    (F.GUEST_CR0, *ENTRY),
    lambda s, c: s[F.GUEST_CR0] & CR0_PG or not s[F.ENTRY_CONTROLS] & IA32E,
    'clear "IA-32e mode guest" until the guest enables paging',
)
REGISTERS.rule(
    "ia32e.pae",
    f"If {IA32E_GUEST} is 1, CR4.PAE must be 1 in GUEST_CR4",
    (F.GUEST_CR4, *ENTRY),
    lambda s, c: s[F.GUEST_CR4] & CR4_PAE or not s[F.ENTRY_CONTROLS] & IA32E,
    "set bit 5",
)
REGISTERS.rule(
    "pcide",
    f"If {IA32E_GUEST} is 0, CR4.PCIDE must be 0 in GUEST_CR4",
    (F.GUEST_CR4, *ENTRY),
    lambda s, c: not s[F.GUEST_CR4] & CR4_PCIDE or s[F.ENTRY_CONTROLS] & IA32E,
    "clear bit 17",
)
REGISTERS.rule(
    "cr4.fred",
    f"If {IA32E_GUEST} is 0, CR4.FRED must be 0 in GUEST_CR4",
    (F.GUEST_CR4, *ENTRY),
    lambda s, c: not s[F.GUEST_CR4] & CR4_FRED or s[F.ENTRY_CONTROLS] & IA32E,
    "clear bit 32: FRED is for 64-bit operating systems",
)
cr3_rule(GUEST)
GUEST.clear(
    "dr7",
    "DR7",
    HIGH_HALF,
    "bits 63:32",
    entry(Entry.load_debug_controls),
    ENTRY,
    loads("debug controls"),
)
sysenter_rules(GUEST)
GUEST.supported(
    "perf-global-ctrl",
    "PERF_GLOBAL_CTRL",
    lambda p: p.perf_global_ctrl,
    entry(Entry.load_perf_global_ctrl),
    ENTRY,
    loads("IA32_PERF_GLOBAL_CTRL"),
)
pat_rule(GUEST, entry(Entry.load_pat), ENTRY, loads("IA32_PAT"))
LOAD_EFER = Entry.load_efer
GUEST.supported("efer.reserved", "EFER", efer_reserved, entry(LOAD_EFER), ENTRY, loads("IA32_EFER"))
REGISTERS.rule(
    "efer.lma",
    f"If {loads('IA32_EFER')}, LMA of GUEST_EFER must equal {IA32E_GUEST}",
    (F.GUEST_EFER, *ENTRY),
    lambda s, c: (
        not s[F.ENTRY_CONTROLS] & LOAD_EFER
        or bool(s[F.GUEST_EFER] & EFER_LMA) == bool(s[F.ENTRY_CONTROLS] & IA32E)
    ),
    "change EFER.LMA (bit 10) and the control together, when the guest changes CR0.PG with "
    "EFER.LME set",
)
REGISTERS.rule(
    "efer.lme",
    f"If {loads('IA32_EFER')} and CR0.PG is 1, LME of GUEST_EFER must equal LMA",
    (F.GUEST_EFER, F.GUEST_CR0, *ENTRY),
    lambda s, c: (
        not s[F.ENTRY_CONTROLS] & LOAD_EFER
        or not s[F.GUEST_CR0] & CR0_PG
        or s[F.GUEST_EFER] & (EFER_LMA | EFER_LME) in (0, EFER_LMA | EFER_LME)
    ),
    "set or clear both",
)
_BNDCFGS = entry(Entry.load_bndcfgs)
GUEST.clear(
    "bndcfgs.reserved", "BNDCFGS", 0xFFC, "bits 11:2", _BNDCFGS, ENTRY, loads("IA32_BNDCFGS")
)
GUEST.canonical(
    "bndcfgs.canonical",
    "BNDCFGS",
    condition=_BNDCFGS,
    reads=ENTRY,
    given=f"If {loads('IA32_BNDCFGS')}: ",
    keep=~0xFFF & (1 << 64) - 1,
)
GUEST.supported(
    "rtit-ctl",
    "RTIT_CTL",
    lambda p: p.rtit_ctl,
    entry(Entry.load_rtit_ctl),
    ENTRY,
    loads("IA32_RTIT_CTL"),
)
cet_rules(GUEST, entry(Entry.load_cet_state), ENTRY, loads("CET state"))
REGISTERS.rule(
    "s-cet.high",
    f"If {loads('CET state')}, bits 63:32 of GUEST_S_CET must be 0 if {IA32E_GUEST} is 0",
    (F.GUEST_S_CET, *ENTRY),
    lambda s, c: (
        not s[F.GUEST_S_CET] & HIGH_HALF
        or s[F.ENTRY_CONTROLS] & IA32E
        or not s[F.ENTRY_CONTROLS] & Entry.load_cet_state
    ),
    "give a legacy code page bitmap below 4 GBytes",
)
pkrs_rule(GUEST, entry(Entry.load_pkrs), ENTRY, loads("PKRS"))
GUEST.supported(
    "lbr-ctl",
    "LBR_CTL",
    lambda p: p.lbr_ctl,
    entry(Entry.load_lbr_ctl),
    ENTRY,
    loads("guest IA32_LBR_CTL"),
)
GUEST.clear("uinv", "UINV", 0xFF00, "bits 15:8", entry(Entry.load_uinv), ENTRY, loads("UINV"))
fred_rules(GUEST, entry(Entry.load_fred), ENTRY, loads("FRED"))
GUEST.supported(
    "spec-ctrl",
    "SPEC_CTRL",
    lambda p: p.spec_ctrl,
    entry(Entry.load_spec_ctrl),
    ENTRY,
    loads("IA32_SPEC_CTRL"),
)

# --- Checks on Guest Descriptor-Table Registers ---------------------------------------------------

for _register in ("GDTR", "IDTR"):
    GUEST.canonical(f"{_register.lower()}.base", f"{_register}_BASE", section=DESCRIPTOR_TABLES)
for _register in ("GDTR", "IDTR"):
    _limit = F[f"GUEST_{_register}_LIMIT"]
    DESCRIPTOR_TABLES.rule(
        f"{_register.lower()}.limit",
        f"Bits 31:16 of {_limit.name} must be 0",
        (_limit,),
        lambda s, c, limit=_limit: not s[limit] & 0xFFFF_0000,  # type: ignore[misc]
        "give a limit of 16 bits",
    )

# --- Checks on Guest RIP, RFLAGS, and SSP ---------------------------------------------------------

CODE_64 = (F.ENTRY_CONTROLS, F.GUEST_CS_ACCESS_RIGHTS)


def in_64_bit_mode(s: State) -> bool:
    """Whether the guest will be in 64-bit mode."""
    return bool(s[F.ENTRY_CONTROLS] & IA32E and s[F.GUEST_CS_ACCESS_RIGHTS] & CS_L)


RIP_RFLAGS.rule(
    "rip.high",
    f"Bits 63:32 of GUEST_RIP must be 0 if {IA32E_GUEST} is 0 or CS.L is 0",
    (F.GUEST_RIP, *CODE_64),
    lambda s, c: not s[F.GUEST_RIP] & HIGH_HALF or in_64_bit_mode(s),
    "give an address below 4 GBytes, or set CS.L (bit 13 of the access rights) for 64-bit code",
)
RIP_RFLAGS.rule(
    "rip.canonical",
    f"If {IA32E_GUEST} is 1 and CS.L is 1, the bits of GUEST_RIP above the linear-address width "
    "must all be equal",
    (F.GUEST_RIP, *CODE_64),
    lambda s, c: (
        s[F.GUEST_RIP] < 2 * c.canonical_below
        or s[F.GUEST_RIP] >= (1 << 64) - 2 * c.canonical_below
        or not in_64_bit_mode(s)
    ),
    "give a canonical address",
    assumes="the processor's linear-address width",
)
RIP_RFLAGS.rule(
    "rflags.reserved",
    "Bits 63:22, 15, 5 and 3 of GUEST_RFLAGS must be 0",
    (F.GUEST_RFLAGS,),
    lambda s, c: not s[F.GUEST_RFLAGS] & RFLAGS_RESERVED,
    "clear them",
)
RIP_RFLAGS.rule(
    "rflags.bit-1",
    "Bit 1 of GUEST_RFLAGS must be 1",
    (F.GUEST_RFLAGS,),
    lambda s, c: s[F.GUEST_RFLAGS] & 2,
    "set bit 1; the smallest valid value is 2",
)
RIP_RFLAGS.rule(
    "rflags.vm-ia32e",
    f"RFLAGS.VM must be 0 if {IA32E_GUEST} is 1",
    (F.GUEST_RFLAGS, *ENTRY),
    lambda s, c: not s[F.GUEST_RFLAGS] & RFLAGS_VM or not s[F.ENTRY_CONTROLS] & IA32E,
    "clear bit 17: there is no virtual-8086 mode in IA-32e mode",
)
RIP_RFLAGS.rule(
    "rflags.vm-real",
    "RFLAGS.VM must be 0 if CR0.PE is 0",
    (F.GUEST_RFLAGS, F.GUEST_CR0),
    lambda s, c: not s[F.GUEST_RFLAGS] & RFLAGS_VM or s[F.GUEST_CR0] & CR0_PE,
    "clear bit 17: real mode of an unrestricted guest does not use it",
)
_EXTERNAL = Info.valid | InterruptionType.EXTERNAL_INTERRUPT << 8
RIP_RFLAGS.rule(
    "rflags.if",
    "RFLAGS.IF must be 1 if an external interrupt is injected",
    (F.GUEST_RFLAGS, F.ENTRY_INTERRUPTION_INFORMATION),
    lambda s, c: (
        s[F.GUEST_RFLAGS] & RFLAGS_IF
        or s[F.ENTRY_INTERRUPTION_INFORMATION] & (Info.valid | Info.type) != _EXTERNAL
    ),
    'wait for the guest to set IF, with "interrupt-window exiting"',
)
_CET = entry(Entry.load_cet_state)
GUEST_SSP = F.GUEST_SSP
RIP_RFLAGS.rule(
    "ssp.aligned",
    f"If {loads('CET state')}, bits 1:0 of GUEST_SSP must be 0",
    (GUEST_SSP, *ENTRY),
    lambda s, c: not s[GUEST_SSP] & 3 or not _CET(s),
    "align the shadow-stack pointer to 4 bytes",
)
RIP_RFLAGS.rule(
    "ssp.high",
    f"If {loads('CET state')}, bits 63:32 of GUEST_SSP must be 0 if {IA32E_GUEST} is 0 or CS.L "
    "is 0",
    (GUEST_SSP, *CODE_64),
    lambda s, c: not s[GUEST_SSP] & HIGH_HALF or in_64_bit_mode(s) or not _CET(s),
    "give an address below 4 GBytes",
)
RIP_RFLAGS.rule(
    "ssp.canonical",
    f"If {loads('CET state')}, {IA32E_GUEST} is 1 and CS.L is 1, the bits of GUEST_SSP above the "
    "linear-address width must all be equal",
    (GUEST_SSP, *CODE_64),
    lambda s, c: (
        s[GUEST_SSP] < 2 * c.canonical_below
        or s[GUEST_SSP] >= (1 << 64) - 2 * c.canonical_below
        or not in_64_bit_mode(s)
        or not _CET(s)
    ),
    "give a canonical address",
    assumes="the processor's linear-address width",
)
