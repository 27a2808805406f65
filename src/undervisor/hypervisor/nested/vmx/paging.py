"""EPT02: the shadow of L1's EPT, filled at faults; EPT violations and misconfigurations.

A shadow belongs to an EPTP and lives until INVEPT, so that it caches what a processor may cache.
Dirty tracking, PML and pages that may be executed but not read decide how a page is entered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from undervisor.arch.vmx import ept
from undervisor.arch.vmx.controls import SecondaryControls
from undervisor.arch.vmx.ept import EptMisconfiguration, EptViolation, Translation
from undervisor.arch.vmx.exits import EptViolationQualification, ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86 import paging as guest_paging
from undervisor.hypervisor import access, decode
from undervisor.hypervisor.access import LinearAccess
from undervisor.hypervisor.exit import Exit
from undervisor.hypervisor.exits import memory
from undervisor.hypervisor.nested import GuestExit
from undervisor.hypervisor.nested.vmx import apic, exit
from undervisor.hypervisor.nested.vmx.state import Vmcs
from undervisor.hypervisor.nested_paging import (
    NO_EXECUTE,
    PRESENT,
    USER,
    WRITABLE,
    NestedTables,
)
from undervisor.hypervisor.verdict import RESUME, Verdict
from undervisor.silicon.memory import PAGE

if TYPE_CHECKING:
    from undervisor.hypervisor.nested.vmx import NestedVmx
    from undervisor.hypervisor.vcpu import Vcpu

MOST_SHADOWS: Final = 8
_SILICON_WRITE, _SILICON_FETCH = 2, 0x10
_PML_ENTRIES: Final = 512
TRACKS: Final = 0x40  # of the EPTP: accessed and dirty flags for EPT


def activate(vcpu: Vcpu, nested: NestedVmx, vmcs: Vmcs) -> None:
    """Give vmcb02 the nested tables of this VMCS: a shadow, or L1's own without EPT."""
    if not nested.secondary & SecondaryControls.enable_ept:
        nested.eptp, nested.shadow = None, None
        vcpu.vmcb02.n_cr3 = apic.tables_without_ept(vcpu, nested).root
        return
    eptp = vmcs.fields[F.EPT_POINTER]
    if nested.eptp != eptp or nested.shadow is None:
        nested.eptp, nested.shadow = eptp, shadow_for(vcpu, nested, eptp)
    vcpu.vmcb02.n_cr3 = nested.shadow.root


def shadow_for(vcpu: Vcpu, nested: NestedVmx, eptp: int) -> NestedTables:
    """The shadow of an EPTP, from the cache or new; the oldest one goes when there are many."""
    shadow = nested.shadows.pop(eptp, None)
    if shadow is None:
        if len(nested.shadows) >= MOST_SHADOWS:
            nested.shadows.pop(next(iter(nested.shadows))).release()
        shadow = NestedTables(vcpu.memory)
    nested.shadows[eptp] = shadow
    return shadow


def invalidate(nested: NestedVmx, eptp: int | None) -> None:
    """INVEPT: forget what was derived from the tables of `eptp`, or from all."""
    for other, shadow in nested.shadows.items():
        if eptp is None or (other ^ eptp) & ept.ADDRESS == 0:
            shadow.clear()


def release(nested: NestedVmx) -> None:
    """VMX operation ends: no shadow is needed."""
    for shadow in nested.shadows.values():
        shadow.release()
    nested.shadows.clear()
    nested.eptp, nested.shadow = None, None


# -- translation on behalf of L2 ----------------------------------------------------------------


def to_hpa(
    vcpu: Vcpu, nested: NestedVmx, gpa: int, *, write: bool = False, tables: bool = False
) -> int:
    """L2's guest-physical address in L1's; GuestExit where L1's EPT does not allow the access."""
    if nested.eptp is None:
        return gpa
    kind = ept.WRITE if write or (tables and nested.eptp & TRACKS) else ept.READ
    result = ept.walk(vcpu.memory.u64, nested.eptp, gpa, kind, nested.ept_rules)
    linear, vcpu.linear = vcpu.linear, None
    if not isinstance(result, Translation):
        found = None if linear is None else LinearAccess(linear, tables, gpa, 0)
        raise GuestExit(_leave(vcpu, nested, result, found))
    full = _log_dirty(vcpu, nested, result, gpa)
    if full is not None:
        raise GuestExit(full)
    vcpu.linear = linear
    _update_flags(vcpu, result)
    return result.hpa


def read_gpa(vcpu: Vcpu, nested: NestedVmx, gpa: int) -> int:
    """A quadword at L2's guest-physical address, all ones where nothing is mapped."""
    if nested.eptp is None:
        return vcpu.memory.u64(gpa)
    result = ept.walk(vcpu.memory.u64, nested.eptp, gpa, ept.READ, nested.ept_rules)
    return vcpu.memory.u64(result.hpa) if isinstance(result, Translation) else 0


def _update_flags(vcpu: Vcpu, translation: Translation) -> None:
    for update in translation.updates:
        vcpu.memory.set_u64(update.address, update.value)


# -- faults of the silicon ----------------------------------------------------------------------


def nested_page_fault(vcpu: Vcpu, nested: NestedVmx, event: Exit) -> Verdict | None:
    """The shadow lacks a translation: fill it, exit to L1, or let L0's devices answer."""
    if nested.eptp is None:
        return apic.access_without_ept(vcpu, nested, event)
    info, gpa = event.info1, event.info2
    kind = _access(info)
    result = ept.walk(vcpu.memory.u64, nested.eptp, gpa, kind, nested.ept_rules)
    if not isinstance(result, Translation):
        found = access.find(vcpu, gpa, event, nested)
        if found is not None and found.in_walk and not nested.eptp & TRACKS:
            return _walk_as_reads(vcpu, nested, result, found)
        return _leave(vcpu, nested, result, found)
    if apic.is_access_page(nested, result.hpa):
        return apic.access(vcpu, nested, event, result.hpa)
    full = _log_dirty(vcpu, nested, result, gpa)
    if full is not None:
        return full
    _update_flags(vcpu, result)
    if not _is_plain(vcpu, result.hpa, kind):
        return memory.nested_page_fault(vcpu, vcpu.exit)
    fill(vcpu, nested, gpa, result, written=kind == ept.WRITE)
    return RESUME


def _access(info: int) -> int:
    """What the silicon was doing, as EPT access bits."""
    if info & _SILICON_FETCH:
        return ept.EXECUTE
    return ept.WRITE if info & _SILICON_WRITE else ept.READ


def fill(
    vcpu: Vcpu, nested: NestedVmx, gpa: int, translation: Translation, *, written: bool
) -> None:
    """Enter a translation: no larger than the page of L1's RAM that it is in."""
    assert nested.shadow is not None
    assert nested.eptp is not None
    permissions, rights = translation.permissions, PRESENT | USER
    clean = nested.eptp & TRACKS and not (translation.entry & ept.DIRTY or written)
    if permissions & ept.WRITE and not clean and not vcpu.machine.is_rom(translation.hpa):
        rights |= WRITABLE
    if not permissions & ept.EXECUTE:
        rights |= NO_EXECUTE
    if not permissions & ept.READ:
        found = access.find(vcpu, gpa, vcpu.exit, nested)
        gva = vcpu.linear_rip() if found is None else found.gva
        access.fetch_only(vcpu, gva, translation.hpa)
        return
    shift = translation.page_shift
    while shift > 12 and not _whole(vcpu, nested, translation.hpa, shift):
        shift -= 9
    mask = (1 << shift) - 1
    nested.shadow.map(gpa & ~mask, translation.hpa & ~mask, shift, rights)


def _whole(vcpu: Vcpu, nested: NestedVmx, hpa: int, shift: int) -> bool:
    """Whether a large page of L1 is all RAM, with no hole that L0 or the APIC page needs."""
    start = hpa & ~((1 << shift) - 1)
    end = start + (1 << shift)
    if start < 0x100000 or not vcpu.memory.is_ram(start, 1 << shift):
        return False
    return not (nested.apic_access_page is not None and start <= nested.apic_access_page < end)


def _walk_as_reads(
    vcpu: Vcpu,
    nested: NestedVmx,
    refused: EptViolation | EptMisconfiguration,
    found: LinearAccess,
) -> Verdict | None:
    """A paging structure of L2's that may not be written, which the silicon does in each walk.

    Without accessed and dirty flags for EPT a processor reads it, and writes only to set a flag.
    A walk that only reads and succeeds is put straight into the silicon's TLB.
    """
    assert nested.eptp is not None
    gpa = refused.gpa
    readable = ept.walk(vcpu.memory.u64, nested.eptp, gpa, ept.READ, nested.ept_rules)
    if not isinstance(readable, Translation):
        return _leave(vcpu, nested, readable, found)
    translation = access.without_flags(vcpu, found)
    if translation is None:
        return _leave(vcpu, nested, refused, found)
    kind = _kind(found.access)
    result = ept.walk(vcpu.memory.u64, nested.eptp, translation.gpa, kind, nested.ept_rules)
    if not isinstance(result, Translation):
        return _leave(vcpu, nested, result, LinearAccess(found.gva, False, translation.gpa, 0))
    if apic.is_access_page(nested, result.hpa):
        return apic.access(vcpu, nested, vcpu.exit, translation.gpa)
    if not _is_plain(vcpu, result.hpa, kind):
        return memory.nested_page_fault(vcpu, vcpu.exit)
    executable = translation.executable and bool(result.permissions & ept.EXECUTE)
    access.enter_tlb(vcpu, found.gva, result.hpa, found.access, executable=executable)
    return RESUME


def _kind(linear: int) -> int:
    """The access bits of a linear address's walk as EPT access bits."""
    if linear & guest_paging.FETCH:
        return ept.EXECUTE
    return ept.WRITE if linear & guest_paging.WRITE else ept.READ


def _is_plain(vcpu: Vcpu, hpa: int, kind: int) -> bool:
    """Whether the silicon may access L1's memory at `hpa` by itself."""
    if not vcpu.memory.is_ram(hpa & -PAGE, PAGE) or 0xA0000 <= hpa < 0xC0000:
        return False
    return kind != ept.WRITE or not vcpu.machine.is_rom(hpa)


# -- what L1 gets to know -----------------------------------------------------------------------


def _leave(
    vcpu: Vcpu,
    nested: NestedVmx,
    result: EptViolation | EptMisconfiguration,
    linear: LinearAccess | None,
) -> Verdict:
    """An EPT violation or misconfiguration, with the linear address where it is known."""
    gpa = result.gpa
    if isinstance(result, EptMisconfiguration):
        return exit.leave(
            vcpu, nested, ExitReason.EPT_MISCONFIGURATION, length=_length(vcpu), physical=gpa
        )
    qualification = result.qualification
    if linear is not None:
        qualification |= EptViolationQualification.linear_address_valid
        if not linear.in_walk:
            qualification |= EptViolationQualification.translation
        elif qualification & ept.WRITE:  # walks that write read first
            qualification |= ept.READ
    return exit.leave(
        vcpu,
        nested,
        ExitReason.EPT_VIOLATION,
        qualification,
        length=_length(vcpu),
        linear=linear.gva if linear is not None else 0,
        physical=gpa,
    )


def _length(vcpu: Vcpu) -> int:
    """The length of the instruction that accessed memory, 0 where it could not be fetched.

    The manual leaves the field undefined at these exits; processors write it, and L1s rely on it.
    """
    if vcpu.exit.event or vcpu.exit.info1 & _SILICON_FETCH:
        return 0
    return decode.length(vcpu) if vcpu.processor.instruction_bytes() else 0


# -- page-modification logging ------------------------------------------------------------------


def _log_dirty(vcpu: Vcpu, nested: NestedVmx, translation: Translation, gpa: int) -> Verdict | None:
    """PML: an entry for each page whose dirty flag is about to be set; an exit when it is full.

    SDM 3C "Page-Modification Logging".
    """
    if not nested.secondary & SecondaryControls.enable_pml:
        return None
    sets_dirty = any(
        u.value & ept.DIRTY and not vcpu.memory.u64(u.address) & ept.DIRTY
        for u in translation.updates
    )
    if not sets_dirty:
        return None
    vmcs = nested.vmx.current
    assert vmcs is not None
    index = vmcs.fields[F.PML_INDEX]
    if index >= _PML_ENTRIES:
        return exit.leave(vcpu, nested, ExitReason.PAGE_MODIFICATION_LOG_FULL)
    vcpu.memory.set_u64(vmcs.fields[F.PML_ADDRESS] + 8 * index, gpa & -PAGE)
    vmcs.fields[F.PML_INDEX] = index - 1 & 0xFFFF
    return None
