"""Virtual interrupts: the virtual-APIC page's priorities, and what is delivered from it.

SDM 3C "APIC Virtualization and Virtual Interrupts": TPR, PPR, EOI and self-IPI virtualization,
evaluation and delivery of pending virtual interrupts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from undervisor.arch.vmx.controls import PrimaryControls, SecondaryControls
from undervisor.arch.vmx.exits import ExitReason as R
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.hypervisor.vcpu import Activity
from undervisor.silicon.processor import RESUME

if TYPE_CHECKING:
    from undervisor.hypervisor.nested.vmx import NestedVmx
    from undervisor.hypervisor.vcpu import Vcpu

VTPR: Final = 0x080
_VPPR: Final = 0x0A0
_VISR: Final = 0x100
_VIRR: Final = 0x200
_CLASS: Final = 0xF0
_POSTED_FLAGS: Final = 32  # in the posted-interrupt descriptor, behind 256 requests
_OUTSTANDING: Final = 1
_EOI_EXIT_BITMAPS: Final = (
    F.EOI_EXIT_BITMAP_0,
    F.EOI_EXIT_BITMAP_1,
    F.EOI_EXIT_BITMAP_2,
    F.EOI_EXIT_BITMAP_3,
)


def delivers(nested: NestedVmx) -> bool:
    """Whether virtual-interrupt delivery is on."""
    return bool(nested.secondary & SecondaryControls.virtual_interrupt_delivery)


# -- the virtual-APIC page ----------------------------------------------------------------------


def read(vcpu: Vcpu, nested: NestedVmx, offset: int, size: int = 4) -> int:
    """`size` bytes of the virtual-APIC page."""
    where = nested.fields[F.VIRTUAL_APIC_ADDRESS] + offset
    return int.from_bytes(vcpu.memory.read(where, size), "little")


def write(vcpu: Vcpu, nested: NestedVmx, offset: int, value: int, size: int = 4) -> None:
    """Write `size` bytes of the virtual-APIC page."""
    where = nested.fields[F.VIRTUAL_APIC_ADDRESS] + offset
    vcpu.memory.write(where, value.to_bytes(size, "little"))


def _bit(vcpu: Vcpu, nested: NestedVmx, first: int, vector: int, *, on: bool) -> None:
    """One bit of VIRR or VISR, which begin at `first`: 32 vectors in every 16 bytes."""
    offset, mask = first + (vector >> 5 << 4), 1 << (vector & 31)
    old = read(vcpu, nested, offset)
    write(vcpu, nested, offset, old | mask if on else old & ~mask)


def _highest(vcpu: Vcpu, nested: NestedVmx, first: int) -> int:
    """The highest vector whose bit is set, 0 where none is."""
    for word in range(7, -1, -1):
        bits = read(vcpu, nested, first + 16 * word)
        if bits:
            return word * 32 + bits.bit_length() - 1
    return 0


def _rvi(nested: NestedVmx) -> int:
    return nested.fields[F.GUEST_INTERRUPT_STATUS] & 0xFF


def _svi(nested: NestedVmx) -> int:
    return nested.fields[F.GUEST_INTERRUPT_STATUS] >> 8 & 0xFF


def _set_status(nested: NestedVmx, *, rvi: int, svi: int) -> None:
    nested.fields[F.GUEST_INTERRUPT_STATUS] = svi << 8 | rvi


# -- virtualization -----------------------------------------------------------------------------


def at_entry(vcpu: Vcpu, nested: NestedVmx) -> None:
    """VM entry: PPR virtualization and the evaluation of what is pending."""
    if delivers(nested):
        _virtualize_ppr(vcpu, nested)
        _evaluate(vcpu, nested)


def is_below_threshold(vcpu: Vcpu, nested: NestedVmx) -> bool:
    """Whether bits 7:4 of VTPR are below the TPR threshold."""
    return read(vcpu, nested, VTPR) >> 4 & 0xF < nested.fields[F.TPR_THRESHOLD] & 0xF


def virtualize_tpr(vcpu: Vcpu, nested: NestedVmx) -> None:
    """SDM 3C "TPR Virtualization", after VTPR was written."""
    if delivers(nested):
        _virtualize_ppr(vcpu, nested)
        _evaluate(vcpu, nested)
    elif is_below_threshold(vcpu, nested):
        exit_behind(vcpu, nested, R.TPR_BELOW_THRESHOLD, 0)


def _virtualize_ppr(vcpu: Vcpu, nested: NestedVmx) -> None:
    """SDM 3C "PPR Virtualization"."""
    vtpr, svi = read(vcpu, nested, VTPR) & 0xFF, _svi(nested)
    write(vcpu, nested, _VPPR, vtpr if vtpr & _CLASS >= svi & _CLASS else svi & _CLASS)


def virtualize_eoi(vcpu: Vcpu, nested: NestedVmx) -> None:
    """SDM 3C "EOI Virtualization"."""
    vector = _svi(nested)
    _bit(vcpu, nested, _VISR, vector, on=False)
    _set_status(nested, rvi=_rvi(nested), svi=_highest(vcpu, nested, _VISR))
    _virtualize_ppr(vcpu, nested)
    if nested.fields[_EOI_EXIT_BITMAPS[vector >> 6]] >> (vector & 63) & 1:
        exit_behind(vcpu, nested, R.VIRTUALIZED_EOI, vector)
    else:
        _evaluate(vcpu, nested)


def virtualize_self_ipi(vcpu: Vcpu, nested: NestedVmx, vector: int) -> None:
    """SDM 3C "Self-IPI Virtualization"."""
    _bit(vcpu, nested, _VIRR, vector, on=True)
    _set_status(nested, rvi=max(_rvi(nested), vector), svi=_svi(nested))
    _evaluate(vcpu, nested)


def take_posted(vcpu: Vcpu, nested: NestedVmx) -> None:
    """SDM 3C "Posted-Interrupt Processing", from the clearing of the notification bit on."""
    descriptor = nested.fields[F.POSTED_INTERRUPT_DESCRIPTOR_ADDRESS]
    memory, highest = vcpu.memory, 0
    flags = descriptor + _POSTED_FLAGS
    memory.set_u64(flags, memory.u64(flags) & ~_OUTSTANDING)
    for word in range(8):
        requests = memory.u32(descriptor + 4 * word)
        if requests:
            memory.set_u32(descriptor + 4 * word, 0)
            offset = _VIRR + 16 * word
            write(vcpu, nested, offset, read(vcpu, nested, offset) | requests)
            highest = word * 32 + requests.bit_length() - 1
    _set_status(nested, rvi=max(_rvi(nested), highest), svi=_svi(nested))
    _evaluate(vcpu, nested)


def exit_behind(vcpu: Vcpu, nested: NestedVmx, reason: R, qualification: int) -> None:
    """A trap-like exit: it comes when the instruction is complete, before anything else."""
    nested.exit_behind = (reason, qualification)
    vcpu.attention = True


# -- evaluation and delivery --------------------------------------------------------------------


def _evaluate(vcpu: Vcpu, nested: NestedVmx) -> None:
    """SDM 3C "Evaluation of Pending Virtual Interrupts"."""
    window = nested.primary & PrimaryControls.interrupt_window_exiting
    vppr = read(vcpu, nested, _VPPR)
    nested.virtual_pending = not window and _rvi(nested) >> 4 > vppr >> 4 & 0xF
    vcpu.attention = True


def deliver(vcpu: Vcpu, nested: NestedVmx) -> int:
    """SDM 3C "Virtual-Interrupt Delivery"; the silicon's action."""
    if not nested.virtual_pending or not vcpu.interrupts_enabled:
        return RESUME
    vector = _rvi(nested)
    _bit(vcpu, nested, _VISR, vector, on=True)
    write(vcpu, nested, _VPPR, vector & _CLASS)
    _bit(vcpu, nested, _VIRR, vector, on=False)
    _set_status(nested, rvi=_highest(vcpu, nested, _VIRR), svi=vector)
    nested.virtual_pending = False
    vcpu.activity = Activity.ACTIVE
    vcpu.processor.request_window(False)
    return vcpu.processor.inject_interrupt(vector)
