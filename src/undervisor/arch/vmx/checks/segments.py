"""Checks on guest segment registers: a broken one gives a VM exit with reason 33.

SDM, chapter "VM Entries", section "Checks on Guest Segment Registers".  Each rule is declared
once for each register that it is stated for.
"""

from __future__ import annotations

from undervisor.arch.rules import Outcome
from undervisor.arch.vmx.checks.declare import SECONDARY, Section, State, secondary
from undervisor.arch.vmx.checks.guest import GUEST
from undervisor.arch.vmx.checks.state import HIGH_HALF
from undervisor.arch.vmx.controls import AccessRights as Rights
from undervisor.arch.vmx.controls import EntryControls as Entry
from undervisor.arch.vmx.controls import SecondaryControls as Secondary
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.registers import Cr4, Rflags

SEGMENTS = Section("vmx.guest", "Checks on Guest Segment Registers", Outcome.EXIT_GUEST_STATE)

VM86 = Rflags.vm
VM86_RIGHTS = 0xF3
UNUSABLE = Rights.unusable
S, PRESENT = Rights.s, Rights.present
RESERVED_LOW, RESERVED_HIGH = 0xF00, 0xFFFE_0000
TI = 4
FLAGS = F.GUEST_RFLAGS
CS_RIGHTS, SS_RIGHTS = F.GUEST_CS_ACCESS_RIGHTS, F.GUEST_SS_ACCESS_RIGHTS
ALL = ("CS", "SS", "DS", "ES", "FS", "GS")
DATA = ("DS", "ES", "FS", "GS")
UNRESTRICTED = secondary(Secondary.unrestricted_guest)


def selector(register: str) -> F:
    """The register's selector field."""
    return F[f"GUEST_{register}_SELECTOR"]


def base(register: str) -> F:
    """The register's base-address field."""
    return F[f"GUEST_{register}_BASE"]


def limit(register: str) -> F:
    """The register's limit field."""
    return F[f"GUEST_{register}_LIMIT"]


def rights(register: str) -> F:
    """The register's access-rights field."""
    return F[f"GUEST_{register}_ACCESS_RIGHTS"]


# --- Selector fields ------------------------------------------------------------------------------

SEGMENTS.rule(
    "tr.ti",
    "The TI flag (bit 2) of the guest's TR selector must be 0",
    (selector("TR"),),
    lambda s, c: not s[F.GUEST_TR_SELECTOR] & TI,
    "give a selector in the GDT",
)
SEGMENTS.rule(
    "ldtr.ti",
    "If LDTR is usable, the TI flag (bit 2) of its selector must be 0",
    (selector("LDTR"), rights("LDTR")),
    lambda s, c: not s[F.GUEST_LDTR_SELECTOR] & TI or s[F.GUEST_LDTR_ACCESS_RIGHTS] & UNUSABLE,
    "give a selector in the GDT, or set bit 16 of the access rights (unusable)",
)
SEGMENTS.rule(
    "ss.rpl",
    'Unless the guest is in virtual-8086 mode or "unrestricted guest" is 1, the RPL of SS must '
    "equal the RPL of CS",
    (selector("SS"), selector("CS"), FLAGS, *SECONDARY),
    lambda s, c: (
        not (s[F.GUEST_SS_SELECTOR] ^ s[F.GUEST_CS_SELECTOR]) & 3
        or s[FLAGS] & VM86
        or UNRESTRICTED(s)
    ),
    "give both selectors the guest's CPL",
)

# --- Base-address fields --------------------------------------------------------------------------


def vm86_base(register: str) -> None:
    """In virtual-8086 mode a base is the selector times 16."""
    where, what = base(register), selector(register)
    SEGMENTS.rule(
        f"{register.lower()}.base-vm86",
        f"In virtual-8086 mode, the base of {register} must be its selector shifted left by 4",
        (where, what, FLAGS),
        lambda s, c: not s[FLAGS] & VM86 or s[where] == s[what] << 4,
        "set the base to selector << 4",
    )


for _register in ALL:
    vm86_base(_register)
for _register in ("TR", "FS", "GS"):
    GUEST.canonical(f"{_register.lower()}.base-canonical", f"{_register}_BASE", section=SEGMENTS)
GUEST.canonical(
    "ldtr.base-canonical",
    "LDTR_BASE",
    section=SEGMENTS,
    condition=lambda s: not s[F.GUEST_LDTR_ACCESS_RIGHTS] & UNUSABLE,
    reads=(rights("LDTR"),),
    given="If LDTR is usable: ",
)
SEGMENTS.rule(
    "cs.base-high",
    "Bits 63:32 of the base of CS must be 0",
    (base("CS"),),
    lambda s, c: not s[F.GUEST_CS_BASE] & HIGH_HALF,
    "give a base below 4 GBytes",
)


def high_base(register: str) -> None:
    """A usable SS, DS or ES has a base of 32 bits."""
    where, access = base(register), rights(register)
    SEGMENTS.rule(
        f"{register.lower()}.base-high",
        f"If {register} is usable, bits 63:32 of its base must be 0",
        (where, access),
        lambda s, c: not s[where] & HIGH_HALF or s[access] & UNUSABLE,
        "give a base below 4 GBytes",
    )


for _register in ("SS", "DS", "ES"):
    high_base(_register)

# --- Limit fields and access rights in virtual-8086 mode ------------------------------------------


def vm86_limit(register: str) -> None:
    """In virtual-8086 mode a limit is 64 KBytes."""
    where = limit(register)
    SEGMENTS.rule(
        f"{register.lower()}.limit-vm86",
        f"In virtual-8086 mode, the limit of {register} must be FFFFH",
        (where, FLAGS),
        lambda s, c: not s[FLAGS] & VM86 or s[where] == 0xFFFF,
        "set the limit to FFFFH",
    )


def vm86_rights(register: str) -> None:
    """In virtual-8086 mode a segment is read/write data, accessed, at privilege level 3."""
    where = rights(register)
    SEGMENTS.rule(
        f"{register.lower()}.rights-vm86",
        f"In virtual-8086 mode, the access rights of {register} must be 000000F3H",
        (where, FLAGS),
        lambda s, c: not s[FLAGS] & VM86 or s[where] == VM86_RIGHTS,
        "set the access rights to F3H",
    )


for _register in ALL:
    vm86_limit(_register)
for _register in ALL:
    vm86_rights(_register)

# --- Access rights outside virtual-8086 mode ------------------------------------------------------


def checked(s: State, access: F) -> bool:
    """Whether the rules outside virtual-8086 mode apply: CS always, others if usable."""
    return not s[FLAGS] & VM86 and (access is CS_RIGHTS or not s[access] & UNUSABLE)


def usable(register: str) -> str:
    """The premise of a rule outside virtual-8086 mode."""
    return "" if register == "CS" else f"If {register} is usable, "


def _cs_type(s: State, c: object) -> bool:
    if s[FLAGS] & VM86:
        return True
    kind = s[CS_RIGHTS] & 0xF
    return kind in (9, 11, 13, 15) or (kind == 3 and bool(UNRESTRICTED(s)))


SEGMENTS.rule(
    "cs.type",
    "The type of CS must be accessed code (9, 11, 13 or 15), or 3 (read/write accessed data) if "
    '"unrestricted guest" is 1',
    (CS_RIGHTS, FLAGS, *SECONDARY),
    _cs_type,
    "set bits 3:0 of the access rights to 11 (execute/read, accessed)",
)
SEGMENTS.rule(
    "ss.type",
    "If SS is usable, its type must be 3 or 7 (read/write, accessed data)",
    (SS_RIGHTS, FLAGS),
    lambda s, c: s[SS_RIGHTS] & 0xF in (3, 7) or not checked(s, SS_RIGHTS),
    "set bits 3:0 of the access rights to 3",
)


def data_type(register: str) -> None:
    """A data segment register is accessed, and readable if it holds code."""
    where = rights(register)
    SEGMENTS.rule(
        f"{register.lower()}.accessed",
        f"If {register} is usable, bit 0 of its type (accessed) must be 1",
        (where, FLAGS),
        lambda s, c: s[where] & 1 or not checked(s, where),
        "set bit 0 of the access rights",
    )
    SEGMENTS.rule(
        f"{register.lower()}.readable",
        f"If {register} is usable and a code segment (bit 3 of the type), bit 1 (readable) must "
        "be 1",
        (where, FLAGS),
        lambda s, c: s[where] & 0xA != 8 or not checked(s, where),
        "set bit 1 of the access rights, or load a data segment",
    )


for _register in DATA:
    data_type(_register)


def code_or_data(register: str) -> None:
    """S is 1."""
    where = rights(register)
    SEGMENTS.rule(
        f"{register.lower()}.s",
        f"{usable(register)}S (bit 4) of the access rights of {register} must be 1",
        (where, FLAGS),
        lambda s, c: s[where] & S or not checked(s, where),
        "set bit 4 of the access rights",
    )


for _register in ALL:
    code_or_data(_register)


def _dpl(value: int) -> int:
    return value >> 5 & 3


SEGMENTS.rule(
    "cs.dpl-data",
    "If the type of CS is 3, its DPL must be 0",
    (CS_RIGHTS, FLAGS),
    lambda s, c: s[CS_RIGHTS] & 0xF != 3 or not _dpl(s[CS_RIGHTS]) or s[FLAGS] & VM86,
    "clear bits 6:5 of the access rights",
)
SEGMENTS.rule(
    "cs.dpl",
    "If CS is a non-conforming code segment (type 9 or 11), its DPL must equal the DPL of SS",
    (CS_RIGHTS, SS_RIGHTS, FLAGS),
    lambda s, c: (
        s[CS_RIGHTS] & 0xF not in (9, 11)
        or not (s[CS_RIGHTS] ^ s[SS_RIGHTS]) & 0x60
        or s[FLAGS] & VM86
    ),
    "set bits 6:5 of both access rights to the guest's CPL",
)
SEGMENTS.rule(
    "cs.dpl-conforming",
    "If CS is a conforming code segment (type 13 or 15), its DPL must not be greater than the "
    "DPL of SS",
    (CS_RIGHTS, SS_RIGHTS, FLAGS),
    lambda s, c: (
        s[CS_RIGHTS] & 0xF not in (13, 15)
        or _dpl(s[CS_RIGHTS]) <= _dpl(s[SS_RIGHTS])
        or s[FLAGS] & VM86
    ),
    "lower the DPL of CS",
)
SEGMENTS.rule(
    "ss.dpl",
    'Unless "unrestricted guest" is 1, the DPL of SS must equal its RPL',
    (SS_RIGHTS, selector("SS"), FLAGS, *SECONDARY),
    lambda s, c: (
        _dpl(s[SS_RIGHTS]) == s[F.GUEST_SS_SELECTOR] & 3 or s[FLAGS] & VM86 or UNRESTRICTED(s)
    ),
    "set bits 6:5 of the access rights to bits 1:0 of the selector, even if SS is unusable",
)
SEGMENTS.rule(
    "ss.dpl-zero",
    "The DPL of SS must be 0 if the type of CS is 3 or CR0.PE is 0",
    (SS_RIGHTS, CS_RIGHTS, F.GUEST_CR0, FLAGS),
    lambda s, c: (
        not s[SS_RIGHTS] & 0x60
        or (s[CS_RIGHTS] & 0xF != 3 and s[F.GUEST_CR0] & 1)
        or s[FLAGS] & VM86
    ),
    "clear bits 6:5 of the access rights of SS",
)
FRED_READS = (F.GUEST_CR4, F.ENTRY_CONTROLS)
CR4_FRED = Cr4.fred
IA32E = Entry.ia32e_mode_guest


def fred(s: State) -> bool:
    """Whether the guest will use FRED transitions."""
    return bool(s[F.GUEST_CR4] & CR4_FRED and s[F.ENTRY_CONTROLS] & IA32E)


SEGMENTS.rule(
    "ss.dpl-fred",
    'If the guest will use FRED transitions (CR4.FRED is 1 and "IA-32e mode guest" is 1), the '
    "DPL of SS must be 0 or 3",
    (SS_RIGHTS, *FRED_READS),
    lambda s, c: _dpl(s[SS_RIGHTS]) in (0, 3) or not fred(s),
    "FRED has no privilege levels 1 and 2",
)
SEGMENTS.rule(
    "cs.l-fred",
    "If the guest will use FRED transitions and the DPL of SS is 0, CS.L must be 1",
    (CS_RIGHTS, SS_RIGHTS, *FRED_READS),
    lambda s, c: s[CS_RIGHTS] & Rights.long_mode or _dpl(s[SS_RIGHTS]) or not fred(s),
    "set bit 13 of the access rights: FRED has no compatibility mode at privilege level 0",
)


def data_dpl(register: str) -> None:
    """The DPL of a data segment register is not less than its RPL."""
    where, what = rights(register), selector(register)
    SEGMENTS.rule(
        f"{register.lower()}.dpl",
        f'Unless "unrestricted guest" is 1, if {register} is usable and its type is 0 to 11, its '
        "DPL must not be less than its RPL",
        (where, what, FLAGS, *SECONDARY),
        lambda s, c: (
            _dpl(s[where]) >= s[what] & 3
            or s[where] & 0xF > 11
            or not checked(s, where)
            or UNRESTRICTED(s)
        ),
        "raise the DPL (bits 6:5 of the access rights) or lower the selector's RPL",
    )


for _register in DATA:
    data_dpl(_register)


def present_and_reserved(register: str) -> None:
    """P is 1 and the reserved bits are 0."""
    where, name = rights(register), register.lower()
    SEGMENTS.rule(
        f"{name}.present",
        f"{usable(register)}P (bit 7) of the access rights of {register} must be 1",
        (where, FLAGS),
        lambda s, c: s[where] & PRESENT or not checked(s, where),
        "set bit 7, or bit 16 if the register holds no segment",
    )
    SEGMENTS.rule(
        f"{name}.reserved-low",
        f"{usable(register)}bits 11:8 of the access rights of {register} must be 0",
        (where, FLAGS),
        lambda s, c: not s[where] & RESERVED_LOW or not checked(s, where),
        "shift the descriptor's high doubleword right by 8 and clear bits 11:8, which are limit "
        "bits there",
    )
    SEGMENTS.rule(
        f"{name}.reserved-high",
        f"{usable(register)}bits 31:17 of the access rights of {register} must be 0",
        (where, FLAGS),
        lambda s, c: not s[where] & RESERVED_HIGH or not checked(s, where),
        "clear them",
    )


for _register in ALL:
    present_and_reserved(_register)
SEGMENTS.rule(
    "cs.d",
    'If the "IA-32e mode guest" VM-entry control is 1 and CS.L is 1, CS.D/B must be 0',
    (CS_RIGHTS, F.ENTRY_CONTROLS, FLAGS),
    lambda s, c: (
        s[CS_RIGHTS] & 0x6000 != 0x6000
        or not s[F.ENTRY_CONTROLS] & Entry.ia32e_mode_guest
        or s[FLAGS] & VM86
    ),
    "clear bit 14 of the access rights",
)


def granularity(register: str) -> None:
    """A limit that needs pages has G set, one that needs bytes has it clear."""
    size, where, name = limit(register), rights(register), register.lower()
    SEGMENTS.rule(
        f"{name}.granularity-byte",
        f"{usable(register)}G (bit 15) of {register} must be 0 if any of bits 11:0 of the limit "
        "is 0",
        (where, size, FLAGS),
        lambda s, c: (
            s[size] & 0xFFF == 0xFFF or not s[where] & Rights.granularity or not checked(s, where)
        ),
        "store the limit in bytes: (limit << 12) | FFFH where G is 1",
    )
    SEGMENTS.rule(
        f"{name}.granularity-page",
        f"{usable(register)}G (bit 15) of {register} must be 1 if any of bits 31:20 of the limit "
        "is 1",
        (where, size, FLAGS),
        lambda s, c: (
            not s[size] & 0xFFF0_0000 or s[where] & Rights.granularity or not checked(s, where)
        ),
        "set bit 15 of the access rights, or give a limit below 1 MByte",
    )


for _register in ALL:
    granularity(_register)

# --- TR and LDTR ----------------------------------------------------------------------------------

TR_RIGHTS, LDTR_RIGHTS = rights("TR"), rights("LDTR")
SEGMENTS.rule(
    "tr.type",
    "The type of TR must be 11 (busy TSS), or outside IA-32e mode 3 (busy 16-bit TSS)",
    (TR_RIGHTS, F.ENTRY_CONTROLS),
    lambda s, c: (
        s[TR_RIGHTS] & 0xF == 11
        or (s[TR_RIGHTS] & 0xF == 3 and not s[F.ENTRY_CONTROLS] & Entry.ia32e_mode_guest)
    ),
    "set bits 3:0 of the access rights to 11: a TSS in TR is busy",
)
SEGMENTS.rule(
    "ldtr.type",
    "If LDTR is usable, its type must be 2 (LDT)",
    (LDTR_RIGHTS,),
    lambda s, c: s[LDTR_RIGHTS] & 0xF == 2 or s[LDTR_RIGHTS] & UNUSABLE,
    "set bits 3:0 of the access rights to 2, or bit 16 (unusable)",
)


def system_segment(register: str, optional: bool) -> None:
    """The rules that TR and LDTR share; LDTR may be unusable."""
    where, size, name = rights(register), limit(register), register.lower()
    premise = f"If {register} is usable, " if optional else ""
    exempt = UNUSABLE if optional else 0
    for suffix, text, holds, remedy in (
        (
            "s",
            f"S (bit 4) of the access rights of {register} must be 0",
            lambda s, c: not s[where] & S or s[where] & exempt,
            "clear bit 4 of the access rights",
        ),
        (
            "present",
            f"P (bit 7) of the access rights of {register} must be 1",
            lambda s, c: s[where] & PRESENT or s[where] & exempt,
            "set bit 7 of the access rights",
        ),
        (
            "reserved-low",
            f"bits 11:8 of the access rights of {register} must be 0",
            lambda s, c: not s[where] & RESERVED_LOW or s[where] & exempt,
            "clear them",
        ),
        (
            "reserved-high",
            f"bits 31:17 of the access rights of {register} must be 0",
            lambda s, c: not s[where] & RESERVED_HIGH or s[where] & exempt,
            "clear them",
        ),
    ):
        SEGMENTS.rule(f"{name}.{suffix}", premise + text, (where,), holds, remedy)
    SEGMENTS.rule(
        f"{name}.granularity-byte",
        f"{premise}G (bit 15) of {register} must be 0 if any of bits 11:0 of the limit is 0",
        (where, size),
        lambda s, c: (
            s[size] & 0xFFF == 0xFFF or not s[where] & Rights.granularity or s[where] & exempt
        ),
        "clear bit 15 of the access rights",
    )
    SEGMENTS.rule(
        f"{name}.granularity-page",
        f"{premise}G (bit 15) of {register} must be 1 if any of bits 31:20 of the limit is 1",
        (where, size),
        lambda s, c: (
            not s[size] & 0xFFF0_0000 or s[where] & Rights.granularity or s[where] & exempt
        ),
        "give a limit below 1 MByte",
    )


system_segment("TR", optional=False)
SEGMENTS.rule(
    "tr.usable",
    "TR must be usable (bit 16 of its access rights is 0)",
    (TR_RIGHTS,),
    lambda s, c: not s[TR_RIGHTS] & UNUSABLE,
    "clear bit 16, and give TR a busy TSS (access rights 8BH) even if the guest uses none",
)
system_segment("LDTR", optional=True)

RULES = tuple(SEGMENTS.rules)
"""All checks on guest segment registers, in the manual's order."""
