"""Nested paging: from a guest-physical to a system-physical address, or a nested page fault.

The nested tables have the format of the host's own paging mode, and the walk is the same walk
with three differences: every access is a user access, host CR0.WP, SMEP, SMAP and protection keys
play no part, and a fault is #VMEXIT(NPF).  APM 2 "Nested Paging".
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final, NamedTuple

from undervisor.arch.svm.exits import NestedPageFaultInfo
from undervisor.arch.x86.paging import (
    FETCH,
    USER,
    WRITE,
    PagingMode,
    PagingRules,
    ReadU64,
    Translation,
    accessed_dirty_updates,
    paging_rules,
    walk,
)
from undervisor.arch.x86.registers import Cr0, Cr4, Efer


class Purpose(IntEnum):
    """Why an address is translated; its value is the bit that EXITINFO1 gets."""

    FINAL_ADDRESS = NestedPageFaultInfo.final_address
    GUEST_TABLES = NestedPageFaultInfo.guest_tables


class NestedPageFault(NamedTuple):
    """A failed nested walk: EXITINFO1 and EXITINFO2 of #VMEXIT(NPF)."""

    exit_info1: int
    gpa: int


NestedWalk = Translation | NestedPageFault

# Which of the host's control bits shape the nested tables.  SMEP refuses nothing, as all accesses
# are user accesses; but like NXE it makes faults tell fetches.
_CR4_BITS: Final = Cr4.pae | Cr4.pse | Cr4.la57 | Cr4.smep
_EFER_BITS: Final = Efer.lma | Efer.nxe

# The guest-physical addresses that the tables of a mode can translate.
_WIDTHS: Final = {
    PagingMode.LEGACY: 32,
    PagingMode.PAE: 32,
    PagingMode.LEVEL4: 48,
    PagingMode.LEVEL5: 57,
}


def nested_rules(
    host_cr4: int, host_efer: int, physical_width: int, page1gb: bool = True
) -> PagingRules:
    """The rules of a nested walk under a host that executed VMRUN with these registers."""
    return paging_rules(
        Cr0.pe | Cr0.pg,
        host_cr4 & _CR4_BITS,
        host_efer & _EFER_BITS,
        physical_width,
        page1gb,
        amd=True,
    )


def nested_walk(
    rules: PagingRules,
    n_cr3: int,
    gpa: int,
    access: int,
    read_u64: ReadU64,
    purpose: Purpose = Purpose.FINAL_ADDRESS,
) -> NestedWalk:
    """Translate the guest-physical address `gpa`; `Translation.gpa` is the system-physical one.

    `access` is `READ`, `WRITE` or `FETCH` for the final address.  Guest page tables are always
    walked with a data write, whatever the guest's access (see "Nested Table Walk").
    """
    if purpose is Purpose.GUEST_TABLES:
        access = WRITE
    access |= USER
    if gpa >> _WIDTHS[rules.mode]:
        # No entry can map it, and an entry that does not exist is not present.
        reported = access if rules.fetch_reported else access & ~FETCH
        return NestedPageFault(reported | purpose, gpa)
    result = walk(rules, n_cr3, gpa, access, read_u64)
    if isinstance(result, Translation):
        return result
    return NestedPageFault(result.error_code | purpose, gpa)


def nested_updates(
    translation: Translation, access: int, purpose: Purpose = Purpose.FINAL_ADDRESS
) -> list[tuple[int, int]]:
    """The nested entries that the processor would rewrite: address and value with A and D set."""
    if purpose is Purpose.GUEST_TABLES:
        access = WRITE
    return accessed_dirty_updates(translation, access)
