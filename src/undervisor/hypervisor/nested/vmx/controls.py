"""What vmcs12's controls mean for the silicon: the intercepts of vmcb02, when they change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from undervisor.arch.vmx.controls import (
    EntryControls,
    ExitControls,
    PinBasedControls,
    PrimaryControls,
    SecondaryControls,
)
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.events import Vector
from undervisor.arch.x86.msr import Msr
from undervisor.hypervisor import intercepts
from undervisor.hypervisor.nested.vmx import apic
from undervisor.hypervisor.nested.vmx.state import Vmcs
from undervisor.silicon.world import Intercept, intercept_mask

if TYPE_CHECKING:
    from undervisor.hypervisor.nested.vmx import NestedVmx
    from undervisor.hypervisor.vcpu import Vcpu

_DESCRIPTOR_TABLES: Final = (
    Intercept.IDTR_READ,
    Intercept.GDTR_READ,
    Intercept.LDTR_READ,
    Intercept.TR_READ,
    Intercept.IDTR_WRITE,
    Intercept.GDTR_WRITE,
    Intercept.LDTR_WRITE,
    Intercept.TR_WRITE,
)
_SOFTWARE_EXCEPTIONS: Final = 1 << Vector.BP | 1 << Vector.OF
# Vectors that the exception bitmap covers: not NMI, and nothing above 31.
_EXCEPTIONS: Final = ((1 << 32) - 1) & ~(1 << Vector.NMI)


def merge(vcpu: Vcpu, nested: NestedVmx, vmcs: Vmcs) -> None:
    """Take over the controls of `vmcs` and set vmcb02's intercepts."""
    fields = vmcs.fields
    nested.pin = fields[F.PIN_BASED_CONTROLS]
    nested.primary = primary = fields[F.PRIMARY_CONTROLS]
    active = primary & PrimaryControls.activate_secondary_controls
    nested.secondary = secondary = fields[F.SECONDARY_CONTROLS] if active else 0
    nested.entry_controls = fields[F.ENTRY_CONTROLS]
    nested.exit_controls = fields[F.EXIT_CONTROLS]
    nested.tsc_offset = fields[F.TSC_OFFSET] if primary & PrimaryControls.use_tsc_offsetting else 0
    nested.tables_change = True
    _plan(vcpu, nested, fields)
    apic.merge(vcpu, nested, fields)
    nested.inputs_move = bool(primary & PrimaryControls.use_tpr_shadow)
    bits = [*intercepts.COMMON, *_wanted(fields, primary, secondary)]
    words = list(intercept_mask(*bits))
    words[2] |= fields[F.EXCEPTION_BITMAP] & _EXCEPTIONS
    if _page_faults_depend(fields):
        words[2] |= 1 << Vector.PF
    vcpu.vmcb02.b[0:24] = b"".join(word.to_bytes(4, "little") for word in words)


def _plan(vcpu: Vcpu, nested: NestedVmx, fields: dict[int, int]) -> None:
    """What transitions of this VMCS need beyond the usual, so that the usual is quick."""
    pin, primary, leaving = nested.pin, nested.primary, nested.exit_controls
    nested.ia32e_mode_guest = bool(nested.entry_controls & EntryControls.ia32e_mode_guest)
    nested.loads_debug = bool(nested.entry_controls & EntryControls.load_debug_controls)
    nested.loads_efer = bool(nested.entry_controls & EntryControls.load_efer)
    nested.enters_more = bool(
        nested.loads_debug
        or nested.entry_controls & EntryControls.load_pat
        or pin & (PinBasedControls.preemption_timer | PinBasedControls.virtual_nmis)
    )
    nested.saves_efer = bool(leaving & ExitControls.save_efer)
    nested.saves_more = bool(leaving & _SAVES or fields[F.EXIT_MSR_STORE_COUNT]) or bool(
        pin & PinBasedControls.preemption_timer
    )
    nested.loads_more = bool(leaving & ExitControls.load_pat or fields[F.EXIT_MSR_LOAD_COUNT])
    nested.loads_more |= vcpu.msrs.get(Msr.DEBUGCTL, 0) != 0 or nested.loads_debug
    nested.watchful = bool(
        primary & _WATCHED
        or pin & (PinBasedControls.preemption_timer | PinBasedControls.process_posted_interrupts)
        or nested.secondary & SecondaryControls.virtual_interrupt_delivery
    )


_SAVES: Final = ExitControls.save_debug_controls | ExitControls.save_pat
_WATCHED: Final = (
    PrimaryControls.interrupt_window_exiting
    | PrimaryControls.nmi_window_exiting
    | PrimaryControls.monitor_trap_flag
    | PrimaryControls.use_tpr_shadow
)


def _wanted(fields: dict[int, int], primary: int, secondary: int) -> list[Intercept]:
    """The intercepts that depend on L1's controls."""
    wanted: list[Intercept] = []
    if fields[F.CR0_GUEST_HOST_MASK]:
        wanted.append(Intercept.CR0_READ)
    if fields[F.CR4_GUEST_HOST_MASK]:
        wanted.append(Intercept.CR4_READ)
    if primary & PrimaryControls.cr3_store_exiting:
        wanted.append(Intercept.CR3_READ)
    if primary & PrimaryControls.invlpg_exiting:
        wanted.append(Intercept.INVLPG)
    if secondary & SecondaryControls.descriptor_table_exiting:
        wanted += _DESCRIPTOR_TABLES
    if fields[F.EXCEPTION_BITMAP] & _SOFTWARE_EXCEPTIONS:
        wanted.append(Intercept.INTN)
    return wanted


def _page_faults_depend(fields: dict[int, int]) -> bool:
    """Whether some page fault exits. SDM 3C "Exception Bitmap"."""
    if fields[F.EXCEPTION_BITMAP] >> Vector.PF & 1:
        return True
    return bool(fields[F.PAGE_FAULT_ERROR_CODE_MASK] or fields[F.PAGE_FAULT_ERROR_CODE_MATCH])
