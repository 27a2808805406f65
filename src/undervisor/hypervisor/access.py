"""Which linear address an access had: the silicon reports only the guest-physical one.

The candidates are the fetch at RIP, the memory operands of the instruction, its implied stack
accesses, and what delivering an event touches.  Each is walked through the running world's own
paging structures; the one whose walk meets the guest-physical page is the answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from iced_x86 import InstructionInfoFactory, OpAccess

from undervisor.arch.x86.paging import (
    FETCH,
    USER,
    WRITE,
    Translation,
    accessed_dirty_updates,
    walk,
)
from undervisor.arch.x86.registers import Efer
from undervisor.hypervisor import decode
from undervisor.hypervisor.exit import Exit
from undervisor.silicon import library
from undervisor.silicon.layout import Env
from undervisor.silicon.memory import PAGE

if TYPE_CHECKING:
    from undervisor.hypervisor.vcpu import Vcpu

_SILICON_FETCH: Final = 0x10
_MASK64: Final = (1 << 64) - 1
_MASK32: Final = (1 << 32) - 1
_CODE64: Final = 0x8000
_READ, _WRITE, _EXECUTE = 1, 2, 4  # the emulator's page protection
_KINDS: Final = InstructionInfoFactory()
_WRITES: Final = frozenset(
    {OpAccess.WRITE, OpAccess.COND_WRITE, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE}
)


class Reader(Protocol):
    """Reads the running world's guest-physical memory without side effects."""

    def peek_gpa(self, vcpu: Vcpu, gpa: int) -> int:
        """A quadword; 0 where nothing is mapped."""


@dataclass(frozen=True, slots=True)
class LinearAccess:
    """The linear address of an access, and where its walk met the guest-physical page.

    `in_walk`: in a paging structure, at guest-physical `entry`; else in the final translation,
    whose guest-physical address `entry` is then.  `access` has the walk's access bits.
    """

    gva: int
    in_walk: bool
    entry: int
    access: int


def find(vcpu: Vcpu, gpa: int, exit: Exit, reader: Reader) -> LinearAccess | None:
    """The access of the instruction at RIP that touches `gpa`; None if unknown.

    The silicon names the entry of a paging structure exactly, and the first byte that it could
    not reach.  An access that only meets the page is taken where none meets the address.
    """
    near: LinearAccess | None = None
    for gva, access in _candidates(vcpu, exit, reader):
        met = _meets(vcpu, gva, access, gpa, reader)
        if met is None:
            continue
        if not met.in_walk or met.entry == gpa:
            return met
        near = near or met
    return near


def _meets(vcpu: Vcpu, gva: int, access: int, gpa: int, reader: Reader) -> LinearAccess | None:
    """How the walk of `gva` touches the page of `gpa`: in a structure, or at its end."""
    touched: list[int] = []

    def read(address: int) -> int:
        touched.append(address)
        return reader.peek_gpa(vcpu, address)

    page = gpa & -PAGE
    result = walk(vcpu.paging_rules(), vcpu.state.cr3, gva, access, read)
    near = None
    for address in touched:
        if address == gpa:
            return LinearAccess(gva, True, address, access)
        if address & -PAGE == page and near is None:
            near = LinearAccess(gva, True, address, access)
    if isinstance(result, Translation) and result.gpa & -PAGE == page:
        exact = gva & -PAGE | gpa % PAGE
        return LinearAccess(exact, False, gpa, access)
    return near


def _candidates(vcpu: Vcpu, exit: Exit, reader: Reader) -> Iterator[tuple[int, int]]:
    """Linear addresses with their access bits, the likely ones first."""
    state = vcpu.state
    user = USER if state.cpl == 3 else 0
    rip = vcpu.linear_rip()
    info = exit.info1
    if exit.event:
        yield from _delivery(vcpu, exit.event & 0xFF, reader)
    if info & _SILICON_FETCH:
        yield rip, FETCH | user
        yield (rip & -PAGE) + PAGE, FETCH | user
        return
    if vcpu.processor.instruction_bytes():
        yield from _operands(vcpu, user)
    yield rip, FETCH | user
    yield (rip & -PAGE) + PAGE, FETCH | user


def _operands(vcpu: Vcpu, user: int) -> Iterator[tuple[int, int]]:
    """The instruction's explicit and implied memory operands, both ends of each."""
    decoded = decode.instruction(vcpu)
    kinds = _KINDS.info(decoded)
    for operand in range(decoded.op_count):
        if decode.is_memory(decoded, operand):
            access = user | (WRITE if kinds.op_access(operand) in _WRITES else 0)
            gva = decode.linear_address(vcpu, decoded, operand)
            size = max(decode.memory_size(decoded), 1)
            yield gva, access
            if gva % PAGE + size > PAGE:
                yield (gva & -PAGE) + PAGE, access
    if decoded.is_stack_instruction:
        top = vcpu.state.segment_base(Env.SS) + vcpu.state.q[4]
        access = user | (WRITE if decoded.stack_pointer_increment < 0 else 0)
        for offset in (-8, 0, -PAGE) if access & WRITE else (0, 8):
            yield _wrapped(vcpu, top + offset), access


def _wrapped(vcpu: Vcpu, gva: int) -> int:
    """A linear address in the running mode's width."""
    return gva & (_MASK64 if vcpu.state.hflags & _CODE64 else _MASK32)


def _delivery(vcpu: Vcpu, vector: int, reader: Reader) -> Iterator[tuple[int, int]]:
    """What the delivery of an event reads and writes: IDT, GDT, TSS, and the stack it uses."""
    state = vcpu.state
    long_mode = bool(state.efer & Efer.lma)
    task = state.segment_base(Env.TR)
    yield _wrapped(vcpu, state.segment_base(Env.IDTR) + vector * (16 if long_mode else 8)), 0
    yield _wrapped(vcpu, state.segment_base(Env.GDTR)), 0
    yield _wrapped(vcpu, task + 4), 0
    if not long_mode:
        stack = _peek(vcpu, task + 4, reader) & _MASK32
        old = state.segment_base(Env.SS) + state.q[4]
        for top in (old, stack):
            yield _wrapped(vcpu, top - 4), WRITE
            yield _wrapped(vcpu, top - 24), WRITE
        return
    gate = _peek(vcpu, state.segment_base(Env.IDTR) + vector * 16, reader)
    stacks = [state.q[4], _peek(vcpu, task + 4, reader)]
    if gate >> 32 & 7:
        stacks.insert(0, _peek(vcpu, task + 28 + 8 * (gate >> 32 & 7), reader))
    for top in stacks:
        yield (top & -16) - 8 & _MASK64, WRITE
        yield (top & -16) - 48 & _MASK64, WRITE


def _peek(vcpu: Vcpu, gva: int, reader: Reader) -> int:
    """A quadword at a linear address of L2 that lies within a page; 0 where there is none."""

    def read(address: int) -> int:
        return reader.peek_gpa(vcpu, address)

    result = walk(vcpu.paging_rules(), vcpu.state.cr3, _wrapped(vcpu, gva), 0, read)
    return reader.peek_gpa(vcpu, result.gpa) if isinstance(result, Translation) else 0


def without_flags(vcpu: Vcpu, found: LinearAccess) -> Translation | None:
    """The walk of an access as one that reads L2's paging structures and does not write them.

    None where it faults or must set an accessed or dirty flag.
    """
    ac = bool(vcpu.state.q[17] >> 18 & 1)
    vcpu.linear = found.gva
    read, rules = vcpu.read_gpa_u64, vcpu.paging_rules()
    result = walk(rules, vcpu.state.cr3, found.gva, found.access, read, ac=ac)
    if not isinstance(result, Translation) or accessed_dirty_updates(result, found.access):
        return None
    return result


def enter_tlb(vcpu: Vcpu, gva: int, hpa: int, access: int, *, executable: bool) -> None:
    """Put a translation into the silicon's TLB, for this access and for fetches."""
    protection = _READ | (_WRITE if access & WRITE else 0) | (_EXECUTE if executable else 0)
    _enter_tlb(vcpu, gva, hpa, protection)


def fetch_only(vcpu: Vcpu, gva: int, hpa: int) -> None:
    """Let fetches from a page succeed that cannot be read."""
    _enter_tlb(vcpu, gva, hpa, _EXECUTE)


def _enter_tlb(vcpu: Vcpu, gva: int, hpa: int, protection: int) -> None:
    state = vcpu.state
    if state.cpl == 3:
        mode = 1
    else:
        checked = state.cr4 >> 21 & 1 and not state.q[17] >> 18 & 1
        mode = 0 if checked else 2
    library.function("tlb_set_page")(
        state.cpu, gva & -PAGE & _MASK64, hpa & -PAGE, protection, mode, PAGE
    )
