"""Extended page tables: layouts, the rules of misconfiguration, and the walk.

SDM, chapter "VMX Support for Address Translation", section "The Extended Page Table Mechanism
(EPT)".  An EPT entry is an `int`; the layouts below are for showing it, the masks are for walking.

    translation = walk(read_u64, eptp, gpa, Access.WRITE, rules)
    match translation:
        case Translation(): ...      # an address, its permissions and the size of its page
        case EptViolation(): ...     # with the access bits of the exit qualification
        case EptMisconfiguration(): ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from undervisor.arch.bits import Bits, Register
from undervisor.arch.vmx.capabilities import EptVpidCapability, VmxCapabilities

ADDRESS = 0x000F_FFFF_FFFF_F000
"""Bits 51:12, which hold the physical address in an entry that references a table."""

READ, WRITE, EXECUTE = 1, 2, 4
PERMISSIONS = READ | WRITE | EXECUTE
MEMORY_TYPE_SHIFT = 3
IGNORE_PAT = 1 << 6
LARGE = 1 << 7
ACCESSED = 1 << 8
DIRTY = 1 << 9
USER_EXECUTE = 1 << 10
VERIFY_GUEST_PAGING = 1 << 57
PAGING_WRITE = 1 << 58
SUPERVISOR_SHADOW_STACK = 1 << 60
SUB_PAGE_PERMISSIONS = 1 << 61
SUPPRESS_VE = 1 << 63

LEVELS = 5
LEVEL_SHIFT = 9
PAGE_SHIFT = 12
VALID_MEMORY_TYPES = 0b0111_0011
"""Bit n set: n is the encoding of a memory type (UC 0, WC 1, WT 4, WP 5, WB 6)."""


class EptMemoryType(IntEnum):
    """Memory types in EPT leaf entries (and, UC and WB only, in an EPTP)."""

    UC = 0
    WC = 1
    WT = 4
    WP = 5
    WB = 6


class Eptp(Register):
    """Extended-page-table pointer."""

    memory_type = Bits(2, 0, "Memory type of the EPT paging structures")
    walk_length = Bits(5, 3, "Page-walk length minus 1")
    accessed_dirty = Bits(6, about="Enable accessed and dirty flags")
    supervisor_shadow_stack = Bits(7, about="Enforce access rights for supervisor shadow stacks")
    address = Bits(51, 12, "Bits 51:12 of the address of the top table")


class EptTableEntry(Register):
    """An EPT PML5E, PML4E, or a PDPTE or PDE that references a table."""

    read = Bits(0, about="Read access")
    write = Bits(1, about="Write access")
    execute = Bits(2, about="Execute access (for supervisor-mode addresses)")
    accessed = Bits(8, about="Accessed")
    user_execute = Bits(10, about="Execute access for user-mode addresses")
    address = Bits(51, 12, "Bits 51:12 of the address of the next table")


class EptLeafEntry(Register):
    """An EPT PTE, or a PDE or PDPTE that maps a page."""

    read = Bits(0, about="Read access")
    write = Bits(1, about="Write access")
    execute = Bits(2, about="Execute access (for supervisor-mode addresses)")
    memory_type = Bits(5, 3, "EPT memory type")
    ignore_pat = Bits(6, about="Ignore PAT")
    large = Bits(7, about="1 in a PDPTE or PDE that maps a page; ignored in a PTE")
    accessed = Bits(8, about="Accessed")
    dirty = Bits(9, about="Dirty")
    user_execute = Bits(10, about="Execute access for user-mode addresses")
    address = Bits(51, 12, "Bits 51:12 of the page's address; low ones reserved for a large page")
    verify_guest_paging = Bits(57, about="Verify guest paging")
    paging_write = Bits(58, about="Paging-write access")
    supervisor_shadow_stack = Bits(60, about="Supervisor shadow stack")
    sub_page_permissions = Bits(61, about="Sub-page write permissions")
    suppress_ve = Bits(63, about="Suppress #VE")


class Access(IntFlag):
    """What an access does; the values are bits 2:0 of the exit qualification."""

    READ = 1
    WRITE = 2
    EXECUTE = 4


class Misconfiguration(IntEnum):
    """Why an entry is misconfigured ("EPT Misconfigurations")."""

    WRITE_WITHOUT_READ = 1
    EXECUTE_ONLY_NOT_SUPPORTED = 2
    RESERVED_BIT = 3
    MEMORY_TYPE = 4


@dataclass(frozen=True, slots=True)
class EptRules:
    """What decides whether an entry is misconfigured, computed once per processor and VMCS.

    `tables` and `leaves`, indexed by level (1 is a PTE, 5 a PML5E), are the bits that must be 0
    in a present entry that references a table, and in one that maps a page.
    """

    tables: tuple[int, ...]
    leaves: tuple[int, ...]
    execute_only: bool
    mode_based_execute: bool = False

    @classmethod
    def of(cls, capabilities: VmxCapabilities, *, mode_based_execute: bool = False) -> EptRules:
        """The rules of a processor, for a VMCS with or without mode-based execute control."""
        ept: EptVpidCapability = capabilities.ept_vpid
        width = capabilities.processor.physical_address_width
        beyond = ADDRESS & ~((1 << width) - 1)
        largest_leaf = 3 if ept.page_1g else 2 if ept.page_2m else 1
        return cls(
            tables=tuple(beyond | 0x78 for _ in range(LEVELS + 1)),
            leaves=tuple(
                beyond | (_low_address(level) if level <= largest_leaf else LARGE | 0x78)
                for level in range(LEVELS + 1)
            ),
            execute_only=bool(ept.execute_only),
            mode_based_execute=mode_based_execute,
        )


def _low_address(level: int) -> int:
    """The address bits that a page at `level` has no use for: 20:12 of a 2-MByte page."""
    return (1 << PAGE_SHIFT + LEVEL_SHIFT * max(level - 1, 0)) - 1 & ADDRESS


@dataclass(frozen=True, slots=True)
class EntryUpdate:
    """An accessed or dirty flag that the access sets: write `value` at `address`."""

    address: int
    value: int


@dataclass(frozen=True, slots=True)
class Translation:
    """A translated address.

    `permissions`: the AND over all entries used, as `Access` bits plus USER_EXECUTE.
    `page_shift`: 12, 21 or 30.  `entry`: the leaf.  `updates`: flags to set, top level first.
    """

    hpa: int
    permissions: int
    page_shift: int
    entry: int
    updates: tuple[EntryUpdate, ...] = ()

    @property
    def memory_type(self) -> int:
        """The leaf's EPT memory type."""
        return self.entry >> MEMORY_TYPE_SHIFT & 7


@dataclass(frozen=True, slots=True)
class EptViolation:
    """The access is not allowed.

    `qualification`: bits 2:0 the access, 6:3 the permissions of the entries used.  The caller
    adds what it knows of the linear address (bits 7 and up).  `level` is where the walk ended.
    """

    gpa: int
    qualification: int
    level: int


@dataclass(frozen=True, slots=True)
class EptMisconfiguration:
    """An entry holds a setting that is reserved; no qualification exists for this exit."""

    gpa: int
    entry: int
    level: int
    reason: Misconfiguration


WalkResult = Translation | EptViolation | EptMisconfiguration


def misconfiguration(entry: int, level: int, rules: EptRules) -> Misconfiguration | None:
    """Why a present `entry` at `level` (1 is a PTE, 5 a PML5E) is misconfigured, or None."""
    if entry & (READ | WRITE) == WRITE:
        return Misconfiguration.WRITE_WITHOUT_READ
    executes = EXECUTE | USER_EXECUTE if rules.mode_based_execute else EXECUTE
    if entry & executes and not entry & READ and not rules.execute_only:
        return Misconfiguration.EXECUTE_ONLY_NOT_SUPPORTED
    leaf = level == 1 or bool(entry & LARGE)
    if entry & (rules.leaves if leaf else rules.tables)[level]:
        return Misconfiguration.RESERVED_BIT
    if leaf and not VALID_MEMORY_TYPES >> (entry >> MEMORY_TYPE_SHIFT & 7) & 1:
        return Misconfiguration.MEMORY_TYPE
    return None


def walk(
    read_u64: Callable[[int], int],
    eptp: int,
    gpa: int,
    access: int,
    rules: EptRules,
    *,
    user: bool = False,
) -> WalkResult:
    """Translate `gpa` for `access` (`Access` bits) through the tables at `eptp`.

    `read_u64` reads an entry at a physical address.  `user` matters only for fetches under
    mode-based execute control: whether the linear address is a user-mode one.  Nothing is
    written: accessed and dirty flags come back as updates.
    """
    level = (eptp >> 3 & 7) + 1
    track = eptp & 0x40
    present = PERMISSIONS | USER_EXECUTE if rules.mode_based_execute else PERMISSIONS
    permissions = PERMISSIONS | USER_EXECUTE
    table = eptp & ADDRESS
    updates: list[EntryUpdate] = []
    while True:
        shift = PAGE_SHIFT + LEVEL_SHIFT * (level - 1)
        address = table | (gpa >> shift & 0x1FF) << 3
        entry = read_u64(address)
        if not entry & present:
            return EptViolation(gpa, access & PERMISSIONS, level)
        leaf = level == 1 or entry & LARGE
        # The usual entry is readable, with no reserved bit; only others are looked at closely.
        reserved = rules.leaves[level] if leaf else rules.tables[level]
        if leaf or not entry & READ or entry & reserved:
            reason = misconfiguration(entry, level, rules)
            if reason is not None:
                return EptMisconfiguration(gpa, entry, level, reason)
        permissions &= entry
        if leaf:
            break
        if track and not entry & ACCESSED:
            updates.append(EntryUpdate(address, entry | ACCESSED))
        table = entry & ADDRESS
        level -= 1
    if not _allowed(access, permissions, user_fetch=user and rules.mode_based_execute):
        return EptViolation(gpa, _qualification(access, permissions, rules), level)
    if track:
        used = entry | ACCESSED | (DIRTY if access & WRITE else 0)
        if used != entry:
            updates.append(EntryUpdate(address, used))
    offset = (1 << shift) - 1
    hpa = entry & ADDRESS & ~offset | gpa & offset
    return Translation(hpa, permissions, shift, entry, tuple(updates))


def _allowed(access: int, permissions: int, *, user_fetch: bool) -> bool:
    if user_fetch and access & EXECUTE:
        needed = access & ~EXECUTE & PERMISSIONS | USER_EXECUTE
    else:
        needed = access & PERMISSIONS
    return permissions & needed == needed


def _qualification(access: int, permissions: int, rules: EptRules) -> int:
    """Bits 6:0 of the exit qualification for a violation."""
    value = access & PERMISSIONS | (permissions & PERMISSIONS) << 3
    if rules.mode_based_execute and permissions & USER_EXECUTE:
        value |= 1 << 6
    return value
