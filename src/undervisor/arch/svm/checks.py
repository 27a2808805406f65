"""The rules of VMRUN: a state that breaks one gives #VMEXIT with VMEXIT_INVALID.

APM 2 "VMRUN Instruction", paragraph "Canonicalization and Consistency Checks", and the sections
that add to it, each cited by the rules it gives.  What the manual does not make a rule is not one
here: segment attributes, RFLAGS, RIP, CR0's reserved low bits, TLB_CONTROL and LMA are loaded as
they are.  U_CET is not in the VMCB without SEV-ES, whose checks are left out.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Final

from undervisor.arch.rules import Outcome, Rule, Verdict, judge
from undervisor.arch.svm.capabilities import CR4_BASE, SvmCapabilities, SvmFeatures
from undervisor.arch.svm.capabilities import SvmFeatures2 as Features2
from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.svm.permissions import IOPM_SIZE, MSRPM_SIZE
from undervisor.arch.svm.vmcb import EventInfo, NestedControl, VirtualInterrupt, Vmcb
from undervisor.arch.svm.vmcb import VmcbField as F
from undervisor.arch.x86.events import EventType, Vector
from undervisor.arch.x86.registers import HIGH_HALF, Cr0, Cr4, Efer
from undervisor.arch.x86.segments import Attributes

State = Mapping[F, int]
SvmRule = Rule[F, SvmCapabilities]
SvmVerdict = Verdict[F, SvmCapabilities]
Holds = Callable[[State, SvmCapabilities], bool]

CONSISTENCY: Final = "Canonicalization and Consistency Checks"
INJECTION: Final = "Event Injection"
NESTED: Final = "Nested Paging and VMRUN/#VMEXIT"
POINTERS: Final = "Physical Address Pointer Restrictions"

PAGE: Final = 0x1000


POINTER: Final = 0x000F_FFFF_FFFF_F000
ABOVE_52: Final = 0xFFF0_0000_0000_0000
S_CET_RESERVED: Final = 0xFFFF_FFFF_FFFF_FFFC
"""All bits of S_CET but SH_STK_EN and WR_SHSTK_EN: AMD has no indirect branch tracking."""

RULES: Final[list[SvmRule]] = []
"""Every rule, in the manual's order."""


def _rule(
    id: str,
    text: str,
    reads: tuple[F, ...],
    holds: Holds,
    remedy: str,
    section: str = CONSISTENCY,
    assumes: str = "",
) -> None:
    """Declare one rule."""
    RULES.append(
        Rule(f"svm.{id}", text, section, reads, holds, Outcome.VMEXIT_INVALID, remedy, assumes)
    )


def _long_mode(s: State) -> bool:
    """Whether the guest will be in long mode: EFER.LME and CR0.PG, whatever LMA says."""
    return bool(s[F.EFER] & Efer.lme and s[F.CR0] & Cr0.pg)


LONG: Final = (F.EFER, F.CR0)

# --- EFER ---

_rule(
    "efer.svme",
    "EFER.SVME must be 1",
    (F.EFER,),
    lambda s, c: bool(s[F.EFER] & Efer.svme),
    "set EFER.SVME (bit 12) in the VMCB, and hide it from the guest by intercepting EFER",
)
_rule(
    "efer.reserved",
    "Bits of EFER that no processor defines must be 0",
    (F.EFER,),
    lambda s, c: not s[F.EFER] & Efer.reserved(),
    "clear the bits of EFER that the manual does not define",
)

# The bits of EFER that a CPUID bit announces.
EFER_FEATURES: Final = {
    "nxe": "CPUID Fn8000_0001_EDX[NX]",
    "lmsle": "CPUID Fn8000_0008_EBX[EferLmsleUnsupported] = 0",
    "ffxsr": "CPUID Fn8000_0001_EDX[FFXSR]",
    "tce": "CPUID Fn8000_0001_ECX[TCE]",
    "mcommit": "CPUID Fn8000_0008_EBX[MCOMMIT]",
    "intwb": "CPUID Fn8000_0008_EBX[INT_WBINVD]",
    "uaie": "CPUID Fn8000_0021_EAX[UpperAddressIgnore]",
    "aibrse": "CPUID Fn8000_0021_EAX[AutomaticIBRS]",
}


def _supported_bit(
    register: F, name: str, mask: int, supported: Callable[[SvmCapabilities], int], cpuid: str
) -> None:
    """The rule that one optional bit of EFER or CR4 is 0 on a processor without its feature."""
    bit = f"{register.name}.{name.upper()}"
    _rule(
        f"{register.name.lower()}.{name}",
        f"{bit} must be 0 on a processor without it",
        (register,),
        lambda s, c: not s[register] & mask & ~supported(c),
        f"clear {bit}, or offer it to the guest hypervisor ({cpuid})",
        assumes=cpuid,
    )


for _name, _cpuid in EFER_FEATURES.items():
    _supported_bit(F.EFER, _name, Efer.FIELDS[_name].mask, lambda c: c.efer, _cpuid)

_rule(
    "efer.lme",
    "EFER.LME must be 0 on a processor without long mode",
    (F.EFER,),
    lambda s, c: c.long_mode or not s[F.EFER] & Efer.lme,
    "clear EFER.LME: this processor has no long mode",
    assumes="CPUID Fn8000_0001_EDX[LM]",
)
_rule(
    "efer.lma",
    "EFER.LMA must be 0 on a processor without long mode",
    (F.EFER,),
    lambda s, c: c.long_mode or not s[F.EFER] & Efer.lma,
    "clear EFER.LMA: this processor has no long mode",
    assumes="CPUID Fn8000_0001_EDX[LM]",
)

# --- CR0, CR3, CR4 ---

_rule(
    "cr0.nw_without_cd",
    "CR0.NW must be 0 while CR0.CD is 0",
    (F.CR0,),
    lambda s, c: not s[F.CR0] & Cr0.nw or bool(s[F.CR0] & Cr0.cd),
    "clear CR0.NW (bit 29), or set CR0.CD (bit 30) as well",
)
_rule(
    "cr0.high",
    "CR0 bits 63:32 must be 0",
    (F.CR0,),
    lambda s, c: not s[F.CR0] & HIGH_HALF,
    "clear CR0 bits 63:32",
)
_rule(
    "cr3.high",
    "CR3 bits 63:52 must be 0 in long mode",
    (F.CR3, *LONG),
    lambda s, c: not s[F.CR3] & ABOVE_52 or not _long_mode(s),
    "clear CR3 bits 63:52; bit 63 of MOV to CR3 is a hint that is never stored",
)
_rule(
    "cr3.width",
    "CR3 must be within the physical address size in long mode",
    (F.CR3, *LONG),
    lambda s, c: not (s[F.CR3] & ~ABOVE_52) >> c.physical_width or not _long_mode(s),
    "put the guest's page tables below the supported physical address size",
    assumes="CPUID Fn8000_0008_EAX[PhysAddrSize]",
)

# The bits of CR4 that a CPUID bit announces.
CR4_FEATURES: Final = {
    "umip": "CPUID Fn0000_0007_ECX_x0[UMIP]",
    "la57": "CPUID Fn0000_0007_ECX_x0[LA57]",
    "fsgsbase": "CPUID Fn0000_0007_EBX_x0[FSGSBASE]",
    "pcide": "CPUID Fn0000_0001_ECX[PCID]",
    "osxsave": "CPUID Fn0000_0001_ECX[XSAVE]",
    "smep": "CPUID Fn0000_0007_EBX_x0[SMEP]",
    "smap": "CPUID Fn0000_0007_EBX_x0[SMAP]",
    "pke": "CPUID Fn0000_0007_ECX_x0[PKU]",
    "cet": "CPUID Fn0000_0007_ECX_x0[CET_SS]",
    "fred": "CPUID Fn0000_0007_EAX_x1[FRED]",
}
CR4_DEFINED: Final = CR4_BASE | sum(Cr4.FIELDS[name].mask for name in CR4_FEATURES)

_rule(
    "cr4.reserved",
    "Bits of CR4 that no AMD processor defines must be 0",
    (F.CR4,),
    lambda s, c: not s[F.CR4] & ~CR4_DEFINED,
    "clear the bits of CR4 that the manual does not define; VMXE and SMXE are Intel's",
)
for _name, _cpuid in CR4_FEATURES.items():
    _supported_bit(F.CR4, _name, Cr4.FIELDS[_name].mask, lambda c: c.cr4, _cpuid)

# --- Debug registers ---

_rule(
    "dr6.high",
    "DR6 bits 63:32 must be 0",
    (F.DR6,),
    lambda s, c: not s[F.DR6] & HIGH_HALF,
    "clear DR6 bits 63:32; do not sign-extend FFFF0FF0h",
)
_rule(
    "dr7.high",
    "DR7 bits 63:32 must be 0",
    (F.DR7,),
    lambda s, c: not s[F.DR7] & HIGH_HALF,
    "clear DR7 bits 63:32",
)

# --- Long mode ---

_rule(
    "long_mode.pae",
    "With EFER.LME and CR0.PG set, CR4.PAE must be 1",
    (F.CR4, *LONG),
    lambda s, c: bool(s[F.CR4] & Cr4.pae) or not _long_mode(s),
    "set CR4.PAE, or clear EFER.LME or CR0.PG",
)
_rule(
    "long_mode.pe",
    "With EFER.LME and CR0.PG set, CR0.PE must be 1",
    (F.CR0, F.EFER),
    lambda s, c: bool(s[F.CR0] & Cr0.pe) or not _long_mode(s),
    "set CR0.PE; paged real mode (PG without PE) exists only without EFER.LME",
)
_rule(
    "long_mode.cs",
    "With EFER.LME, CR0.PG and CR4.PAE set, CS.L and CS.D must not both be 1",
    (F.CS_ATTRIBUTES, *LONG, F.CR4),
    lambda s, c: (
        s[F.CS_ATTRIBUTES] & (Attributes.l | Attributes.db) != Attributes.l | Attributes.db
        or not _long_mode(s)
        or not s[F.CR4] & Cr4.pae
    ),
    "clear CS.D (attribute bit 10) for a 64-bit code segment",
)

# --- Controls ---

_rule(
    "intercept.vmrun",
    "The VMRUN intercept must be set",
    (F.INTERCEPT_WORD4,),
    lambda s, c: bool(s[F.INTERCEPT_WORD4] & Intercept.VMRUN.mask),
    "set bit 0 of the intercept word at 010h",
)
_rule(
    "msrpm.range",
    "The MSR permission map, 8 KiB, must end below the last supported physical address",
    (F.MSRPM_BASE_PA,),
    # "Extends to a physical address that is greater than or equal to the maximum": the last byte
    # of the address space is that maximum, and the last byte of the IOPM is never looked at.
    lambda s, c: (s[F.MSRPM_BASE_PA] & -PAGE) + MSRPM_SIZE < 1 << c.physical_width,
    "put the MSR permission map below the supported physical address size",
    assumes="CPUID Fn8000_0008_EAX[PhysAddrSize]",
)
_rule(
    "iopm.range",
    "The I/O permission map, 12 KiB, must end within the physical address size",
    (F.IOPM_BASE_PA,),
    lambda s, c: (s[F.IOPM_BASE_PA] & -PAGE) + IOPM_SIZE <= 1 << c.physical_width,
    "put the I/O permission map below the supported physical address size",
    assumes="CPUID Fn8000_0008_EAX[PhysAddrSize]",
)
_rule(
    "asid.zero",
    "The guest's ASID must not be 0, which is the host's",
    (F.GUEST_ASID,),
    lambda s, c: s[F.GUEST_ASID] != 0,
    "give the guest an ASID from 1 to CPUID Fn8000_000A_EBX - 1",
)

# --- Event injection ---

_INJECTED_EXCEPTIONS: Final = frozenset(Vector) - {
    Vector.NMI,
    Vector.COPROCESSOR_SEGMENT_OVERRUN,
    Vector.VE,
}
_TYPES: Final = frozenset(
    {
        EventType.EXTERNAL_INTERRUPT,
        EventType.NMI,
        EventType.EXCEPTION,
        EventType.SOFTWARE_INTERRUPT,
    }
)
_VALID_EXCEPTION: Final = EventInfo.v | EventType.EXCEPTION << 8


def _injects(s: State, *vectors: int) -> bool:
    """Whether EVENTINJ holds a valid exception with one of `vectors`."""
    event = s[F.EVENTINJ]
    exception = event & (EventInfo.v | EventInfo.type) == _VALID_EXCEPTION
    return exception and event & EventInfo.vector in vectors


def _injects_no_exception(s: State) -> bool:
    """Whether EVENTINJ holds a valid exception with a vector that is no exception's."""
    event = s[F.EVENTINJ]
    exception = event & (EventInfo.v | EventInfo.type) == _VALID_EXCEPTION
    return exception and event & EventInfo.vector not in _INJECTED_EXCEPTIONS


_rule(
    "eventinj.type",
    "The type of an injected event must not be reserved",
    (F.EVENTINJ,),
    lambda s, c: not s[F.EVENTINJ] & EventInfo.v or s[F.EVENTINJ] >> 8 & 7 in _TYPES,
    "use type 0 (INTR), 2 (NMI), 3 (exception) or 4 (software interrupt)",
    INJECTION,
)
_rule(
    "eventinj.vector",
    "The vector of an injected exception must be an exception's",
    (F.EVENTINJ,),
    lambda s, c: not _injects_no_exception(s),
    "inject an NMI with type 2, an interrupt with type 0 or 4",
    INJECTION,
)
_rule(
    "eventinj.cp",
    "#CP can be injected only on a processor with shadow stacks",
    (F.EVENTINJ,),
    lambda s, c: c.shadow_stacks or not _injects(s, Vector.CP),
    "do not inject vector 21: this processor has no #CP",
    INJECTION,
    "CPUID Fn0000_0007_ECX_x0[CET_SS]",
)
_rule(
    "eventinj.vc",
    "#VC can be injected only on a processor with SEV-ES",
    (F.EVENTINJ,),
    lambda s, c: c.sev_es or not _injects(s, Vector.VC),
    "do not inject vector 29: this processor has no #VC",
    INJECTION,
    "CPUID Fn8000_001F_EAX[SEV-ES]",
)
_rule(
    "eventinj.mode",
    "#BR and #OF can't be injected in 64-bit mode, which has no BOUND and no INTO",
    (F.EVENTINJ, F.CS_ATTRIBUTES, *LONG),
    lambda s, c: (
        not _injects(s, Vector.BR, Vector.OF)
        or not s[F.CS_ATTRIBUTES] & Attributes.l
        or not _long_mode(s)
    ),
    "do not inject #BR or #OF into 64-bit code",
    INJECTION,
)

# --- Shadow stacks ---

_rule(
    "cet.s_cet",
    "The reserved bits of S_CET, 63:2, must be 0",
    (F.S_CET,),
    lambda s, c: not c.shadow_stacks or not s[F.S_CET] & S_CET_RESERVED,
    "clear the reserved bits of S_CET",
    assumes="CPUID Fn0000_0007_ECX_x0[CET_SS]",
)
_rule(
    "cet.wp",
    "With CR4.CET set, CR0.WP must be 1",
    (F.CR0, F.CR4),
    lambda s, c: not s[F.CR4] & Cr4.cet or bool(s[F.CR0] & Cr0.wp),
    "set CR0.WP, or clear CR4.CET",
)

# --- Nested paging ---


def _nested(s: State, c: SvmCapabilities) -> bool:
    """Whether nested paging is enabled; a processor without it does not look at the bit."""
    return bool(c.features & SvmFeatures.np and s[F.NESTED_CONTROL] & NestedControl.np_enable)


NP: Final = "CPUID Fn8000_000A_EDX[NP]"
_PAT_TYPES: Final = frozenset({0, 1, 4, 5, 6, 7})
_PAT_RESERVED: Final = 0xF8F8_F8F8_F8F8_F8F8


def _has_pat_types(pat: int) -> bool:
    """Whether the three type bits of each PAT entry are UC, WC, WT, WP, WB or UC-."""
    return all(pat >> shift & 7 in _PAT_TYPES for shift in range(0, 64, 8))


_rule(
    "np.host_paging",
    "With nested paging, the hypervisor that executes VMRUN must have paging enabled",
    (F.NESTED_CONTROL,),
    lambda s, c: bool(c.host_cr0 & Cr0.pg) or not _nested(s, c),
    "enable paging (CR0.PG) in the hypervisor before VMRUN, or clear NP_ENABLE",
    "Enabling Nested Paging",
    "CR0.PG of the hypervisor is 1",
)
_rule(
    "np.n_cr3.high",
    "With nested paging, N_CR3 bits 63:52 must be 0",
    (F.N_CR3, F.NESTED_CONTROL),
    lambda s, c: not s[F.N_CR3] & ABOVE_52 or not _nested(s, c),
    "clear N_CR3 bits 63:52",
    NESTED,
    NP,
)
_rule(
    "np.n_cr3.width",
    "With nested paging, N_CR3 must be within the physical address size",
    (F.N_CR3, F.NESTED_CONTROL),
    lambda s, c: not (s[F.N_CR3] & ~ABOVE_52) >> c.physical_width or not _nested(s, c),
    "put the nested page tables below the supported physical address size",
    NESTED,
    "CPUID Fn8000_0008_EAX[PhysAddrSize]",
)
_rule(
    "np.g_pat.reserved",
    "With nested paging, the reserved bits of G_PAT must be 0",
    (F.G_PAT, F.NESTED_CONTROL),
    lambda s, c: not s[F.G_PAT] & _PAT_RESERVED or not _nested(s, c),
    "clear bits 7:3 of each byte of G_PAT; the reset value is 0007040600070406h",
    NESTED,
    NP,
)
_rule(
    "np.g_pat.type",
    "With nested paging, every entry of G_PAT must have a defined memory type",
    (F.G_PAT, F.NESTED_CONTROL),
    lambda s, c: _has_pat_types(s[F.G_PAT]) or not _nested(s, c),
    "use the types 0, 1, 4, 5, 6 and 7 only; the reset value is 0007040600070406h",
    NESTED,
    NP,
)

# --- Virtual interrupts ---

_rule(
    "vnmi.intercept",
    "With V_NMI_ENABLE set, the NMI intercept must be set",
    (F.V_INTR_CONTROL, F.INTERCEPT_WORD3),
    lambda s, c: (
        not c.features & SvmFeatures.vnmi
        or not s[F.V_INTR_CONTROL] & VirtualInterrupt.v_nmi_enable
        or bool(s[F.INTERCEPT_WORD3] & Intercept.NMI.mask)
    ),
    "set bit 1 of the intercept word at 00Ch, or clear V_NMI_ENABLE",
    "NMI Virtualization",
    "CPUID Fn8000_000A_EDX[VNMI]",
)


def _avic(s: State, c: SvmCapabilities) -> bool:
    """Whether AVIC is enabled."""
    enabled = s[F.V_INTR_CONTROL] & VirtualInterrupt.avic_enable
    return bool(c.features & SvmFeatures.avic and enabled)


def _x2avic(s: State, c: SvmCapabilities) -> bool:
    """Whether x2AVIC is asked for."""
    enabled = s[F.V_INTR_CONTROL] & VirtualInterrupt.x2avic_enable
    return bool(c.features & SvmFeatures.x2avic and enabled)


def _max_index(s: State) -> int:
    """AVIC_PHYSICAL_MAX_INDEX."""
    return s[F.AVIC_PHYSICAL_TABLE] & 0xFFF


def _reachable(pointer: int, size: int, c: SvmCapabilities) -> bool:
    """Whether `size` bytes at the pointer's page lie within the physical address size."""
    return (pointer & POINTER) + size <= 1 << c.physical_width


AVIC_ON: Final = "CPUID Fn8000_000A_EDX[AVIC]"

_rule(
    "avic.x2avic",
    "With x2AVIC enabled, AVIC must be enabled",
    (F.V_INTR_CONTROL,),
    lambda s, c: not _x2avic(s, c) or _avic(s, c),
    "set AVIC enable (060h bit 31) as well, or clear x2AVIC enable (bit 30)",
    "VMCB Changes for AVIC",
    "CPUID Fn8000_000A_EDX[x2AVIC]",
)
_rule(
    "avic.max_index",
    "In xAVIC mode, AVIC_PHYSICAL_MAX_INDEX must be at most 255",
    (F.AVIC_PHYSICAL_TABLE, F.V_INTR_CONTROL),
    lambda s, c: not _avic(s, c) or _x2avic(s, c) or _max_index(s) <= 255,
    "lower bits 11:0 of the field at 0F8h",
    POINTERS,
    AVIC_ON,
)
_rule(
    "avic.x2_max_index",
    "In x2AVIC mode without x2AVIC_EXT, AVIC_PHYSICAL_MAX_INDEX must be at most 511",
    (F.AVIC_PHYSICAL_TABLE, F.V_INTR_CONTROL),
    lambda s, c: (
        not _avic(s, c)
        or not _x2avic(s, c)
        or bool(c.features2 & Features2.x2avic_ext)
        or _max_index(s) <= 511
    ),
    "lower bits 11:0 of the field at 0F8h",
    POINTERS,
    "CPUID Fn8000_000A_ECX[x2AVIC_EXT]",
)
# The manual says that VMRUN exits here, and does not name the code; VMEXIT_INVALID is taken.
_rule(
    "avic.backing_page",
    "With AVIC, the backing page must be within the physical address size",
    (F.AVIC_BACKING_PAGE, F.V_INTR_CONTROL),
    lambda s, c: not _avic(s, c) or _reachable(s[F.AVIC_BACKING_PAGE], PAGE, c),
    "put the backing page below the supported physical address size",
    POINTERS,
    AVIC_ON,
)
_rule(
    "avic.physical_table",
    "With AVIC, the physical APIC ID table must be within the physical address size",
    (F.AVIC_PHYSICAL_TABLE, F.V_INTR_CONTROL),
    lambda s, c: (
        not _avic(s, c)
        or _reachable(s[F.AVIC_PHYSICAL_TABLE], PAGE * ((_max_index(s) >> 9) + 1), c)
    ),
    "put the physical APIC ID table below the supported physical address size",
    POINTERS,
    AVIC_ON,
)
_rule(
    "avic.logical_table",
    "In xAVIC mode, the logical APIC ID table must be within the physical address size",
    (F.AVIC_LOGICAL_TABLE, F.V_INTR_CONTROL),
    lambda s, c: not _avic(s, c) or _x2avic(s, c) or _reachable(s[F.AVIC_LOGICAL_TABLE], PAGE, c),
    "put the logical APIC ID table below the supported physical address size",
    POINTERS,
    AVIC_ON,
)


def check_vmrun(state: State, capabilities: SvmCapabilities) -> SvmVerdict:
    """All rules of VMRUN that `state` breaks, and those that a missing field left unchecked.

    A `Vmcb` is such a state.
    """
    return judge(RULES, state, capabilities)


# The parts of fields that the rules look at, where less than the field decides: it changes less
# often.  Offset and struct format; a test holds these against the rules.
_DECIDING: Final[dict[F, tuple[int, str]]] = {
    F.CR3: (F.CR3 + 4, "I"),
    F.DR6: (F.DR6 + 4, "I"),
    F.DR7: (F.DR7 + 4, "I"),
    F.EVENTINJ: (F.EVENTINJ, "I"),
    F.V_INTR_CONTROL: (F.V_INTR_CONTROL + 3, "B"),
}
_FORMATS: Final = {1: "B", 2: "H", 4: "I", 8: "Q"}


def _deciding_bytes() -> struct.Struct:
    """A layout that picks from a VMCB everything the rules read, and skips the rest."""
    fields = {field for rule in RULES for field in rule.reads}
    places = sorted(_DECIDING.get(f, (int(f), _FORMATS[f.width])) for f in fields)
    layout, end = "<", 0
    for offset, code in places:
        layout += f"{offset - end}x{code}"
        end = offset + struct.calcsize(code)
    return struct.Struct(layout)


class VmrunChecker:
    """`check_vmrun` for a processor that enters again and again.

    A VMCB whose deciding bytes equal those of an earlier good check is good without a rule being
    evaluated; any other is held against every rule.
    """

    __slots__ = ("_capabilities", "_good", "_good_limit", "_pick")

    def __init__(self, capabilities: SvmCapabilities, remember: int = 256) -> None:
        if capabilities.physical_width < 32:
            raise ValueError("a physical address has at least 32 bits")
        self._capabilities = capabilities
        self._pick = _deciding_bytes().unpack_from
        self._good: set[tuple[int, ...]] = set()
        self._good_limit = remember

    def check(self, vmcb: Vmcb) -> SvmVerdict | None:
        """None if `vmcb` breaks no rule, else the verdict with all broken ones."""
        key = self._pick(vmcb.b)
        if key in self._good:
            return None
        verdict = check_vmrun(vmcb, self._capabilities)
        if verdict.broken:
            return verdict
        if len(self._good) >= self._good_limit:
            self._good.clear()
        self._good.add(key)
        return None
