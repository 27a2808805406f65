"""Boundary states: valid VMCBs, and for every rule of VMRUN one that breaks only it.

For tests and fuzzing.  `valid_state(mode)` is a state that every processor with the capabilities
of `PROCESSOR` enters; `BREAKS[rule id].state()` breaks that rule; `boundary_states(seed)` yields
either kind for ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import Final

from undervisor.arch.svm.capabilities import ANY_PROCESSOR, SvmCapabilities
from undervisor.arch.svm.checks import CR4_FEATURES, EFER_FEATURES
from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.svm.vmcb import EventInfo, NestedControl, Vmcb, VmcbField
from undervisor.arch.svm.vmcb import VirtualInterrupt as V
from undervisor.arch.svm.vmcb import VmcbField as F
from undervisor.arch.x86.events import EventType, Vector
from undervisor.arch.x86.registers import Cr0, Cr4, Efer
from undervisor.arch.x86.segments import Attributes

PROCESSOR: Final = replace(ANY_PROCESSOR, physical_width=48)
"""A processor with everything, and physical addresses of 48 bits."""

LIMIT: Final = 1 << PROCESSOR.physical_width
PAT: Final = 0x0007_0406_0007_0406

State = dict[VmcbField, int]

# --- Valid states ---------------------------------------------------------------------------------


def _long() -> State:
    """A 64-bit guest under nested paging."""
    state: State = dict.fromkeys(VmcbField, 0)
    state.update(
        {
            F.INTERCEPT_WORD3: Intercept.NMI.mask,
            F.INTERCEPT_WORD4: Intercept.VMRUN.mask,
            F.IOPM_BASE_PA: 0x1_0000,
            F.MSRPM_BASE_PA: 0x2_0000,
            F.GUEST_ASID: 1,
            F.NESTED_CONTROL: NestedControl.np_enable,
            F.N_CR3: 0x3_0000,
            F.G_PAT: PAT,
            F.EFER: Efer.of(svme=1, lme=1, lma=1, nxe=1, sce=1),
            F.CR0: Cr0.of(pe=1, mp=1, et=1, ne=1, wp=1, pg=1),
            F.CR3: 0x5000,
            F.CR4: Cr4.of(pae=1, osfxsr=1),
            F.DR6: 0xFFFF_0FF0,
            F.DR7: 0x400,
            F.CS_ATTRIBUTES: Attributes.of(type=0xB, s=1, p=1, l=1, g=1),
            F.RFLAGS: 2,
            F.RIP: 0x10_0000,
        }
    )
    return state


def _compatibility() -> State:
    """A 32-bit code segment in long mode."""
    rights = Attributes.of(type=0xB, s=1, p=1, db=1, g=1)
    return {**_long(), F.CS_ATTRIBUTES: rights}


def _protected() -> State:
    """A 32-bit guest with PAE paging and shadow page tables."""
    return {**_compatibility(), F.EFER: Efer.svme, F.NESTED_CONTROL: 0, F.N_CR3: 0}


def _real() -> State:
    """A guest in real mode."""
    return {
        **_protected(),
        F.CR0: Cr0.of(et=1),
        F.CR4: 0,
        F.CS_ATTRIBUTES: Attributes.of(type=0xB, s=1, p=1),
    }


def _avic() -> State:
    """A 64-bit guest with AVIC."""
    tables = {F.AVIC_BACKING_PAGE: 0x6000, F.AVIC_LOGICAL_TABLE: 0x7000}
    return {**_long(), **tables, F.V_INTR_CONTROL: V.avic_enable, F.AVIC_PHYSICAL_TABLE: 0x8003}


MODES: Final = {
    "long": _long,
    "compatibility": _compatibility,
    "protected": _protected,
    "real": _real,
    "avic": _avic,
}


def valid_state(mode: str = "long") -> State:
    """A state with every field that breaks no rule; `mode` is a key of `MODES`."""
    return MODES[mode]()


def to_vmcb(state: Mapping[VmcbField, int]) -> Vmcb:
    """The state as the bytes of a VMCB."""
    vmcb = Vmcb(bytearray(4096))
    for name, value in state.items():
        vmcb[name] = value
    return vmcb


# --- States that break one rule -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Break:
    """How to break a rule: bits to set and clear, and values to give, in a valid state."""

    mode: str
    sets: Mapping[VmcbField, int] = field(default_factory=dict)
    clears: Mapping[VmcbField, int] = field(default_factory=dict)
    values: Mapping[VmcbField, int] = field(default_factory=dict)
    capabilities: SvmCapabilities = PROCESSOR

    def state(self) -> State:
        """The broken state."""
        state = valid_state(self.mode) | dict(self.values)
        for name, bits in self.sets.items():
            state[name] |= bits
        for name, bits in self.clears.items():
            state[name] &= ~bits
        return state


BREAKS: Final[dict[str, Break]] = {}


def _add(rule: str, mode: str = "long", **how: object) -> None:
    if f"svm.{rule}" in BREAKS:
        raise ValueError(f"{rule} is broken twice")
    BREAKS[f"svm.{rule}"] = Break(mode, **how)  # type: ignore[arg-type]


def _lacks(**facts: object) -> SvmCapabilities:
    return replace(PROCESSOR, **facts)  # type: ignore[arg-type]


def _event(kind: int, vector: int) -> dict[VmcbField, int]:
    return {F.EVENTINJ: EventInfo.of(v=1, type=kind, vector=vector)}


_add("efer.svme", clears={F.EFER: Efer.svme})
_add("efer.reserved", sets={F.EFER: 1 << 40})
for _name in EFER_FEATURES:
    _bit = Efer.FIELDS[_name].mask
    _without = _lacks(efer=PROCESSOR.efer & ~_bit)
    # The valid state already has NXE, which a break of another mode's must not depend on.
    _add(f"efer.{_name}", "protected", sets={F.EFER: _bit}, capabilities=_without)
_add("efer.lme", "real", sets={F.EFER: Efer.lme}, capabilities=_lacks(long_mode=False))
_add("efer.lma", "real", sets={F.EFER: Efer.lma}, capabilities=_lacks(long_mode=False))
_add("cr0.nw_without_cd", sets={F.CR0: Cr0.nw})
_add("cr0.high", sets={F.CR0: 1 << 32})
_add("cr3.high", sets={F.CR3: 1 << 52})
_add("cr3.width", sets={F.CR3: LIMIT})
_add("cr4.reserved", sets={F.CR4: 1 << 15})
for _name in CR4_FEATURES:
    _bit = Cr4.FIELDS[_name].mask
    _add(f"cr4.{_name}", sets={F.CR4: _bit}, capabilities=_lacks(cr4=PROCESSOR.cr4 & ~_bit))
_add("dr6.high", sets={F.DR6: 1 << 63})
_add("dr7.high", sets={F.DR7: 1 << 32})
_add("long_mode.pae", clears={F.CR4: Cr4.pae})
_add("long_mode.pe", clears={F.CR0: Cr0.pe})
_add("long_mode.cs", sets={F.CS_ATTRIBUTES: Attributes.db})
_add("intercept.vmrun", clears={F.INTERCEPT_WORD4: Intercept.VMRUN.mask})
_add("msrpm.range", values={F.MSRPM_BASE_PA: LIMIT - 0x1000})
_add("iopm.range", values={F.IOPM_BASE_PA: LIMIT - 0x2000})
_add("asid.zero", values={F.GUEST_ASID: 0})
_add("eventinj.type", values=_event(5, 0))
_add("eventinj.vector", values=_event(EventType.EXCEPTION, 2))
_add(
    "eventinj.cp",
    values=_event(EventType.EXCEPTION, Vector.CP),
    capabilities=_lacks(cr4=PROCESSOR.cr4 & ~Cr4.cet),
)
_add(
    "eventinj.vc",
    values=_event(EventType.EXCEPTION, Vector.VC),
    capabilities=_lacks(sev_es=False),
)
_add("eventinj.mode", values=_event(EventType.EXCEPTION, Vector.OF))
_add("cet.s_cet", values={F.S_CET: 1 << 2})
_add("cet.wp", sets={F.CR4: Cr4.cet}, clears={F.CR0: Cr0.wp})
_add("np.host_paging", capabilities=_lacks(host_cr0=0x11))
_add("np.n_cr3.high", sets={F.N_CR3: 1 << 63})
_add("np.n_cr3.width", sets={F.N_CR3: LIMIT})
_add("np.g_pat.reserved", sets={F.G_PAT: 0x80})
_add("np.g_pat.type", values={F.G_PAT: PAT & ~0xFF | 2})
_add(
    "vnmi.intercept",
    sets={F.V_INTR_CONTROL: V.v_nmi_enable},
    clears={F.INTERCEPT_WORD3: Intercept.NMI.mask},
)
_add("avic.x2avic", sets={F.V_INTR_CONTROL: V.x2avic_enable})
_add("avic.max_index", "avic", values={F.AVIC_PHYSICAL_TABLE: 0x8100})
_add(
    "avic.x2_max_index",
    "avic",
    sets={F.V_INTR_CONTROL: V.x2avic_enable},
    values={F.AVIC_PHYSICAL_TABLE: 0x8200},
    capabilities=_lacks(features2=0),
)
_add("avic.backing_page", "avic", values={F.AVIC_BACKING_PAGE: LIMIT})
_add("avic.physical_table", "avic", values={F.AVIC_PHYSICAL_TABLE: LIMIT})
_add("avic.logical_table", "avic", values={F.AVIC_LOGICAL_TABLE: LIMIT})


# --- Boundary states ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BoundaryState:
    """A generated state; `broken` is the rule that it breaks, None if it is valid."""

    state: State
    capabilities: SvmCapabilities
    broken: str | None


def boundary_states(seed: int) -> Iterator[BoundaryState]:
    """Valid and just invalid states without end, the same ones for the same seed."""
    random = Random(seed)
    rules = sorted(BREAKS)
    while True:
        rule = random.choice([None, random.choice(rules)])
        if rule is None:
            state, capabilities = valid_state(random.choice(sorted(MODES))), PROCESSOR
        else:
            state, capabilities = BREAKS[rule].state(), BREAKS[rule].capabilities
        for name in FREE_FIELDS:
            state[name] = random.getrandbits(name.width * 8)
        yield BoundaryState(state, capabilities, rule)


FREE_FIELDS: Final = (
    F.INTERCEPT_CR_READ,
    F.INTERCEPT_CR_WRITE,
    F.INTERCEPT_DR_READ,
    F.INTERCEPT_DR_WRITE,
    F.INTERCEPT_EXCEPTIONS,
    F.INTERCEPT_WORD5,
    F.PAUSE_FILTER_COUNT,
    F.PAUSE_FILTER_THRESHOLD,
    F.TSC_OFFSET,
    F.RSP,
    F.RAX,
    F.CR2,
)
"""Fields that no rule reads, so that any value is valid."""
