"""APIC virtualization: CR8, the APIC-access page and the x2APIC MSRs on the virtual-APIC page.

SDM 3C "APIC Virtualization and Virtual Interrupts".  The APIC-access page is left out of the
tables that L2 runs on; an access to it comes here, and exits or is carried out on the page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from undervisor.arch.vmx.controls import PinBasedControls, PrimaryControls, SecondaryControls
from undervisor.arch.vmx.exits import ApicAccessType
from undervisor.arch.vmx.exits import ExitReason as R
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.events import GP0
from undervisor.hypervisor import access as linear_access
from undervisor.hypervisor import decode, mmio
from undervisor.hypervisor.exit import Exit
from undervisor.hypervisor.nested import GuestExit
from undervisor.hypervisor.nested.vmx import events, exit
from undervisor.hypervisor.nested.vmx import virtual_interrupts as virtual
from undervisor.hypervisor.nested_paging import NestedTables
from undervisor.hypervisor.verdict import ADVANCE, Inject, Verdict
from undervisor.silicon.memory import PAGE

if TYPE_CHECKING:
    from undervisor.hypervisor.nested.vmx import NestedVmx
    from undervisor.hypervisor.vcpu import Vcpu

_SILICON_WRITE, _SILICON_FETCH = 2, 0x10
_MASK32: Final = (1 << 32) - 1

_TPR, _EOI, _ICR_LOW, _ICR_HIGH = 0x080, 0x0B0, 0x300, 0x310
_LVT: Final = range(0x320, 0x380, 0x10)
_VECTORS: Final = range(0x100, 0x280, 0x10)  # ISR, TMR and IRR
# SDM 3C "Virtualizing Reads from the APIC-Access Page" and "Virtualizing Writes ...".
_WRITABLE: Final = frozenset(
    {0x020, _TPR, _EOI, 0x0D0, 0x0E0, 0x0F0, 0x280, _ICR_LOW, _ICR_HIGH, *_LVT, 0x380, 0x3E0}
)
_READABLE: Final = _WRITABLE | {0x030, *_VECTORS}
_WITH_DELIVERY: Final = frozenset({_TPR, _EOI, _ICR_LOW})
_TPR_ONLY: Final = frozenset({_TPR})

_MSR_FIRST, _MSR_LAST = 0x800, 0x8FF
_MSR_TPR, _MSR_EOI, _MSR_SELF_IPI = 0x808, 0x80B, 0x83F
_LOWEST_VECTOR: Final = 16
# What VICR_LO must hold for a self-IPI: fixed, edge-triggered, to itself, nothing reserved.
_SELF_IPI_MASK: Final = 0xFFF0_0000 | 0xC_0000 | 0x3_0000 | 0xB000 | 0x0700
_SELF_IPI: Final = 0x4_0000


def merge(vcpu: Vcpu, nested: NestedVmx, fields: dict[int, int]) -> None:
    """Take over the controls: where the APIC-access page is, for all tables that L2 may use."""
    wanted = nested.secondary & SecondaryControls.virtualize_apic_accesses
    page = fields[F.APIC_ACCESS_ADDRESS] if wanted else None
    if page != nested.apic_access_page:
        for shadow in nested.shadows.values():
            shadow.clear()
        release(vcpu, nested)
        if page is not None:
            nested.apic_access_page, vcpu.window = page, Window(vcpu, nested, page)
    nested.tpr_shadow = bool(nested.primary & PrimaryControls.use_tpr_shadow)


def release(vcpu: Vcpu, nested: NestedVmx) -> None:
    """VMX operation ends: no page is special, and no tables are kept for one."""
    if nested.flat is not None:
        nested.flat.release()
        nested.flat = None
    nested.apic_access_page, vcpu.window = None, None


def tables_without_ept(vcpu: Vcpu, nested: NestedVmx) -> NestedTables:
    """What L2 runs on without EPT: L1's tables, or a copy that lacks the APIC-access page."""
    if nested.apic_access_page is None:
        return vcpu.machine.npt01
    if nested.flat is None:
        nested.flat = vcpu.machine.identity_tables()
        if vcpu.memory.is_ram(nested.apic_access_page, PAGE):
            nested.flat.unmap(nested.apic_access_page)
    return nested.flat


# -- entry --------------------------------------------------------------------------------------


def at_entry(vcpu: Vcpu, nested: NestedVmx) -> None:
    """What an entry with a TPR shadow does about the virtual APIC before L2's first instruction."""
    virtual.at_entry(vcpu, nested)
    accesses = nested.apic_access_page is not None
    if accesses and not virtual.delivers(nested) and virtual.is_below_threshold(vcpu, nested):
        virtual.exit_behind(vcpu, nested, R.TPR_BELOW_THRESHOLD, 0)


def external_interrupt(vcpu: Vcpu, nested: NestedVmx) -> Verdict | None:
    """An external interrupt: an exit, or None where it was the notification of posted ones.

    SDM 3C "Posted-Interrupt Processing".
    """
    if not nested.pin & PinBasedControls.process_posted_interrupts:
        return events.external_interrupt(vcpu, nested)
    vector = vcpu.lapic.acknowledge()
    if vector != nested.fields[F.POSTED_INTERRUPT_NOTIFICATION_VECTOR] & 0xFF:
        return events.interrupt_exit(vcpu, nested, vector)
    vcpu.lapic.write(_EOI, 4, 0)
    virtual.take_posted(vcpu, nested)
    return None


# -- the APIC-access page -----------------------------------------------------------------------


def is_access_page(nested: NestedVmx, hpa: int) -> bool:
    """Whether an address of L1's is in the APIC-access page of a VMCS that virtualizes accesses."""
    return nested.apic_access_page is not None and hpa & -PAGE == nested.apic_access_page


def access_without_ept(vcpu: Vcpu, nested: NestedVmx, event: Exit) -> Verdict | None:
    """A fault of the tables that L2 runs on without EPT: the APIC-access page, or L0's affair."""
    if not is_access_page(nested, event.info2):
        return None
    return access(vcpu, nested, event, event.info2)


def access(vcpu: Vcpu, nested: NestedVmx, event: Exit, gpa: int) -> Verdict:
    """An access of L2 to the APIC-access page: an exit, or done on the virtual-APIC page."""
    found = linear_access.find(vcpu, event.info2, event, nested)
    if found is None or found.in_walk:
        delivering = ApicAccessType.PHYSICAL_EVENT_DELIVERY
        kind = delivering if event.event else ApicAccessType.PHYSICAL_FETCH_OR_EXECUTION
        return _leave(vcpu, nested, kind, 0)
    offset = found.gva % PAGE
    if event.event:
        return _leave(vcpu, nested, ApicAccessType.LINEAR_EVENT_DELIVERY, offset)
    if event.info1 & _SILICON_FETCH:
        return _leave(vcpu, nested, ApicAccessType.LINEAR_FETCH, offset)
    writes = bool(event.info1 & _SILICON_WRITE)
    decoded = decode.instruction(vcpu)
    allowed = (_may_write if writes else _may_read)(nested, offset, decode.memory_size(decoded))
    if not allowed or not mmio.knows(decoded):  # a processor may exit where it could virtualize
        kind = ApicAccessType.LINEAR_WRITE if writes else ApicAccessType.LINEAR_READ
        return _leave(vcpu, nested, kind, offset)
    return mmio.emulate(vcpu)


def _leave(vcpu: Vcpu, nested: NestedVmx, kind: ApicAccessType, offset: int) -> Verdict:
    by_instruction = kind in (ApicAccessType.LINEAR_READ, ApicAccessType.LINEAR_WRITE)
    length = decode.length(vcpu) if by_instruction else 0
    return exit.leave(vcpu, nested, R.APIC_ACCESS, offset | kind << 12, length=length)


def _is_register(nested: NestedVmx, offset: int, size: int) -> bool:
    """Whether an access may be virtualized at all: in the low 32 bits of a register's 16 bytes."""
    return nested.tpr_shadow and offset % 16 + max(size, 1) <= 4


def _may_read(nested: NestedVmx, offset: int, size: int) -> bool:
    registers = nested.secondary & SecondaryControls.apic_register_virtualization
    allowed = _READABLE if registers else _TPR_ONLY
    return _is_register(nested, offset, size) and offset & -16 in allowed


def _may_write(nested: NestedVmx, offset: int, size: int) -> bool:
    if nested.secondary & SecondaryControls.apic_register_virtualization:
        allowed = _WRITABLE
    else:
        allowed = _WITH_DELIVERY if virtual.delivers(nested) else _TPR_ONLY
    return _is_register(nested, offset, size) and offset & -16 in allowed


class Window:
    """The APIC-access page as `mmio` sees it: loads and stores go to the virtual-APIC page."""

    def __init__(self, vcpu: Vcpu, nested: NestedVmx, page: int) -> None:
        self._vcpu, self._nested = vcpu, nested
        self.page = page

    def load(self, hpa: int, size: int) -> int:
        """Read a register; GuestExit where that is an APIC-access exit."""
        offset = hpa % PAGE
        if not _may_read(self._nested, offset, size):
            kind = ApicAccessType.LINEAR_READ
            raise GuestExit(_leave(self._vcpu, self._nested, kind, offset))
        return virtual.read(self._vcpu, self._nested, offset, size)

    def store(self, hpa: int, size: int, value: int) -> None:
        """Write a register; GuestExit where that is an APIC-access exit."""
        offset = hpa % PAGE
        if not _may_write(self._nested, offset, size):
            kind = ApicAccessType.LINEAR_WRITE
            raise GuestExit(_leave(self._vcpu, self._nested, kind, offset))
        virtual.write(self._vcpu, self._nested, offset, value, size)
        _emulate_write(self._vcpu, self._nested, offset)


def _emulate_write(vcpu: Vcpu, nested: NestedVmx, offset: int) -> None:
    """SDM 3C "APIC-Write Emulation", behind a write to the virtual-APIC page."""
    register = offset & -16
    if register == _TPR:
        virtual.write(vcpu, nested, _TPR, virtual.read(vcpu, nested, _TPR) & 0xFF)
        virtual.virtualize_tpr(vcpu, nested)
    elif register == _ICR_HIGH:
        virtual.write(vcpu, nested, _ICR_HIGH, virtual.read(vcpu, nested, _ICR_HIGH) & 0xFF000000)
    elif register == _EOI and virtual.delivers(nested):
        virtual.write(vcpu, nested, _EOI, 0)
        virtual.virtualize_eoi(vcpu, nested)
    elif register == _ICR_LOW and _is_self_ipi(vcpu, nested):
        virtual.virtualize_self_ipi(vcpu, nested, virtual.read(vcpu, nested, _ICR_LOW) & 0xFF)
    else:
        virtual.exit_behind(vcpu, nested, R.APIC_WRITE, offset)


def _is_self_ipi(vcpu: Vcpu, nested: NestedVmx) -> bool:
    command = virtual.read(vcpu, nested, _ICR_LOW)
    alike = command & _SELF_IPI_MASK == _SELF_IPI
    return virtual.delivers(nested) and alike and command & 0xFF >= _LOWEST_VECTOR


# -- CR8 ----------------------------------------------------------------------------------------


def write_cr8(
    vcpu: Vcpu, nested: NestedVmx, decoded: decode.Instruction, value: int
) -> Verdict | None:
    """MOV to CR8 that does not exit: VTPR with a TPR shadow, else the local APIC's."""
    if not nested.tpr_shadow:
        return None
    if value >> 4:
        return Inject(GP0)
    virtual.write(vcpu, nested, _TPR, value << 4)
    virtual.virtualize_tpr(vcpu, nested)
    return ADVANCE[decoded.len]


def read_cr8(vcpu: Vcpu, nested: NestedVmx, decoded: decode.Instruction) -> Verdict | None:
    """MOV from CR8 that does not exit."""
    if not nested.tpr_shadow:
        return None
    value = virtual.read(vcpu, nested, _TPR) >> 4 & 0xF
    decode.write_register(vcpu, decoded.op0_register, value)
    return ADVANCE[decoded.len]


# -- x2APIC mode --------------------------------------------------------------------------------


def msr_access(vcpu: Vcpu, nested: NestedVmx, number: int, *, write: bool) -> Verdict | None:
    """RDMSR or WRMSR that does not exit. SDM 3C "Virtualizing MSR-Based APIC Accesses"."""
    virtualized = nested.secondary & SecondaryControls.virtualize_x2apic_mode
    if not virtualized or not _MSR_FIRST <= number <= _MSR_LAST:
        return None
    if write:
        return _write_msr(vcpu, nested, number)
    registers = nested.secondary & SecondaryControls.apic_register_virtualization
    if number != _MSR_TPR and not registers:
        return None
    offset, q = (number & 0xFF) << 4, vcpu.state.q
    q[0] = virtual.read(vcpu, nested, offset)
    q[2] = virtual.read(vcpu, nested, offset + 4)
    return ADVANCE[decode.length(vcpu)]


def _write_msr(vcpu: Vcpu, nested: NestedVmx, number: int) -> Verdict | None:
    q = vcpu.state.q
    value = q[0] & _MASK32 | (q[2] & _MASK32) << 32
    if number != _MSR_TPR and not (virtual.delivers(nested) and number in _DELIVERY_MSRS):
        return None
    if value >> (0 if number == _MSR_EOI else 8):
        return Inject(GP0)
    virtual.write(vcpu, nested, (number & 0xFF) << 4, value, 8)
    if number == _MSR_TPR:
        virtual.virtualize_tpr(vcpu, nested)
    elif number == _MSR_EOI:
        virtual.virtualize_eoi(vcpu, nested)
    elif value < _LOWEST_VECTOR:
        virtual.exit_behind(vcpu, nested, R.APIC_WRITE, (number & 0xFF) << 4)
    else:
        virtual.virtualize_self_ipi(vcpu, nested, value)
    return ADVANCE[decode.length(vcpu)]


_DELIVERY_MSRS: Final = frozenset({_MSR_EOI, _MSR_SELF_IPI})
