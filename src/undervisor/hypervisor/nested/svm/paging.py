"""Nested paging: the shadow NPT02 that composes L1's NPT12 with ours, and its faults.

APM 2 "Nested Paging".  A shadow is what the TLB is on hardware: it is filled at faults, and what
L1 invalidates is looked at again.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.svm.npt import (
    NestedPageFault,
    NestedWalk,
    Purpose,
    nested_rules,
    nested_updates,
    nested_walk,
)
from undervisor.arch.svm.vmcb import TlbControl
from undervisor.arch.x86.paging import (
    FETCH,
    READ,
    WRITE,
    Entry,
    PagingRules,
    Translation,
    walk,
)
from undervisor.hypervisor import access, decode
from undervisor.hypervisor.nested import GuestExit
from undervisor.hypervisor.nested.svm.exit import leave
from undervisor.hypervisor.nested_paging import (
    NO_EXECUTE,
    PRESENT,
    USER,
    WRITABLE,
    NestedTables,
)
from undervisor.hypervisor.verdict import RESUME, Verdict
from undervisor.silicon.memory import PAGE, Memory

if TYPE_CHECKING:
    from undervisor.hypervisor.exit import Exit
    from undervisor.hypervisor.nested.svm.state import SvmState
    from undervisor.hypervisor.vcpu import Vcpu

_MASK64: Final = (1 << 64) - 1
_SHADOWS: Final = 4
_MOST_KNOWN: Final = 1 << 16
_SHIFTS: Final = (30, 21)
_DEVICES: Final = (0xA0000, 0xC0000)


class Shadow:
    """The composition of one NPT12 with what is RAM.

    `seen` are the tables of L1's that went into it, as they were; `known` are translations of
    pages for L0's own accesses: host-physical page, and whether it may be written.
    """

    def __init__(self, memory: Memory, n_cr3: int, rules: PagingRules) -> None:
        self._memory = memory
        self.tables = NestedTables(memory)
        self.n_cr3 = n_cr3
        self.rules = rules
        self.asid = -1
        self.seen: dict[int, bytes] = {}
        self.known: dict[int, tuple[int, bool]] = {}

    def clear(self) -> None:
        """Forget everything."""
        self.tables.clear()
        self.seen.clear()
        self.known.clear()

    def is_current(self) -> bool:
        """Whether L1's tables still are what the shadow was made of."""
        ram, low, read = self._memory.ram, self._memory.low, self._memory.read
        for page, was in self.seen.items():
            if (ram[page : page + PAGE] if page < low else read(page, PAGE)) != was:
                return False
        return True

    def walk(self, gpa: int, access: int, purpose: Purpose = Purpose.FINAL_ADDRESS) -> NestedWalk:
        """Translate by L1's tables, set their A and D bits and remember what was looked at."""
        found = nested_walk(self.rules, self.n_cr3, gpa, access, self._memory.u64, purpose)
        if isinstance(found, Translation):
            for address, value in nested_updates(found, access, purpose):
                if self._memory.is_ram(address, 8):
                    self._memory.set_u64(address, value)
                    self.seen.pop(address & -PAGE, None)
            self._remember(found)
        return found

    def _remember(self, found: Translation) -> None:
        root = self.n_cr3 & Entry.address
        for page in (root, *(address & -PAGE for address, _ in found.steps)):
            if page not in self.seen:
                self.seen[page] = self._memory.read(page, PAGE)

    def fill(self, gpa: int, found: Translation, *, write: bool) -> bool:
        """Enter a translation; False where it leads to no memory that may be accessed so.

        A page that is not dirty stays read-only, so that the first write is seen.
        """
        hpa, memory = found.gpa, self._memory
        if not memory.is_ram(hpa) or _DEVICES[0] <= hpa < _DEVICES[1]:
            return False
        shift, read_only = 12, False
        if hpa >= 0x100000:
            shift = next((s for s in _SHIFTS if found.page_shift >= s and self._fits(hpa, s)), 12)
        else:
            read_only = hpa >= 0xC0000
        dirty = write or found.steps[-1][1] & Entry.d
        rights = PRESENT | USER | (0 if found.executable else NO_EXECUTE)
        if found.writable and dirty and not read_only:
            rights |= WRITABLE
        size = 1 << shift
        self.tables.map(gpa & -size, hpa & -size, shift, rights)
        return not (write and read_only)

    def _fits(self, hpa: int, shift: int) -> bool:
        size = 1 << shift
        start = hpa & -size
        return start >= 0x100000 and self._memory.is_ram(start, size)


class Shadows:
    """The few shadows of a vCPU, the last used last.

    `stale`: L1 has invalidated something, so that the next entry must look at L1's tables.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._all: dict[tuple[int, int, int], Shadow] = {}
        self._key = (0, 0, 0)
        self.current: Shadow | None = None
        self.stale = True

    def clear(self) -> None:
        """Forget all translations: no frames are left but the roots."""
        for shadow in self._all.values():
            shadow.clear()

    def select(self, vcpu: Vcpu, n_cr3: int, asid: int, tlb_control: int) -> Shadow:
        """The shadow for an entry under L1's control registers as they are now.

        What L1 changes in its tables holds from its next TLB flush, another ASID or another
        nCR3 on, as APM 2 "TLB Management" has it.
        """
        state = vcpu.state
        key = (n_cr3, state.cr4, state.efer)
        shadow = self.current
        asked = self.stale or tlb_control != TlbControl.DO_NOTHING
        if shadow is None or key != self._key:
            shadow = self._all.pop(key, None) or self._create(vcpu, n_cr3)
            self._all[key] = shadow
            self._key, asked = key, True
        if (asked or asid != shadow.asid) and not shadow.is_current():
            shadow.clear()
        self.stale = False  # of the others, each is looked at when it is next chosen
        shadow.asid = asid
        self.current = shadow
        return shadow

    def _create(self, vcpu: Vcpu, n_cr3: int) -> Shadow:
        while len(self._all) >= _SHADOWS:
            self._all.pop(next(iter(self._all))).tables.release()
        model, state = vcpu.model, vcpu.state
        rules = nested_rules(state.cr4, state.efer, model.physical_width, model.has("pdpe1gb"))
        try:
            return Shadow(self._memory, n_cr3, rules)
        except MemoryError:
            make_room(vcpu)
            return Shadow(self._memory, n_cr3, rules)


def make_room(vcpu: Vcpu) -> None:
    """No private frame is left: every shadow of the machine starts anew."""
    for other in vcpu.machine.vcpus:
        shadows: Shadows | None = getattr(other.nested, "shadows", None)
        if shadows is not None:
            shadows.clear()
    vcpu.processor.flush()


def fault(vcpu: Vcpu, svm: SvmState, exit: Exit) -> Verdict | None:
    """A nested page fault of L2: L1's, or a page to be shadowed, or None: a device of L0's."""
    if not svm.nested_paging:
        return None
    shadow = svm.shadows.current
    assert shadow is not None, "L2 runs with nested paging"
    gpa, kind = exit.info2, exit.info1 & (WRITE | FETCH)
    found = shadow.walk(gpa, kind)
    if isinstance(found, NestedPageFault):
        purpose = _purpose(vcpu, exit, gpa) if kind & WRITE else Purpose.FINAL_ADDRESS
        info = found.exit_info1 & ~Purpose.FINAL_ADDRESS | purpose
        return reflect_fault(vcpu, svm, NestedPageFault(info, gpa), exit.event)
    fill = partial(shadow.fill, gpa, found, write=bool(kind & WRITE))
    try:
        filled = fill()
    except MemoryError:
        make_room(vcpu)
        filled = fill()
    return RESUME if filled else None


def reflect_fault(vcpu: Vcpu, svm: SvmState, found: NestedPageFault, event: int) -> Verdict:
    """#VMEXIT(NPF)."""
    data = b"" if found.exit_info1 & FETCH else instruction_bytes(vcpu, svm)
    return leave(vcpu, svm, ExitCode.NPF, found.exit_info1, found.gpa, event=event, fetched=data)


def to_hpa(vcpu: Vcpu, svm: SvmState, gpa: int, *, write: bool, tables: bool) -> int:
    """Where L2's guest-physical address is, for an access by L0 on L2's behalf."""
    if not svm.nested_paging:
        return gpa
    shadow = svm.shadows.current
    assert shadow is not None, "L2 runs with nested paging"
    page, write = gpa & -PAGE, write or tables
    known = shadow.known.get(page)
    if known is not None and (known[1] or not write):
        return known[0] | gpa & (PAGE - 1)
    purpose = Purpose.GUEST_TABLES if tables else Purpose.FINAL_ADDRESS
    found = shadow.walk(gpa, WRITE if write else READ, purpose)
    if isinstance(found, NestedPageFault):
        raise GuestExit(reflect_fault(vcpu, svm, found, vcpu.exit.event))
    if len(shadow.known) >= _MOST_KNOWN:
        shadow.known.clear()
    shadow.known[page] = (found.gpa & -PAGE, write)
    return found.gpa


# -- without side effects ----------------------------------------------------------------------


def peek_gpa(vcpu: Vcpu, svm: SvmState, gpa: int) -> int:
    """A quadword of L2's guest-physical memory; 0 where there is none."""
    hpa = _peek(vcpu, svm, gpa)
    return 0 if hpa is None else vcpu.memory.u64(hpa)


def _peek(vcpu: Vcpu, svm: SvmState, gpa: int) -> int | None:
    """Where a guest-physical address of L2 is, with no A or D bit set and no exit."""
    shadow = svm.shadows.current
    if not svm.nested_paging or shadow is None:
        return gpa
    found = nested_walk(shadow.rules, shadow.n_cr3, gpa, READ, vcpu.memory.u64)
    return found.gpa if isinstance(found, Translation) else None


def instruction_bytes(vcpu: Vcpu, svm: SvmState) -> bytes:
    """The 15 bytes at L2's instruction pointer, or those before a page that is not there."""
    data = vcpu.processor.instruction_bytes()
    if data:
        return data
    gva, state = vcpu.linear_rip(), vcpu.state
    while len(data) < decode.MAX_LENGTH:
        found = walk(vcpu.paging_rules(), state.cr3, gva, READ, partial(peek_gpa, vcpu, svm))
        hpa = _peek(vcpu, svm, found.gpa) if isinstance(found, Translation) else None
        if hpa is None:
            break
        part = min(decode.MAX_LENGTH - len(data), PAGE - gva % PAGE)
        data += vcpu.memory.read(hpa, part)
        gva = gva + part & _MASK64
    return data


def _purpose(vcpu: Vcpu, exit: Exit, gpa: int) -> Purpose:
    """Whether a write was the walk of L2's page tables or the access itself.

    The silicon does not say, but the walks are those of addresses that the instruction names.
    """
    found = access.find(vcpu, gpa, exit, vcpu.nested)
    return Purpose.GUEST_TABLES if found is not None and found.in_walk else Purpose.FINAL_ADDRESS
