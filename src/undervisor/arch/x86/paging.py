"""Paging: addresses, entries, and the walk of a guest's page tables in every mode.

The walk is pure: it reads entries through a callable and returns a `Translation` or a
`PageFault`, and never writes; `accessed_dirty_updates` says what the processor would write.
It decodes instructions at exits, on the hot path: masks and named tuples, no registers.
SDM 3A "Paging"; APM 2 "Page Translation and Protection".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Final, NamedTuple, NewType

from undervisor.arch.bits import Bits, Register
from undervisor.arch.x86.events import Fault, Vector
from undervisor.arch.x86.registers import CR3_PAE_ROOT, Cr0, Cr4, Efer

Gva = NewType("Gva", int)
Gpa = NewType("Gpa", int)
Hpa = NewType("Hpa", int)

ReadU64 = Callable[[int], int]
"""Reads the 8-byte aligned, little-endian quadword at a guest-physical address."""

PAGE: Final = 0x1000
PDPTE_RESERVED: Final = 0x1E6
"""Bits 2:1 and 8:5 of a PDPTE of PAE paging."""


class Entry(Register):
    """A paging-structure entry of PAE, 4-level or 5-level paging; any level, any kind."""

    p = Bits(0, about="present")
    rw = Bits(1, about="writable")
    us = Bits(2, about="user")
    pwt = Bits(3, about="page-level write-through")
    pcd = Bits(4, about="page-level cache disable")
    a = Bits(5, about="accessed")
    d = Bits(6, about="dirty, in a leaf")
    ps = Bits(7, about="page size above level 1; PAT in a level-1 entry")
    g = Bits(8, about="global, in a leaf")
    avl = Bits(11, 9, about="available to software")
    address = Bits(51, 12, about="physical page number; large pages use fewer bits")
    avl_high = Bits(58, 52, about="available to software")
    pk = Bits(62, 59, about="protection key, in a leaf")
    xd = Bits(63, about="execute disable")


class PageFaultCode(Register):
    """The error code of a page fault. SDM 3A "Page-Fault Exceptions"."""

    WIDTH = 32

    p = Bits(0, about="a protection violation, not a page that is not present")
    wr = Bits(1, about="the access was a write")
    us = Bits(2, about="the access was a user-mode access")
    rsvd = Bits(3, about="a reserved bit was set in an entry")
    id = Bits(4, about="the access was an instruction fetch")
    pk = Bits(5, about="a protection key refused the access")
    ss = Bits(6, about="the access was a shadow-stack access")
    hlat = Bits(7, about="during HLAT paging")
    sgx = Bits(15, about="an SGX access-control violation")
    rmp = Bits(31, about="AMD: a violation of the reverse map table")


# The access of a walk is made of these; they are the bits of the error code.
READ: Final = 0
WRITE: Final = PageFaultCode.wr
USER: Final = PageFaultCode.us
FETCH: Final = PageFaultCode.id


class PagingMode(Enum):
    """SDM 3A "Paging Modes and Control Bits"."""

    NONE = "no paging"
    LEGACY = "32-bit paging"
    PAE = "PAE paging"
    LEVEL4 = "4-level paging"
    LEVEL5 = "5-level paging"


class Level(NamedTuple):
    """One step of a walk: what the linear address and the entry mean there."""

    shift: int
    """The linear address's bits above this, modulo the table's size, index the table."""
    may_map: bool
    """Whether an entry with PS set maps a page of `1 << shift` bytes here."""
    reserved_table: int
    """Bits that must be 0 in an entry that points to a table."""
    reserved_leaf: int
    """Bits that must be 0 in an entry that maps a page here."""


@dataclass(frozen=True, slots=True)
class PagingRules:
    """How the control registers say that linear addresses are translated."""

    mode: PagingMode
    levels: tuple[Level, ...]
    entry_size: int
    table_mask: int
    """The address bits of an entry that points to a table."""
    pdpte_reserved: int
    """Bits that must be 0 in a PDPTE of PAE paging that is read during the walk."""
    write_protect: bool
    no_execute: bool
    smep: bool
    smap: bool
    fetch_reported: bool
    """Whether a page fault's error code can have the I/D bit."""
    user_keys: bool
    supervisor_keys: bool


class Translation(NamedTuple):
    """A successful walk."""

    gpa: int
    page_shift: int
    """The page is `1 << page_shift` bytes: 12, 21, 22 or 30 (32 bits: no paging)."""
    writable: bool
    """R/W in every entry."""
    user: bool
    """U/S in every entry."""
    executable: bool
    """XD in no entry."""
    steps: tuple[tuple[int, int], ...]
    """The address and value of the quadword of each entry used, root first; no PAE PDPTE."""
    upper_halves: int = 0
    """32-bit paging: bit n is set where step n's entry is the upper half of its quadword."""


class PageFault(NamedTuple):
    """A failed walk: what the page fault delivers."""

    error_code: int
    gva: int

    def fault(self) -> Fault:
        """The #PF, with the linear address for CR2."""
        return Fault(Vector.PF, self.error_code, self.gva)


Walk = Translation | PageFault


def physical_reserved(physical_width: int) -> int:
    """The bits of a 64-bit physical address above MAXPHYADDR."""
    return (1 << 64) - (1 << physical_width)


def fits_physical(address: int, physical_width: int) -> bool:
    """Whether a physical address has no bit above MAXPHYADDR."""
    return not address >> physical_width


def is_canonical(address: int, width: int = 48) -> bool:
    """Whether bits 63 down to `width - 1` of a 64-bit linear address are all equal."""
    top = address >> (width - 1)
    return top == 0 or top == (1 << (65 - width)) - 1


def linear_width(cr4: int) -> int:
    """How many bits of a linear address are translated in 64-bit mode: 48 or 57."""
    return 57 if cr4 & Cr4.la57 else 48


def sign_extend(address: int, width: int = 48) -> int:
    """The canonical 64-bit address with the same low `width` bits."""
    low = address & ((1 << width) - 1)
    return low | (0xFFFF_FFFF_FFFF_FFFF ^ ((1 << width) - 1)) if low >> (width - 1) else low


def _long_levels(top: int, high: int, page1gb: bool, amd: bool) -> tuple[Level, ...]:
    """The levels below `top` of PAE, 4- and 5-level paging; `high` is reserved in all entries."""
    # AMD reserves bit 8, where a leaf has G, in the tables' entries of the upper levels.
    upper = high | (Entry.g if amd else 0)
    rows = (
        Level(48, False, upper | Entry.ps, 0),
        Level(39, False, upper | Entry.ps, 0),
        Level(30, page1gb, upper if page1gb else upper | Entry.ps, high | 0x3FFF_E000),
        Level(21, True, high, high | 0x1F_E000),
        Level(12, True, 0, high),
    )
    return tuple(level for level in rows if level.shift < top)


def _legacy_levels(pse: bool, physical_width: int) -> tuple[Level, ...]:
    """The levels of 32-bit paging; with PSE-36, PDE bits 20:13 are address bits 39:32."""
    high_bits = min(physical_width, 40) - 32
    usable = ((1 << high_bits) - 1) << 13 if high_bits > 0 else 0
    return (Level(22, pse, 0, 0x3F_E000 & ~usable), Level(12, True, 0, 0))


@lru_cache(maxsize=256)
def paging_rules(
    cr0: int,
    cr4: int,
    efer: int,
    physical_width: int = 48,
    page1gb: bool = True,
    amd: bool = False,
) -> PagingRules:
    """The rules under these control registers; `physical_width` is MAXPHYADDR.

    `page1gb`: the processor has 1-GiB pages.  `amd`: bit 8 of the upper levels' entries that point
    to tables is reserved (APM 2 "Long-Mode Page Translation").
    """
    long_mode = bool(efer & Efer.lma)
    nxe = bool(efer & Efer.nxe) and bool(cr4 & Cr4.pae)
    high = physical_reserved(physical_width)
    high &= 0x000F_FFFF_FFFF_FFFF if long_mode else 0x7FFF_FFFF_FFFF_FFFF
    high |= 0 if nxe else Entry.xd
    no_levels: tuple[Level, ...] = ()
    if not cr0 & Cr0.pg:
        mode, levels = PagingMode.NONE, no_levels
    elif not cr4 & Cr4.pae:
        mode, levels = PagingMode.LEGACY, _legacy_levels(bool(cr4 & Cr4.pse), physical_width)
    elif not long_mode:
        mode, levels = PagingMode.PAE, _long_levels(30, high, page1gb, amd)
    elif cr4 & Cr4.la57:
        mode, levels = PagingMode.LEVEL5, _long_levels(57, high, page1gb, amd)
    else:
        mode, levels = PagingMode.LEVEL4, _long_levels(48, high, page1gb, amd)
    legacy = mode is PagingMode.LEGACY
    return PagingRules(
        mode=mode,
        levels=levels,
        entry_size=4 if legacy else 8,
        table_mask=0xFFFF_F000 if legacy else Entry.address,
        pdpte_reserved=physical_reserved(physical_width) | PDPTE_RESERVED,
        write_protect=bool(cr0 & Cr0.wp),
        no_execute=nxe,
        smep=bool(cr4 & Cr4.smep),
        smap=bool(cr4 & Cr4.smap),
        fetch_reported=nxe or bool(cr4 & Cr4.smep),
        user_keys=long_mode and bool(cr4 & Cr4.pke),
        supervisor_keys=long_mode and bool(cr4 & Cr4.pks),
    )


def walk(
    rules: PagingRules,
    cr3: int,
    gva: int,
    access: int,
    read_u64: ReadU64,
    *,
    ac: bool = True,
    pkru: int = 0,
    pkrs: int = 0,
    pdptes: Sequence[int] | None = None,
) -> Walk:
    """Translate the canonical linear address `gva` for `access` (`READ`, `WRITE`, `USER`, `FETCH`).

    `ac` is EFLAGS.AC for an explicit supervisor access (False for an implicit one): it lifts
    SMAP.  `pdptes` are the four PDPTE registers of PAE paging; when None the entry is read from
    memory and checked during the walk, as AMD does under nested paging.
    """
    mode = rules.mode
    if mode is PagingMode.NONE:
        return Translation(gva & 0xFFFF_FFFF, 32, True, True, True, ())
    table = cr3 & rules.table_mask
    if mode is PagingMode.PAE:
        index = gva >> 30 & 3
        root = read_u64((cr3 & CR3_PAE_ROOT) + index * 8) if pdptes is None else pdptes[index]
        if not root & 1:
            return _page_fault(rules, gva, access, 0)
        if pdptes is None and root & rules.pdpte_reserved:
            return _page_fault(rules, gva, access, PageFaultCode.p | PageFaultCode.rsvd)
        table = root & Entry.address
    return _descend(rules, table, gva, access, read_u64, ac, pkru, pkrs)


def _descend(
    rules: PagingRules,
    table: int,
    gva: int,
    access: int,
    read_u64: ReadU64,
    ac: bool,
    pkru: int,
    pkrs: int,
) -> Walk:
    """Walk from the root `table` down to the entry that maps the page."""
    wide = rules.entry_size == 8
    table_mask = rules.table_mask
    rights, disabled, upper_halves = 6, 0, 0
    steps: list[tuple[int, int]] = []
    for shift, may_map, reserved_table, reserved_leaf in rules.levels:
        if wide:
            address = table | (gva >> (shift - 3) & 0xFF8)
            entry = quadword = read_u64(address)
        else:
            address = table | (gva >> (shift - 2) & 0xFF8)
            quadword = read_u64(address)
            upper = gva >> shift & 1
            entry = quadword >> upper * 32 & 0xFFFF_FFFF
            upper_halves |= upper << len(steps)
        if not entry & 1:
            return _page_fault(rules, gva, access, 0)
        leaf = shift == 12 or (may_map and entry & 0x80)
        if entry & (reserved_leaf if leaf else reserved_table):
            return _page_fault(rules, gva, access, PageFaultCode.p | PageFaultCode.rsvd)
        rights &= entry
        disabled |= entry
        steps.append((address, quadword))
        if leaf:
            break
        table = entry & table_mask
    executable = not (wide and disabled >> 63)
    refused = _refusal(rules, rights, executable, entry, access, ac, pkru, pkrs)
    if refused:
        return _page_fault(rules, gva, access, refused)
    base = entry & Entry.address if wide else _legacy_base(entry, shift)
    offset = (1 << shift) - 1
    return Translation(
        base & ~offset | gva & offset,
        shift,
        bool(rights & 2),
        bool(rights & 4),
        executable,
        tuple(steps),
        upper_halves,
    )


def _legacy_base(entry: int, shift: int) -> int:
    """The address in a leaf of 32-bit paging, with PSE-36's high bits for a 4-MiB page."""
    if shift == 12:
        return entry & 0xFFFF_F000
    return entry & 0xFFC0_0000 | (entry & 0x1F_E000) << 19


def _refusal(
    rules: PagingRules,
    rights: int,
    executable: bool,
    leaf: int,
    access: int,
    ac: bool,
    pkru: int,
    pkrs: int,
) -> int:
    """The error-code bits of a protection violation, 0 where the access is allowed.

    SDM 3A "Determination of Access Rights".
    """
    user_page, user = rights & 4, access & USER
    if user:
        if not user_page or (access & WRITE and not rights & 2):
            return PageFaultCode.p
    else:
        if access & WRITE and not rights & 2 and rules.write_protect:
            return PageFaultCode.p
        if user_page and (rules.smep if access & FETCH else rules.smap and not ac):
            return PageFaultCode.p
    if access & FETCH:
        return 0 if executable else PageFaultCode.p
    if rules.user_keys if user_page else rules.supervisor_keys:
        deny = (pkru if user_page else pkrs) >> (leaf >> 59 & 0xF) * 2
        if deny & 1 or (deny & 2 and access & WRITE and (user or rules.write_protect)):
            return PageFaultCode.p | PageFaultCode.pk
    return 0


def _page_fault(rules: PagingRules, gva: int, access: int, code: int) -> PageFault:
    """The fault with the bits that describe the access."""
    return PageFault(code | (access if rules.fetch_reported else access & ~FETCH), gva)


def accessed_dirty_updates(translation: Translation, access: int) -> list[tuple[int, int]]:
    """The quadwords that the processor would rewrite for this access: address and new value.

    SDM 3A "Accessed and Dirty Flags": A in every entry used, D in the leaf of a write.
    """
    steps = translation.steps
    leaf = len(steps) - 1
    updates: dict[int, int] = {}
    for i, (address, old) in enumerate(steps):
        flags = Entry.a | Entry.d if i == leaf and access & WRITE else Entry.a
        # One quadword can hold two of the entries, where tables map themselves.
        old = updates.get(address, old)
        new = old | flags << (translation.upper_halves >> i & 1) * 32
        if new != old:
            updates[address] = new
    return list(updates.items())


def check_pdptes(pdptes: Sequence[int], physical_width: int) -> bool:
    """Whether the four PDPTEs may be loaded: no reserved bit in one that is present.

    SDM 3A "PDPTE Registers": bits 2:1, 8:5 and those above MAXPHYADDR are reserved.
    """
    reserved = physical_reserved(physical_width) | PDPTE_RESERVED
    return not any(pdpte & 1 and pdpte & reserved for pdpte in pdptes)
