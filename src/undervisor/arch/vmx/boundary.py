"""Boundary states: valid VMX states, and for every rule of VM entry one that breaks only it.

For tests and fuzzing.  `valid_state(mode)` is a state that every processor with the capabilities
of `CURRENT_PROCESSOR` enters; `BREAKS[rule id].state()` breaks that rule; `boundary_states(seed)`
yields either kind for ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from random import Random

from undervisor.arch.vmx.capabilities import (
    CURRENT_PROCESSOR,
    ControlCapability,
    VmxCapabilities,
)
from undervisor.arch.vmx.checks.inputs import ALL_ONES, EntryInput
from undervisor.arch.vmx.controls import CONTROL_WORDS
from undervisor.arch.vmx.controls import EntryControls as Entry
from undervisor.arch.vmx.controls import ExitControls as Exit
from undervisor.arch.vmx.controls import PinBasedControls as Pin
from undervisor.arch.vmx.controls import PrimaryControls as Primary
from undervisor.arch.vmx.controls import SecondaryControls as Secondary
from undervisor.arch.vmx.controls import TertiaryControls as Tertiary
from undervisor.arch.vmx.fields import SEGMENTS, FieldArea, FieldWidth, VmcsField, guest_segment
from undervisor.arch.vmx.fields import VmcsField as F

NON_CANONICAL = 1 << 62
BEYOND_WIDTH = 1 << 51
CODE_64, CODE_32, CODE_16, DATA, BUSY_TSS, LDT = 0xA09B, 0xC09B, 0x9B, 0xC093, 0x8B, 0x82
UNUSABLE = 1 << 16
PAT = 0x0007_0406_0007_0406
VALID = 1 << 31
NMI, HARDWARE, SOFTWARE, OTHER = 2 << 8, 3 << 8, 4 << 8, 7 << 8
ERROR_CODE = 1 << 11
DATA_REGISTERS = ("DS", "ES", "FS", "GS")
LOADED = ("CS", "SS", *DATA_REGISTERS)

# --- Valid states ---------------------------------------------------------------------------------

_CONTROL_BITS = {
    F.PRIMARY_CONTROLS: Primary.activate_secondary_controls | Primary.activate_tertiary_controls,
    F.EXIT_CONTROLS: Exit.host_address_space_size | Exit.activate_secondary_controls,
    F.ENTRY_CONTROLS: Entry.ia32e_mode_guest,
}
_SEGMENT_RIGHTS = {"CS": CODE_64, "TR": BUSY_TSS, "LDTR": LDT}
_SEGMENT_SELECTORS = {"CS": 0x08, "TR": 0x18, "LDTR": 0x20}


def _long() -> dict[int, int]:
    """A 64-bit host and a 64-bit guest, and no control but those that are needed."""
    state: dict[int, int] = dict.fromkeys(VmcsField, 0)
    for name in CONTROL_WORDS:
        state[name] = CURRENT_PROCESSOR.controls[name].must_be_one | _CONTROL_BITS.get(name, 0)
    for side in ("GUEST", "HOST"):
        state |= {
            F[f"{side}_CR0"]: 0x8001_0033,
            F[f"{side}_CR3"]: 0x1000,
            F[f"{side}_CR4"]: 0x2020,
            F[f"{side}_EFER"]: 0xD01,
            F[f"{side}_PAT"]: PAT,
            F[f"{side}_RIP"]: 0x10_0000,
            F[f"{side}_RSP"]: 0x20_0000,
        }
    for register in SEGMENTS:
        rights = _SEGMENT_RIGHTS.get(register, DATA)
        state[guest_segment(register, "SELECTOR")] = _SEGMENT_SELECTORS.get(register, 0x10)
        state[guest_segment(register, "ACCESS_RIGHTS")] = rights
        state[guest_segment(register, "LIMIT")] = 0xFFFF_FFFF if rights & 0x8000 else 0xFFF
        if register != "LDTR":
            state[F[f"HOST_{register}_SELECTOR"]] = _SEGMENT_SELECTORS.get(register, 0x10)
    state |= {
        F.GUEST_GDTR_LIMIT: 0xFFFF,
        F.GUEST_IDTR_LIMIT: 0xFFFF,
        F.GUEST_RFLAGS: 0x2,
        F.GUEST_DR7: 0x400,
        F.VMCS_LINK_POINTER: ALL_ONES,
    }
    return state | _INPUTS


_INPUTS: dict[int, int] = {
    **dict.fromkeys(EntryInput, 0),
    EntryInput.LONG_MODE_ACTIVE: 1,
    EntryInput.CURRENT_VMCS: 0x8000,
    EntryInput.LINKED_VMCS: 1,
}

_FULL_EXCLUDED = {
    F.SECONDARY_CONTROLS: Secondary.virtualize_x2apic_mode,
    F.ENTRY_CONTROLS: Entry.entry_to_smm | Entry.deactivate_dual_monitor_treatment,
}


def _full() -> dict[int, int]:
    """As `_long`, with every control on that can be on together, and what they need."""
    state = _long()
    for name, word in CONTROL_WORDS.items():
        state[name] = (state[name] | word.layout.DECLARED) & ~_FULL_EXCLUDED.get(name, 0)
    addresses = (f for f in VmcsField if f.area is FieldArea.CONTROL and _is_address(f))
    for number, name in enumerate(addresses, 16):
        state[name] = number << 12
    counts = (F.EXIT_MSR_STORE_COUNT, F.EXIT_MSR_LOAD_COUNT, F.ENTRY_MSR_LOAD_COUNT)
    state |= dict.fromkeys(counts, 2)
    state |= {
        F.VPID: 1,
        F.EPT_POINTER: 0x5000 | 3 << 3 | 6 | 0xC0,
        F.HLAT_POINTER: 0x6000,
        F.SUB_PAGE_PERMISSION_TABLE_POINTER: 0x7000,
        F.TSC_MULTIPLIER: 1 << 48,
        F.POSTED_INTERRUPT_NOTIFICATION_VECTOR: 0xF2,
        F.CR3_TARGET_COUNT: 4,
        F.LAST_PID_POINTER_INDEX: 7,
    }
    return state


def _is_address(name: VmcsField) -> bool:
    return name.width is FieldWidth.BITS_64 and name.name.endswith("ADDRESS")


def _protected() -> dict[int, int]:
    """A 32-bit guest with PAE paging under a 64-bit host."""
    state = _long()
    state[F.ENTRY_CONTROLS] &= ~Entry.ia32e_mode_guest
    state |= {F.GUEST_CS_ACCESS_RIGHTS: CODE_32, F.GUEST_EFER: 0}
    return state


def _protected_ept() -> dict[int, int]:
    """As `_protected`, with EPT: the PDPTEs are in the VMCS."""
    return _protected() | {
        F.SECONDARY_CONTROLS: Secondary.enable_ept,
        F.EPT_POINTER: 0x5000 | 3 << 3 | 6,
    }


def _real() -> dict[int, int]:
    """An unrestricted guest in real mode."""
    state = _protected_ept()
    state[F.SECONDARY_CONTROLS] |= Secondary.unrestricted_guest
    state |= {F.GUEST_CR0: 0x30, F.GUEST_CR4: 0x2000}
    for register in LOADED:
        state[guest_segment(register, "ACCESS_RIGHTS")] = CODE_16 if register == "CS" else 0x93
        state[guest_segment(register, "LIMIT")] = 0xFFFF
        state[guest_segment(register, "SELECTOR")] = 0x1000
        state[guest_segment(register, "BASE")] = 0x1_0000
    return state


def _vm86() -> dict[int, int]:
    """A guest in virtual-8086 mode."""
    state = _protected()
    for register in LOADED:
        state[guest_segment(register, "ACCESS_RIGHTS")] = 0xF3
        state[guest_segment(register, "LIMIT")] = 0xFFFF
        state[guest_segment(register, "SELECTOR")] = 0x1000
        state[guest_segment(register, "BASE")] = 0x1_0000
    return state | {F.GUEST_RFLAGS: 0x2_0002}


def _host_32() -> dict[int, int]:
    """A 32-bit guest under a 32-bit host."""
    state = _protected()
    state[F.EXIT_CONTROLS] &= ~Exit.host_address_space_size
    return state | {EntryInput.LONG_MODE_ACTIVE: 0, F.HOST_EFER: 0}


MODES = {
    "long": _long,
    "full": _full,
    "protected": _protected,
    "protected-ept": _protected_ept,
    "real": _real,
    "vm86": _vm86,
    "host-32": _host_32,
}


def valid_state(mode: str = "long") -> dict[int, int]:
    """A state with all fields and inputs that breaks no rule; `mode` is a key of `MODES`."""
    return MODES[mode]()


# --- States that break one rule -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Break:
    """How to break a rule: bits to set and clear, and values to give, in a valid state.

    `also` names rules that cannot but break with it.
    """

    mode: str
    sets: Mapping[int, int] = field(default_factory=dict)
    clears: Mapping[int, int] = field(default_factory=dict)
    values: Mapping[int, int] = field(default_factory=dict)
    capabilities: VmxCapabilities = CURRENT_PROCESSOR
    also: frozenset[str] = frozenset()

    def state(self) -> dict[int, int]:
        """The broken state."""
        state = valid_state(self.mode) | dict(self.values)
        for name, bits in self.sets.items():
            state[name] |= bits
        for name, bits in self.clears.items():
            state[name] &= ~bits
        return state


BREAKS: dict[str, Break] = {}


def _add(rule: str, mode: str, **how: object) -> None:
    if rule in BREAKS:
        raise ValueError(f"{rule} is broken twice")
    BREAKS[rule] = Break(mode, **how)  # type: ignore[arg-type]


def _control(name: VmcsField, **change: int) -> VmxCapabilities:
    """A processor whose capability for one control word is different."""
    old = CURRENT_PROCESSOR.controls[name]
    new = ControlCapability(
        old.must_be_one | change.get("force", 0), old.may_be_one & ~change.get("forbid", 0)
    )
    return replace(CURRENT_PROCESSOR, controls={**CURRENT_PROCESSOR.controls, name: new})


def _without(**facts: object) -> VmxCapabilities:
    """A processor without some feature of `ProcessorFacts`."""
    return replace(
        CURRENT_PROCESSOR,
        processor=replace(CURRENT_PROCESSOR.processor, **facts),  # type: ignore[arg-type]
    )


_C = "vmx.controls."

# Reserved bits of control words.
for _rule, _word, _forced in (
    ("pin", F.PIN_BASED_CONTROLS, Pin.nmi_exiting),
    ("primary", F.PRIMARY_CONTROLS, Primary.hlt_exiting),
    ("secondary", F.SECONDARY_CONTROLS, Secondary.enable_rdtscp),
    ("exit.primary", F.EXIT_CONTROLS, Exit.acknowledge_interrupt),
    ("entry.controls", F.ENTRY_CONTROLS, Entry.load_pat),
):
    _add(f"{_C}{_rule}.must-be-one", "long", capabilities=_control(_word, force=_forced))
for _rule, _word, _bit in (
    ("pin", F.PIN_BASED_CONTROLS, 1 << 20),
    ("primary", F.PRIMARY_CONTROLS, 1 << 18),
    ("secondary", F.SECONDARY_CONTROLS, 1 << 29),
    ("tertiary", F.TERTIARY_CONTROLS, 1 << 60),
    ("vm-functions", F.VM_FUNCTION_CONTROLS, 1 << 5),
    ("exit.primary", F.EXIT_CONTROLS, 1 << 13),
    ("exit.secondary", F.SECONDARY_EXIT_CONTROLS, 1 << 40),
    ("entry.controls", F.ENTRY_CONTROLS, 1 << 30),
):
    _forbid = _control(_word, forbid=_bit)
    _add(f"{_C}{_rule}.may-be-one", "full", sets={_word: _bit}, capabilities=_forbid)

# Addresses of structures.
_ADDRESSES = {
    "io-bitmap-a": F.IO_BITMAP_A_ADDRESS,
    "io-bitmap-b": F.IO_BITMAP_B_ADDRESS,
    "msr-bitmap": F.MSR_BITMAP_ADDRESS,
    "virtual-apic": F.VIRTUAL_APIC_ADDRESS,
    "apic-access": F.APIC_ACCESS_ADDRESS,
    "posted-interrupts.descriptor": F.POSTED_INTERRUPT_DESCRIPTOR_ADDRESS,
    "pml": F.PML_ADDRESS,
    "sub-page-permissions.table": F.SUB_PAGE_PERMISSION_TABLE_POINTER,
    "eptp-list": F.EPTP_LIST_ADDRESS,
    "vmread-bitmap": F.VMREAD_BITMAP_ADDRESS,
    "vmwrite-bitmap": F.VMWRITE_BITMAP_ADDRESS,
    "virtualization-exception": F.VIRTUALIZATION_EXCEPTION_INFORMATION_ADDRESS,
    "pasid.low-directory": F.LOW_PASID_DIRECTORY_ADDRESS,
    "pasid.high-directory": F.HIGH_PASID_DIRECTORY_ADDRESS,
    "pid-pointers": F.PID_POINTER_TABLE_ADDRESS,
    "exit.msr-store": F.EXIT_MSR_STORE_ADDRESS,
    "exit.msr-load": F.EXIT_MSR_LOAD_ADDRESS,
    "entry.msr-load": F.ENTRY_MSR_LOAD_ADDRESS,
}
for _rule, _field in _ADDRESSES.items():
    _add(f"{_C}{_rule}.aligned", "full", sets={_field: 4})
    _add(f"{_C}{_rule}.width", "full", sets={_field: BEYOND_WIDTH})
_TOP = (1 << CURRENT_PROCESSOR.physical_address_width) - 16
for _rule in ("exit.msr-store", "exit.msr-load", "entry.msr-load"):
    _add(f"{_C}{_rule}.last", "full", values={_ADDRESSES[_rule]: _TOP})
_add(f"{_C}pid-pointers.last", "full", values={F.PID_POINTER_TABLE_ADDRESS: _TOP})

# Controls that need another.
_P, _S, _T, _X, _N = (
    F.PRIMARY_CONTROLS,
    F.SECONDARY_CONTROLS,
    F.TERTIARY_CONTROLS,
    F.EXIT_CONTROLS,
    F.PIN_BASED_CONTROLS,
)
for _rule, _word, _bit in (
    ("virtual-nmis.nmi-exiting", _N, Pin.virtual_nmis),
    ("nmi-window.virtual-nmis", _P, Primary.nmi_window_exiting),
    ("x2apic.tpr-shadow", _S, Secondary.virtualize_x2apic_mode),
    ("apic-registers.tpr-shadow", _S, Secondary.apic_register_virtualization),
    ("ipi-virtualization.tpr-shadow", _T, Tertiary.ipi_virtualization),
    ("pml.ept", _S, Secondary.enable_pml),
    ("unrestricted-guest.ept", _S, Secondary.unrestricted_guest),
    ("mode-based-execute.ept", _S, Secondary.mode_based_execute_control),
    ("sub-page-permissions.ept", _S, Secondary.sub_page_write_permissions),
    ("hlat.ept", _T, Tertiary.enable_hlat),
    ("paging-write.ept", _T, Tertiary.ept_paging_write_control),
    ("guest-paging.ept", _T, Tertiary.guest_paging_verification),
    ("exit.save-preemption-timer", _X, Exit.save_preemption_timer),
):
    _add(f"{_C}{_rule}", "long", sets={_word: _bit})
_add(
    f"{_C}virtual-interrupts.tpr-shadow",
    "long",
    sets={_S: Secondary.virtual_interrupt_delivery, _N: Pin.external_interrupt_exiting},
)
_add(
    f"{_C}virtual-interrupts.external-interrupt-exiting",
    "full",
    clears={_N: Pin.external_interrupt_exiting},
)
_add(f"{_C}x2apic.apic-accesses", "full", sets={_S: Secondary.virtualize_x2apic_mode})
_add(
    f"{_C}posted-interrupts.virtual-interrupts",
    "full",
    clears={_S: Secondary.virtual_interrupt_delivery},
)
_add(f"{_C}posted-interrupts.acknowledge", "full", clears={_X: Exit.acknowledge_interrupt})
_add(
    f"{_C}eptp-switching.ept",
    "long",
    sets={_S: Secondary.enable_vm_functions, F.VM_FUNCTION_CONTROLS: 1},
)
_PT = Secondary.pt_uses_guest_physical_addresses
_add(
    f"{_C}pt.ept",
    "long",
    sets={_S: _PT, _X: Exit.clear_rtit_ctl, F.ENTRY_CONTROLS: Entry.load_rtit_ctl},
)
_add(f"{_C}pt.load-rtit-ctl", "full", clears={F.ENTRY_CONTROLS: Entry.load_rtit_ctl})
_add(f"{_C}pt.clear-rtit-ctl", "full", clears={_X: Exit.clear_rtit_ctl})

# Values that controls use.
_add(f"{_C}cr3-target-count", "long", values={F.CR3_TARGET_COUNT: 5})
_add(
    f"{_C}tpr-threshold.reserved",
    "long",
    sets={_P: Primary.use_tpr_shadow, F.TPR_THRESHOLD: 0x10},
)
_add(
    f"{_C}tpr-threshold.vtpr",
    "long",
    sets={_P: Primary.use_tpr_shadow, F.TPR_THRESHOLD: 2, EntryInput.VIRTUAL_TPR: 0x1F},
)
_add(
    f"{_C}posted-interrupts.vector",
    "full",
    values={F.POSTED_INTERRUPT_NOTIFICATION_VECTOR: 0x100},
)
_add(f"{_C}vpid.zero", "full", values={F.VPID: 0})
_add(f"{_C}tsc-multiplier.zero", "full", values={F.TSC_MULTIPLIER: 0})
_add(f"{_C}hlat.reserved", "full", sets={F.HLAT_POINTER: 1})
_add(f"{_C}hlat.width", "full", sets={F.HLAT_POINTER: BEYOND_WIDTH})
_EPTP = F.EPT_POINTER
_NO_AD = replace(
    CURRENT_PROCESSOR,
    ept_vpid=CURRENT_PROCESSOR.ept_vpid.replace(accessed_dirty=0),
)
_NO_SSS = replace(
    CURRENT_PROCESSOR,
    ept_vpid=CURRENT_PROCESSOR.ept_vpid.replace(supervisor_shadow_stack=0),
)
_add(f"{_C}eptp.memory-type", "full", clears={_EPTP: 2})
_add(f"{_C}eptp.walk-length", "full", clears={_EPTP: 1 << 3})
_add(f"{_C}eptp.accessed-dirty", "full", capabilities=_NO_AD)
_add(f"{_C}eptp.supervisor-shadow-stack", "full", capabilities=_NO_SSS)
_add(f"{_C}eptp.reserved", "full", sets={_EPTP: 0x100})
_add(f"{_C}eptp.width", "full", sets={_EPTP: BEYOND_WIDTH})

# Event injection.
_INFO = F.ENTRY_INTERRUPTION_INFORMATION
_STRICT = replace(
    CURRENT_PROCESSOR,
    basic=CURRENT_PROCESSOR.basic.replace(exceptions_without_error_code=0),
)
_GP, _UD = 13, 6
_E = f"{_C}entry.event."
_add(f"{_E}type", "long", values={_INFO: VALID | 1 << 8})
_add(
    f"{_E}other",
    "long",
    values={_INFO: VALID | OTHER},
    capabilities=_control(_P, forbid=Primary.monitor_trap_flag),
)
_add(f"{_E}nmi-vector", "long", values={_INFO: VALID | NMI | 3})
_add(f"{_E}exception-vector", "long", values={_INFO: VALID | HARDWARE | 32})
_add(f"{_E}other-vector", "long", values={_INFO: VALID | OTHER | 3})
_add(f"{_E}error-code-type", "long", values={_INFO: VALID | SOFTWARE | ERROR_CODE | 13})
_add(f"{_E}error-code-real-mode", "real", values={_INFO: VALID | HARDWARE | ERROR_CODE | _GP})
_add(
    f"{_E}error-code-missing",
    "long",
    values={_INFO: VALID | HARDWARE | _GP},
    capabilities=_STRICT,
)
_add(
    f"{_E}error-code-excess",
    "long",
    values={_INFO: VALID | HARDWARE | ERROR_CODE | _UD},
    capabilities=_STRICT,
)
_add(f"{_E}reserved", "long", values={_INFO: VALID | HARDWARE | _UD | 1 << 12})
_add(
    f"{_E}nested",
    "long",
    values={_INFO: VALID | HARDWARE | _UD | 1 << 13},
    capabilities=replace(
        CURRENT_PROCESSOR, basic=CURRENT_PROCESSOR.basic.replace(nested_exception=0)
    ),
)
_add(
    f"{_E}error-code-value",
    "long",
    values={_INFO: VALID | HARDWARE | ERROR_CODE | _GP, F.ENTRY_EXCEPTION_ERROR_CODE: 1 << 16},
)
_add(
    f"{_E}length-zero",
    "long",
    values={_INFO: VALID | SOFTWARE | 0x80},
    capabilities=replace(
        CURRENT_PROCESSOR, misc=CURRENT_PROCESSOR.misc.replace(inject_zero_length=0)
    ),
)
_add(
    f"{_E}length-range",
    "long",
    values={_INFO: VALID | SOFTWARE | 0x80, F.ENTRY_INSTRUCTION_LENGTH: 16},
)

# SMM and tracing.
_ENTRY = F.ENTRY_CONTROLS
_SMM = EntryInput.IN_SMM
_DEACTIVATE = Entry.deactivate_dual_monitor_treatment
_BLOCKED = F.GUEST_INTERRUPTIBILITY_STATE
_add(
    f"{_C}entry.smm.entry",
    "long",
    sets={_ENTRY: Entry.entry_to_smm, _BLOCKED: 4},
    also=frozenset({"vmx.guest.interruptibility.smi"}),
)
_add(f"{_C}entry.smm.deactivate", "long", sets={_ENTRY: _DEACTIVATE})
_add(
    f"{_C}entry.smm.both",
    "long",
    sets={_ENTRY: Entry.entry_to_smm | _DEACTIVATE, _SMM: 1, _BLOCKED: 4},
)
_add(
    f"{_C}entry.rtit-ctl.tracing",
    "long",
    sets={_ENTRY: Entry.load_rtit_ctl, EntryInput.TRACING: 1},
)

# Rules that host and guest share.
_SHARED_CANONICAL = {
    "sysenter-esp": "SYSENTER_ESP",
    "sysenter-eip": "SYSENTER_EIP",
    "s-cet.canonical": "S_CET",
    "interrupt-ssp-table": "INTERRUPT_SSP_TABLE_ADDR",
    "fred.config.canonical": "FRED_CONFIG",
    **{f"fred.{k.lower()}{n}.canonical": f"FRED_{k}{n}" for k in ("RSP", "SSP") for n in (1, 2, 3)},
}
_SHARED_BITS = {
    "cr0.may-be-one": ("CR0", 1 << 32),
    "cr4.may-be-one": ("CR4", 1 << 15),
    "cr3.width": ("CR3", BEYOND_WIDTH),
    "perf-global-ctrl": ("PERF_GLOBAL_CTRL", 1 << 40),
    "efer.reserved": ("EFER", 2),
    "s-cet.reserved": ("S_CET", 1 << 6),
    "s-cet.tracker": ("S_CET", 3 << 10),
    "ssp.aligned": ("SSP", 1),
    "pkrs": ("PKRS", 1 << 32),
    "fred.config.reserved": ("FRED_CONFIG", 1 << 2),
    "spec-ctrl": ("SPEC_CTRL", 1 << 40),
    **{f"fred.rsp{n}.aligned": (f"FRED_RSP{n}", 8) for n in (1, 2, 3)},
    **{f"fred.ssp{n}.aligned": (f"FRED_SSP{n}", 4) for n in (1, 2, 3)},
}
for _side in ("GUEST", "HOST"):
    _prefix = f"vmx.{_side.lower()}."
    for _rule, _register in _SHARED_CANONICAL.items():
        _add(_prefix + _rule, "full", sets={F[f"{_side}_{_register}"]: NON_CANONICAL})
    for _rule, (_register, _bits) in _SHARED_BITS.items():
        _add(_prefix + _rule, "full", sets={F[f"{_side}_{_register}"]: _bits})
    _add(f"{_prefix}pat", "full", values={F[f"{_side}_PAT"]: 2 << 24})
    _add(f"{_prefix}cr0.must-be-one", "long", clears={F[f"{_side}_CR0"]: 1 << 5})
    _add(f"{_prefix}cr4.must-be-one", "long", clears={F[f"{_side}_CR4"]: 1 << 13})
    _add(
        f"{_prefix}cr4.cet",
        "long",
        sets={F[f"{_side}_CR4"]: 1 << 23},
        clears={F[f"{_side}_CR0"]: 1 << 16},
    )

# Host state.
_H = "vmx.host."
_add(f"{_H}efer.lma", "full", clears={F.HOST_EFER: 1 << 10})
_add(f"{_H}efer.lme", "full", clears={F.HOST_EFER: 1 << 8})
_add(f"{_H}ssp.canonical", "full", sets={F.HOST_SSP: NON_CANONICAL})
for _register in ("CS", "SS", "DS", "ES", "FS", "GS", "TR"):
    _selector = F[f"HOST_{_register}_SELECTOR"]
    _add(f"{_H}{_register.lower()}.rpl", "long", sets={_selector: 3})
    _add(f"{_H}{_register.lower()}.ti", "long", sets={_selector: 4})
_add(f"{_H}cs.null", "long", values={F.HOST_CS_SELECTOR: 0})
_add(f"{_H}tr.null", "long", values={F.HOST_TR_SELECTOR: 0})
_add(f"{_H}ss.null", "host-32", values={F.HOST_SS_SELECTOR: 0})
for _register in ("FS", "GS", "GDTR", "IDTR", "TR"):
    _base = F[f"HOST_{_register}_BASE"]
    _add(f"{_H}{_register.lower()}.base", "long", values={_base: NON_CANONICAL})
_A = f"{_H}address-space."
_LMA = EntryInput.LONG_MODE_ACTIVE
_HOST_64 = Exit.host_address_space_size
_add(
    f"{_A}guest-outside-ia32e",
    "long",
    clears={_LMA: 1},
    also=frozenset({f"{_A}host-outside-ia32e"}),
)
_add(f"{_A}host-outside-ia32e", "protected", clears={_LMA: 1})
_add(f"{_A}host-in-ia32e", "host-32", sets={_LMA: 1})
_add(f"{_A}guest", "long", clears={_X: _HOST_64}, also=frozenset({f"{_A}host-in-ia32e"}))
_add(f"{_A}pcide", "host-32", sets={F.HOST_CR4: 1 << 17})
_add(f"{_A}rip-high", "host-32", sets={F.HOST_RIP: 1 << 32})
_add(f"{_A}s-cet-high", "host-32", sets={_X: Exit.load_cet_state, F.HOST_S_CET: 1 << 32})
_add(f"{_A}ssp-high", "host-32", sets={_X: Exit.load_cet_state, F.HOST_SSP: 1 << 32})
_add(f"{_A}pae", "long", clears={F.HOST_CR4: 1 << 5})
_add(f"{_A}rip-canonical", "long", values={F.HOST_RIP: NON_CANONICAL})

# Guest registers.
_G = "vmx.guest."
_PG = 1 << 31
_FRED = 1 << 32
_add(f"{_G}cr0.pg-without-pe", "real", sets={F.GUEST_CR0: _PG})
_add(f"{_G}debugctl", "full", sets={F.GUEST_DEBUGCTL: 1 << 5})
_add(
    f"{_G}ia32e.pg",
    "full",
    clears={F.GUEST_CR0: _PG},
)
_add(f"{_G}ia32e.pae", "long", clears={F.GUEST_CR4: 1 << 5})
_add(f"{_G}cr4.fred", "protected", sets={F.GUEST_CR4: _FRED})
_add(f"{_G}s-cet.high", "protected", sets={_ENTRY: Entry.load_cet_state, F.GUEST_S_CET: 1 << 32})
_add(f"{_G}pcide", "protected", sets={F.GUEST_CR4: 1 << 17})
_add(f"{_G}dr7", "full", sets={F.GUEST_DR7: 1 << 32})
_add(f"{_G}efer.lma", "full", clears={F.GUEST_EFER: 0x500})
_add(f"{_G}efer.lme", "full", clears={F.GUEST_EFER: 0x100})
_add(f"{_G}bndcfgs.reserved", "full", sets={F.GUEST_BNDCFGS: 4})
_add(f"{_G}bndcfgs.canonical", "full", sets={F.GUEST_BNDCFGS: NON_CANONICAL})
_add(f"{_G}rtit-ctl", "full", sets={F.GUEST_RTIT_CTL: 1 << 60})
_add(f"{_G}lbr-ctl", "full", sets={F.GUEST_LBR_CTL: 1 << 60})
_add(f"{_G}uinv", "full", sets={F.GUEST_UINV: 0x100})
for _register in ("GDTR", "IDTR"):
    _low = _register.lower()
    _add(f"{_G}{_low}.base", "long", values={F[f"GUEST_{_register}_BASE"]: NON_CANONICAL})
    _add(f"{_G}{_low}.limit", "long", values={F[f"GUEST_{_register}_LIMIT"]: 0x1_0000})
_add(f"{_G}rip.high", "protected", sets={F.GUEST_RIP: 1 << 32})
_add(f"{_G}rip.canonical", "long", values={F.GUEST_RIP: NON_CANONICAL})
_add(f"{_G}rflags.reserved", "long", sets={F.GUEST_RFLAGS: 8})
_add(f"{_G}rflags.bit-1", "long", clears={F.GUEST_RFLAGS: 2})
_add(
    f"{_G}rflags.vm-ia32e",
    "vm86",
    sets={_ENTRY: Entry.ia32e_mode_guest},
)
_add(
    f"{_G}rflags.vm-real",
    "vm86",
    sets={_S: Secondary.unrestricted_guest | 2},
    clears={F.GUEST_CR0: _PG | 1},
    values={_EPTP: 0x501E},
)
_add(f"{_G}rflags.if", "long", values={_INFO: VALID | 0x20})
_add(f"{_G}ssp.high", "protected", sets={_ENTRY: Entry.load_cet_state, F.GUEST_SSP: 1 << 32})
_add(f"{_G}ssp.canonical", "full", sets={F.GUEST_SSP: NON_CANONICAL})

# Guest segment registers.
_add(f"{_G}tr.ti", "long", sets={F.GUEST_TR_SELECTOR: 4})
_add(f"{_G}ldtr.ti", "long", sets={F.GUEST_LDTR_SELECTOR: 4})
_add(f"{_G}ss.rpl", "long", sets={F.GUEST_CS_SELECTOR: 3})
for _register in LOADED:
    _low = _register.lower()
    _base, _limit, _rights = (
        guest_segment(_register, part) for part in ("BASE", "LIMIT", "ACCESS_RIGHTS")
    )
    _add(f"{_G}{_low}.base-vm86", "vm86", values={_base: 0x1_0010})
    _add(f"{_G}{_low}.limit-vm86", "vm86", values={_limit: 0xF_FFFF})
    _add(f"{_G}{_low}.rights-vm86", "vm86", values={_rights: 0x93})
    _add(f"{_G}{_low}.s", "long", clears={_rights: 0x10})
    _add(f"{_G}{_low}.present", "long", clears={_rights: 0x80})
    _add(f"{_G}{_low}.reserved-low", "long", sets={_rights: 0x100})
    _add(f"{_G}{_low}.reserved-high", "long", sets={_rights: 1 << 17})
    _add(f"{_G}{_low}.granularity-byte", "long", values={_limit: 0xFFF0_0000})
    _add(f"{_G}{_low}.granularity-page", "long", clears={_rights: 0x8000})
for _register in ("TR", "FS", "GS", "LDTR"):
    _base = guest_segment(_register, "BASE")
    _add(f"{_G}{_register.lower()}.base-canonical", "long", values={_base: NON_CANONICAL})
for _register in ("CS", "SS", "DS", "ES"):
    _base = guest_segment(_register, "BASE")
    _add(f"{_G}{_register.lower()}.base-high", "long", values={_base: 1 << 32})
for _register in DATA_REGISTERS:
    _low, _rights = _register.lower(), guest_segment(_register, "ACCESS_RIGHTS")
    _add(f"{_G}{_low}.accessed", "long", values={_rights: 0xC092})
    _add(f"{_G}{_low}.readable", "long", values={_rights: 0xC099})
    _add(f"{_G}{_low}.dpl", "long", sets={guest_segment(_register, "SELECTOR"): 3})
_CS, _SS = F.GUEST_CS_ACCESS_RIGHTS, F.GUEST_SS_ACCESS_RIGHTS
_add(f"{_G}ss.dpl-fred", "full", sets={F.GUEST_CR4: _FRED, _SS: 0x20, _CS: 0x20})
_add(f"{_G}cs.l-fred", "full", sets={F.GUEST_CR4: _FRED}, values={_CS: CODE_32})
_add(f"{_G}cs.type", "long", values={_CS: 0xA098})
_add(f"{_G}ss.type", "long", values={_SS: 0xC091})
_add(f"{_G}cs.dpl-data", "real", values={_CS: 0xF3})
_add(f"{_G}cs.dpl", "long", sets={_CS: 0x60})
_add(f"{_G}cs.dpl-conforming", "long", values={_CS: 0xA0FF})
_add(
    f"{_G}ss.dpl",
    "long",
    sets={_SS: 0x60, _CS: 0x60},
)
_add(f"{_G}ss.dpl-zero", "real", sets={_SS: 0x60, _CS: 0x60})
_add(f"{_G}cs.d", "long", sets={_CS: 1 << 14})
for _register, _rights, _type in (
    ("TR", F.GUEST_TR_ACCESS_RIGHTS, 9),
    ("LDTR", F.GUEST_LDTR_ACCESS_RIGHTS, 3),
):
    _low, _limit = _register.lower(), guest_segment(_register, "LIMIT")
    _add(f"{_G}{_low}.type", "long", values={_rights: 0x80 | _type})
    _add(f"{_G}{_low}.s", "long", sets={_rights: 0x10})
    _add(f"{_G}{_low}.present", "long", clears={_rights: 0x80})
    _add(f"{_G}{_low}.reserved-low", "long", sets={_rights: 0x100})
    _add(f"{_G}{_low}.reserved-high", "long", sets={_rights: 1 << 17})
    _add(f"{_G}{_low}.granularity-byte", "long", sets={_rights: 0x8000}, values={_limit: 0x67})
    _add(f"{_G}{_low}.granularity-page", "long", values={_limit: 0xFFF_FFFF})
_add(f"{_G}tr.usable", "long", sets={F.GUEST_TR_ACCESS_RIGHTS: UNUSABLE})

# Activity state.
_ACT = f"{_G}activity."
_ACTIVITY = F.GUEST_ACTIVITY_STATE
_HLT, _SHUTDOWN, _WAIT = 1, 2, 3
_add(f"{_ACT}range", "long", values={_ACTIVITY: 4})
_add(
    f"{_ACT}supported",
    "long",
    values={_ACTIVITY: _SHUTDOWN},
    capabilities=replace(
        CURRENT_PROCESSOR, misc=CURRENT_PROCESSOR.misc.replace(activity_shutdown=0)
    ),
)
_add(
    f"{_ACT}hlt-dpl",
    "long",
    values={_ACTIVITY: _HLT},
    sets={
        _SS: 0x60,
        _CS: 0x60,
        F.GUEST_SS_SELECTOR: 3,
        F.GUEST_CS_SELECTOR: 3,
    },
)
_add(f"{_ACT}blocking", "long", values={_ACTIVITY: _SHUTDOWN, _BLOCKED: 2})
_add(f"{_ACT}hlt-event", "long", values={_ACTIVITY: _HLT, _INFO: VALID | HARDWARE | _UD})
_add(f"{_ACT}shutdown-event", "long", values={_ACTIVITY: _SHUTDOWN, _INFO: VALID | HARDWARE | _UD})
_add(f"{_ACT}wait-for-sipi-event", "long", values={_ACTIVITY: _WAIT, _INFO: VALID | NMI | 2})
_add(
    f"{_ACT}smm",
    "long",
    values={_ACTIVITY: _WAIT, _SMM: 1, _BLOCKED: 4},
    sets={_ENTRY: Entry.entry_to_smm},
)

# Interruptibility state.
_I = f"{_G}interruptibility."
_IF = 1 << 9
_EXTERNAL = VALID | 0x20
_add(f"{_I}reserved", "long", values={_BLOCKED: 1 << 5})
_add(f"{_I}sti-and-mov-ss", "long", values={_BLOCKED: 3}, sets={F.GUEST_RFLAGS: _IF})
_add(f"{_I}sti-if", "long", values={_BLOCKED: 1})
for _rule, _value in (("sti", 1), ("mov-ss", 2)):
    _add(
        f"{_I}external-{_rule}",
        "long",
        values={_BLOCKED: _value, _INFO: _EXTERNAL},
        sets={F.GUEST_RFLAGS: _IF},
    )
_add(f"{_I}nmi-mov-ss", "long", values={_BLOCKED: 2, _INFO: VALID | NMI | 2})
_add(f"{_I}smi", "long", values={_BLOCKED: 4})
_add(f"{_I}smm", "long", sets={_ENTRY: Entry.entry_to_smm, _SMM: 1})
_add(
    f"{_I}nmi-sti",
    "long",
    values={_BLOCKED: 1, _INFO: VALID | NMI | 2},
    sets={F.GUEST_RFLAGS: _IF},
)
_add(
    f"{_I}virtual-nmi",
    "long",
    values={_BLOCKED: 8, _INFO: VALID | NMI | 2},
    sets={_N: Pin.nmi_exiting | Pin.virtual_nmis},
)
_add(f"{_I}enclave-mov-ss", "long", values={_BLOCKED: 0x12})
_add(f"{_I}enclave-sgx", "long", values={_BLOCKED: 0x10}, capabilities=_without(sgx=False))

# Pending debug exceptions.
_D = f"{_G}pending-debug."
_PENDING = F.GUEST_PENDING_DEBUG_EXCEPTIONS
_RTM = 0x1_1000
_add(f"{_D}reserved", "long", values={_PENDING: 1 << 13})
_add(f"{_D}bs-missing", "long", values={_BLOCKED: 2}, sets={F.GUEST_RFLAGS: 1 << 8})
_add(f"{_D}bs-excess", "long", values={_BLOCKED: 2, _PENDING: 1 << 14})
_add(f"{_D}rtm-others", "long", values={_PENDING: 1 << 16})
_add(f"{_D}rtm-supported", "long", values={_PENDING: _RTM}, capabilities=_without(rtm=False))
_add(f"{_D}rtm-mov-ss", "long", values={_PENDING: _RTM, _BLOCKED: 2})

# VMCS link pointer.
_L = f"{_G}link."
_LINK = F.VMCS_LINK_POINTER
_LINKED = EntryInput.LINKED_VMCS
_add(f"{_L}aligned", "long", values={_LINK: 0x9010})
_add(f"{_L}width", "long", values={_LINK: BEYOND_WIDTH})
_add(f"{_L}revision", "long", values={_LINK: 0x9000, _LINKED: 2})
_add(f"{_L}shadow", "long", values={_LINK: 0x9000, _LINKED: 1 << 31 | 1})
_add(f"{_L}current", "long", values={_LINK: 0x8000})
_add(
    f"{_L}executive",
    "long",
    values={_LINK: 0x9000, F.EXECUTIVE_VMCS_POINTER: 0x9000, _SMM: 1},
)

# PDPTEs.
for _number in range(4):
    _pdpte, _memory = F[f"GUEST_PDPTE{_number}"], EntryInput[f"MEMORY_PDPTE{_number}"]
    _add(f"{_G}pdpte{_number}.ept", "protected-ept", values={_pdpte: 3})
    _add(f"{_G}pdpte{_number}.memory", "protected", values={_memory: 1 | 1 << 5})


# --- Boundary states ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BoundaryState:
    """A generated state; `broken` is the rule that it breaks, None if it is valid."""

    state: dict[int, int]
    capabilities: VmxCapabilities
    broken: str | None


def boundary_states(seed: int) -> Iterator[BoundaryState]:
    """Valid and just invalid states without end, the same ones for the same seed.

    Those whose break cannot but break another rule are left out.
    """
    random = Random(seed)
    alone = sorted(rule for rule, how in BREAKS.items() if not how.also)
    while True:
        rule = random.choice([None, random.choice(alone)])
        if rule is None:
            state, capabilities = valid_state(random.choice(sorted(MODES))), CURRENT_PROCESSOR
        else:
            state, capabilities = BREAKS[rule].state(), BREAKS[rule].capabilities
        for name in FREE_FIELDS:
            state[name] = random.getrandbits(name.bits)
        yield BoundaryState(state, capabilities, rule)


FREE_FIELDS = (
    F.EXCEPTION_BITMAP,
    F.PAGE_FAULT_ERROR_CODE_MASK,
    F.PAGE_FAULT_ERROR_CODE_MATCH,
    F.CR0_GUEST_HOST_MASK,
    F.CR4_GUEST_HOST_MASK,
    F.CR0_READ_SHADOW,
    F.CR4_READ_SHADOW,
    F.TSC_OFFSET,
    F.GUEST_RSP,
    F.HOST_RSP,
    F.PREEMPTION_TIMER_VALUE,
)
"""Fields that no rule reads, so that any value is valid."""
