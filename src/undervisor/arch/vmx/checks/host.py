"""Checks on the host-state area: a broken one gives VMfailValid with error 8.

SDM, chapter "VM Entries", section "Checks on Host-State Area", in the manual's order.
"""

from __future__ import annotations

from undervisor.arch.rules import Outcome
from undervisor.arch.vmx.checks.declare import EXIT_2, Condition, Section, State, exit_2
from undervisor.arch.vmx.checks.inputs import EntryInput
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
from undervisor.arch.vmx.controls import EntryControls as Entry
from undervisor.arch.vmx.controls import ExitControls as Exit
from undervisor.arch.vmx.controls import SecondaryExitControls as Exit2
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.registers import Cr4, Efer

REGISTERS = Section(
    "vmx.host", "Checks on Host Control Registers, MSRs, and SSP", Outcome.FAIL_HOST
)
SEGMENTS = Section(
    "vmx.host", "Checks on Host Segment and Descriptor-Table Registers", Outcome.FAIL_HOST
)
ADDRESS_SPACE = Section(
    "vmx.host.address-space", "Checks Related to Address-Space Size", Outcome.FAIL_HOST
)

HOST = Side(REGISTERS, "HOST")
EXIT = (F.EXIT_CONTROLS,)
HOST_64, CET = Exit.host_address_space_size, Exit.load_cet_state
EFER_LME, EFER_LMA = Efer.lme, Efer.lma
CR4_PAE, CR4_PCIDE = Cr4.pae, Cr4.pcide


def exits(bit: int) -> Condition:
    """Whether a VM-exit control is 1."""
    return lambda s: s[F.EXIT_CONTROLS] & bit


# --- Checks on Host Control Registers, MSRs, and SSP ----------------------------------------------

REGISTERS.rule(
    "cr0.must-be-one",
    "Bits that VMX operation requires to be 1 must be 1 in HOST_CR0",
    (F.HOST_CR0,),
    lambda s, c: not c.cr0_fixed0 & ~s[F.HOST_CR0],
    "OR the value with IA32_VMX_CR0_FIXED0: PE, NE and PG",
    assumes="IA32_VMX_CR0_FIXED0",
)
REGISTERS.rule(
    "cr0.may-be-one",
    "Bits that VMX operation does not support must be 0 in HOST_CR0 (CD and NW are not checked)",
    (F.HOST_CR0,),
    lambda s, c: not s[F.HOST_CR0] & ~(c.cr0_fixed1 | CR0_NEVER_CHECKED),
    "AND the value with IA32_VMX_CR0_FIXED1",
    assumes="IA32_VMX_CR0_FIXED1",
)
cr_rules(HOST)
cr3_rule(HOST)
sysenter_rules(HOST)
HOST.supported(
    "perf-global-ctrl",
    "PERF_GLOBAL_CTRL",
    lambda p: p.perf_global_ctrl,
    exits(Exit.load_perf_global_ctrl),
    EXIT,
    'the "load IA32_PERF_GLOBAL_CTRL" VM-exit control is 1',
)
pat_rule(HOST, exits(Exit.load_pat), EXIT, 'the "load IA32_PAT" VM-exit control is 1')
_LOAD_EFER = 'the "load IA32_EFER" VM-exit control is 1'
HOST.supported("efer.reserved", "EFER", efer_reserved, exits(Exit.load_efer), EXIT, _LOAD_EFER)
for _name, _bit in (("LMA", EFER_LMA), ("LME", EFER_LME)):

    def _follows_host_size(s: State, c: object, bit: int = _bit) -> bool:
        controls = s[F.EXIT_CONTROLS]
        if not controls & Exit.load_efer:
            return True
        return bool(s[F.HOST_EFER] & bit) == bool(controls & HOST_64)

    REGISTERS.rule(
        f"efer.{_name.lower()}",
        f'If {_LOAD_EFER}, {_name} of HOST_EFER must equal the "host address-space size" control',
        (F.HOST_EFER, *EXIT),
        _follows_host_size,
        f"set EFER.{_name} for a 64-bit host, clear it for a 32-bit one",
    )
_CET = 'the "load CET state" VM-exit control is 1'
cet_rules(HOST, exits(Exit.load_cet_state), EXIT, _CET)
HOST.clear("ssp.aligned", "SSP", 3, "bits 1:0", exits(Exit.load_cet_state), EXIT, _CET)
HOST.canonical(
    "ssp.canonical",
    "SSP",
    condition=exits(Exit.load_cet_state),
    reads=EXIT,
    given=f"If {_CET}: ",
)
pkrs_rule(HOST, exits(Exit.load_pkrs), EXIT, 'the "load PKRS" VM-exit control is 1')
fred_rules(HOST, exit_2(Exit2.load_fred), EXIT_2, 'the "load FRED" VM-exit control is 1')
HOST.supported(
    "spec-ctrl",
    "SPEC_CTRL",
    lambda p: p.spec_ctrl,
    exit_2(Exit2.load_spec_ctrl),
    EXIT_2,
    'the "load IA32_SPEC_CTRL" VM-exit control is 1',
)


# --- Checks on Host Segment and Descriptor-Table Registers ----------------------------------------


def selector_rules(register: str) -> None:
    """A host selector names a GDT entry at privilege level 0."""
    field = F[f"HOST_{register}_SELECTOR"]
    for name, bits, what in (("rpl", 3, "RPL (bits 1:0)"), ("ti", 4, "TI flag (bit 2)")):
        SEGMENTS.rule(
            f"{register.lower()}.{name}",
            f"The {what} of the host's {register} selector must be 0",
            (field,),
            lambda s, c, bits=bits: not s[field] & bits,  # type: ignore[misc]
            "AND the selector with FFF8H when the VMCS is written",
        )


for _register in ("CS", "SS", "DS", "ES", "FS", "GS", "TR"):
    selector_rules(_register)
SEGMENTS.rule(
    "cs.null",
    "The host's CS selector must not be 0000H",
    (F.HOST_CS_SELECTOR,),
    lambda s, c: s[F.HOST_CS_SELECTOR] != 0,
    "store the current CS",
)
SEGMENTS.rule(
    "tr.null",
    "The host's TR selector must not be 0000H",
    (F.HOST_TR_SELECTOR,),
    lambda s, c: s[F.HOST_TR_SELECTOR] != 0,
    "load TR with LTR first; loaders often leave it null",
)
SEGMENTS.rule(
    "ss.null",
    'If "host address-space size" is 0, the host\'s SS selector must not be 0000H',
    (F.HOST_SS_SELECTOR, *EXIT),
    lambda s, c: s[F.HOST_SS_SELECTOR] != 0 or s[F.EXIT_CONTROLS] & HOST_64,
    "store the current SS",
)
for _register in ("FS", "GS", "GDTR", "IDTR", "TR"):
    HOST.canonical(f"{_register.lower()}.base", f"{_register}_BASE", section=SEGMENTS)


# --- Checks Related to Address-Space Size ---------------------------------------------------------

LMA = EntryInput.LONG_MODE_ACTIVE
ADDRESS_SPACE.rule(
    "guest-outside-ia32e",
    'If the processor is outside IA-32e mode (IA32_EFER.LMA is 0), the "IA-32e mode guest" '
    "VM-entry control must be 0",
    (F.ENTRY_CONTROLS, LMA),
    lambda s, c: not s[F.ENTRY_CONTROLS] & Entry.ia32e_mode_guest or s[LMA],
    "enter 64-bit guests from a 64-bit host only",
)
ADDRESS_SPACE.rule(
    "host-outside-ia32e",
    'If the processor is outside IA-32e mode (IA32_EFER.LMA is 0), "host address-space size" '
    "must be 0",
    (F.EXIT_CONTROLS, LMA),
    lambda s, c: not s[F.EXIT_CONTROLS] & HOST_64 or s[LMA],
    'clear "host address-space size" in a 32-bit host',
)
ADDRESS_SPACE.rule(
    "host-in-ia32e",
    'If the processor is in IA-32e mode (IA32_EFER.LMA is 1), "host address-space size" must be 1',
    (F.EXIT_CONTROLS, LMA),
    lambda s, c: s[F.EXIT_CONTROLS] & HOST_64 or not s[LMA],
    'set "host address-space size" (bit 9 of the VM-exit controls)',
)
ADDRESS_SPACE.rule(
    "guest",
    'If "host address-space size" is 0, the "IA-32e mode guest" VM-entry control must be 0',
    (F.ENTRY_CONTROLS, *EXIT),
    lambda s, c: not s[F.ENTRY_CONTROLS] & Entry.ia32e_mode_guest or s[F.EXIT_CONTROLS] & HOST_64,
    'set "host address-space size" or clear "IA-32e mode guest"',
)
ADDRESS_SPACE.rule(
    "pcide",
    'If "host address-space size" is 0, CR4.PCIDE must be 0 in HOST_CR4',
    (F.HOST_CR4, *EXIT),
    lambda s, c: not s[F.HOST_CR4] & CR4_PCIDE or s[F.EXIT_CONTROLS] & HOST_64,
    "clear bit 17",
)
ADDRESS_SPACE.rule(
    "rip-high",
    'If "host address-space size" is 0, bits 63:32 of HOST_RIP must be 0',
    (F.HOST_RIP, *EXIT),
    lambda s, c: not s[F.HOST_RIP] & HIGH_HALF or s[F.EXIT_CONTROLS] & HOST_64,
    "give an address below 4 GBytes",
)
for _register, _field in (("s-cet", F.HOST_S_CET), ("ssp", F.HOST_SSP)):
    ADDRESS_SPACE.rule(
        f"{_register}-high",
        f'If "host address-space size" is 0 and "load CET state" is 1, bits 63:32 of '
        f"{_field.name} must be 0",
        (_field, *EXIT),
        lambda s, c, field=_field: (  # type: ignore[misc]
            not s[field] & HIGH_HALF or s[F.EXIT_CONTROLS] & (HOST_64 | CET) != CET
        ),
        "give an address below 4 GBytes",
    )
ADDRESS_SPACE.rule(
    "pae",
    'If "host address-space size" is 1, CR4.PAE must be 1 in HOST_CR4',
    (F.HOST_CR4, *EXIT),
    lambda s, c: s[F.HOST_CR4] & CR4_PAE or not s[F.EXIT_CONTROLS] & HOST_64,
    "set bit 5",
)
ADDRESS_SPACE.rule(
    "rip-canonical",
    'If "host address-space size" is 1, HOST_RIP must hold a canonical address',
    (F.HOST_RIP, *EXIT),
    lambda s, c: c.is_canonical(s[F.HOST_RIP]) or not s[F.EXIT_CONTROLS] & HOST_64,
    "give the address of the VM-exit handler",
    assumes="the processor's linear-address width",
)

RULES = (*REGISTERS.rules, *SEGMENTS.rules, *ADDRESS_SPACE.rules)
"""All checks on the host-state area, in the manual's order."""
