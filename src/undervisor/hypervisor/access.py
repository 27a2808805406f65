"""Which linear address an access had: the silicon reports only the guest-physical one.

The candidates are the fetch at RIP, the memory operands of the instruction, its implied stack
accesses, and what delivering an event touches.  Each is walked through the running world's own
paging structures; the one whose walk meets the guest-physical page is the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from iced_x86 import OpKind

from undervisor.arch.x86.paging import (
    FETCH,
    USER,
    WRITE,
    Translation,
    accessed_dirty_updates,
    walk,
)
from undervisor.hypervisor import decode
from undervisor.hypervisor.exit import Exit
from undervisor.hypervisor.verdict import RESUME, Verdict
from undervisor.silicon import library
from undervisor.silicon.layout import Env
from undervisor.silicon.memory import PAGE

if TYPE_CHECKING:
    from undervisor.hypervisor.vcpu import Vcpu

_SILICON_FETCH, _SILICON_WRITE = 0x10, 2
_MASK64: Final = (1 << 64) - 1
_READ, _WRITE, _EXECUTE = 1, 2, 4  # the emulator's page protection


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
    """The access of the instruction at RIP that touches the page of `gpa`; None if unknown."""
    page = gpa & -PAGE
    for gva, access in _candidates(vcpu, exit):
        met = _meets(vcpu, gva, access, page, reader)
        if met is not None:
            in_walk, entry = met
            return LinearAccess(gva, in_walk, entry, access)
    return None


def _meets(vcpu: Vcpu, gva: int, access: int, page: int, reader: Reader) -> tuple[bool, int] | None:
    """Whether the walk of `gva` touches `page`: in a structure (True) or at its end (False)."""
    touched: list[int] = []

    def read(address: int) -> int:
        touched.append(address)
        return reader.peek_gpa(vcpu, address)

    state = vcpu.state
    result = walk(vcpu.paging_rules(), state.cr3, gva, access, read)
    for address in touched:
        if address & -PAGE == page:
            return True, address
    if isinstance(result, Translation) and result.gpa & -PAGE == page:
        return False, result.gpa
    return None


def _candidates(vcpu: Vcpu, exit: Exit) -> Iterator[tuple[int, int]]:
    """Linear addresses with their access bits, the likely ones first."""
    state = vcpu.state
    user = USER if state.cpl == 3 else 0
    rip = vcpu.linear_rip()
    info = exit.info1
    if exit.event:
        yield from _delivery(vcpu, exit.event & 0xFF)
    if info & _SILICON_FETCH:
        yield rip, FETCH | user
        yield (rip & -PAGE) + PAGE, FETCH | user
        return
    data = vcpu.processor.instruction_bytes()
    if data:
        kind = WRITE if info & _SILICON_WRITE else 0
        yield from _operands(vcpu, kind | user)
    yield rip, FETCH | user
    yield (rip & -PAGE) + PAGE, FETCH | user


def _operands(vcpu: Vcpu, access: int) -> Iterator[tuple[int, int]]:
    """The instruction's explicit and implied memory operands, both ends of each."""
    decoded = decode.instruction(vcpu)
    for operand in range(decoded.op_count):
        if decode.is_memory(decoded, operand):
            gva = decode.linear_address(vcpu, decoded, operand)
            size = max(decode.memory_size(decoded), 1)
            yield gva, access
            if gva % PAGE + size > PAGE:
                yield (gva & -PAGE) + PAGE, access
    if decoded.is_stack_instruction:
        top = vcpu.state.segment_base(Env.SS) + vcpu.state.q[4] & _MASK64
        yield top, access
        yield top - 8 & _MASK64, access


def _delivery(vcpu: Vcpu, vector: int) -> Iterator[tuple[int, int]]:
    """What the delivery of an event reads and writes: IDT, GDT, TSS, stack."""
    state = vcpu.state
    idt = state.segment_base(Env.IDTR)
    yield idt + vector * (16 if state.efer & 0x400 else 8), 0
    yield state.q[4] - 8 & _MASK64, WRITE
    yield state.q[4] - 40 & _MASK64, WRITE
    yield state.segment_base(Env.TR) + 4, 0
    yield state.segment_base(Env.GDTR), 0


def complete(vcpu: Vcpu, found: LinearAccess) -> Verdict | None:
    """Finish a walk in software and put the translation into the silicon's TLB.

    None where the walk does not succeed or would have to write a paging structure.
    """
    state = vcpu.state
    read: Callable[[int], int] = vcpu.read_gpa_u64
    ac = bool(state.q[17] >> 18 & 1)
    result = walk(vcpu.paging_rules(), state.cr3, found.gva, found.access, read, ac=ac)
    if not isinstance(result, Translation) or accessed_dirty_updates(result, found.access):
        return None
    hpa = vcpu.nested.to_hpa(vcpu, result.gpa, write=bool(found.access & WRITE))
    protection = _READ
    if found.access & WRITE:
        protection |= _WRITE
    if result.executable:
        protection |= _EXECUTE
    _enter_tlb(vcpu, found.gva, hpa, protection)
    return RESUME


def translate_once(vcpu: Vcpu, hpa: int, *, executable: bool) -> None:
    """Let the fetch at RIP succeed although its page cannot be read."""
    _enter_tlb(vcpu, vcpu.linear_rip(), hpa, _EXECUTE if executable else _READ)


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


__all__ = ["LinearAccess", "OpKind", "complete", "find", "translate_once"]
