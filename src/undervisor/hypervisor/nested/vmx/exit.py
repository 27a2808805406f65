"""VM exit: recording information, saving guest state, loading host state.

SDM 3C "VM Exits".  Guest state stays in vmcb02 until L1 asks for it; host state is prepared at
entry, so that leaving copies it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from undervisor.arch.vmx.controls import (
    EntryControls,
    ExitControls,
    InterruptibilityState,
    InterruptionType,
    PendingDebugExceptions,
    PinBasedControls,
)
from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.events import Vector
from undervisor.arch.x86.msr import Msr
from undervisor.arch.x86.registers import (
    DR7_FIXED_ONE,
    RFLAGS_FIXED_ONE,
    Cr0,
    Cr4,
    Efer,
    Rflags,
)
from undervisor.arch.x86.segments import Segment
from undervisor.hypervisor import describe
from undervisor.hypervisor.nested.vmx import msr_lists
from undervisor.hypervisor.nested.vmx.state import ACTIVITIES, Vmcs
from undervisor.hypervisor.vcpu import Activity
from undervisor.hypervisor.verdict import SWITCHED, Ending, Outcome, Stop, Verdict
from undervisor.silicon.world import VmcbField as V

if TYPE_CHECKING:
    from undervisor.hypervisor.nested.vmx import NestedVmx
    from undervisor.hypervisor.vcpu import Vcpu

_SAVE_AREA: Final = slice(V.ES_SELECTOR, V.CR2 + 8)
_CODE64, _CODE32, _DATA, _TSS = 0xA9B, 0xC9B, 0xC93, 0x08B
_FLAT: Final = 0xFFFF_FFFF
_MASK64: Final = (1 << 64) - 1
_TSS_LIMIT: Final = 0x67
_TABLE_LIMIT: Final = 0xFFFF
_VALID: Final = 1 << 31
_ONE_BYTE: Final[dict[int, bytes]] = {Vector.BP: b"\xcc", Vector.OF: b"\xce"}
_RIP, _RSP, _RFLAGS, _RAX = V.RIP >> 3, V.RSP >> 3, V.RFLAGS >> 3, V.RAX >> 3
_CR0, _CR2, _DR6, _EFER = V.CR0 >> 3, V.CR2 >> 3, V.DR6 >> 3, V.EFER >> 3
_SHADOW, _CS_ATTRIBUTES = V.INTERRUPT_SHADOW >> 3, V.CS_ATTRIBUTES >> 1
_LMA: Final = int(Efer.lma)
_LONG: Final = int(Efer.lma | Efer.lme)
_HOST_IS_LONG: Final = int(ExitControls.host_address_space_size)
# SDM 3C "VMX Aborts": problems saving guest MSRs and loading host MSRs.
_ABORT_SAVING_MSR: Final = 1
_ABORT_HOST_MSR: Final = 4
_UNBLOCKED: Final = 1 << 12
_TELL_UNBLOCKING: Final = frozenset(
    {ExitReason.EPT_VIOLATION, ExitReason.PAGE_MODIFICATION_LOG_FULL}
)
_STATES: Final = {activity: state for state, activity in ACTIVITIES.items()}
_DATA_SEGMENTS: Final = (
    (V.ES_SELECTOR, F.HOST_ES_SELECTOR, None),
    (V.SS_SELECTOR, F.HOST_SS_SELECTOR, None),
    (V.DS_SELECTOR, F.HOST_DS_SELECTOR, None),
    (V.FS_SELECTOR, F.HOST_FS_SELECTOR, F.HOST_FS_BASE),
    (V.GS_SELECTOR, F.HOST_GS_SELECTOR, F.HOST_GS_BASE),
)


def prepare_host_state(vcpu: Vcpu, nested: NestedVmx, vmcs: Vmcs) -> None:
    """What an exit loads, as a save area. SDM 3C "Loading Host State"."""
    host, fields = nested.host_vmcb, vmcs.fields
    controls = fields[F.EXIT_CONTROLS]
    long_mode = bool(controls & ExitControls.host_address_space_size)
    kept = Cr0.cd | Cr0.nw
    host.cr0 = fields[F.HOST_CR0] & ~kept | vcpu.state.cr0 & kept | Cr0.et
    host.cr3 = fields[F.HOST_CR3]
    cr4 = fields[F.HOST_CR4]
    host.cr4 = cr4 | Cr4.pae if long_mode else cr4 & ~Cr4.pcide
    host.dr7, host.rflags = DR7_FIXED_ONE, RFLAGS_FIXED_ONE
    host.rsp, host.rip = fields[F.HOST_RSP], fields[F.HOST_RIP]
    host.cpl, host.interrupt_shadow = 0, 0
    host.set_segment(
        V.CS_SELECTOR,
        Segment(fields[F.HOST_CS_SELECTOR], 0, _FLAT, _CODE64 if long_mode else _CODE32),
    )
    for where, selector, base in _DATA_SEGMENTS:
        value = fields[selector]
        start = fields[base] if base is not None else 0
        host.set_segment(where, Segment(value, start, _FLAT if value else 0, _DATA if value else 0))
    host.set_segment(
        V.TR_SELECTOR, Segment(fields[F.HOST_TR_SELECTOR], fields[F.HOST_TR_BASE], _TSS_LIMIT, _TSS)
    )
    host.set_segment(V.LDTR_SELECTOR, Segment(0, 0, 0, 0))
    host.gdtr_base, host.gdtr_limit = fields[F.HOST_GDTR_BASE], _TABLE_LIMIT
    host.idtr_base, host.idtr_limit = fields[F.HOST_IDTR_BASE], _TABLE_LIMIT
    host.sysenter_cs = fields[F.HOST_SYSENTER_CS]
    host.sysenter_esp = fields[F.HOST_SYSENTER_ESP]
    host.sysenter_eip = fields[F.HOST_SYSENTER_EIP]
    nested.loads_host_efer = bool(controls & ExitControls.load_efer)
    if nested.loads_host_efer:
        host.efer = fields[F.HOST_EFER]


def _host_efer(vcpu: Vcpu, nested: NestedVmx) -> int:
    """EFER after an exit that does not load it: as it is, with LMA and LME as the host's mode."""
    efer: int = vcpu.state.efer
    return efer | _LONG if nested.exit_controls & _HOST_IS_LONG else efer & ~_LONG


def leave(
    vcpu: Vcpu,
    nested: NestedVmx,
    reason: ExitReason,
    qualification: int = 0,
    *,
    length: int = 0,
    interruption: int = 0,
    error_code: int = 0,
    information: int = 0,
    linear: int = 0,
    physical: int = 0,
) -> Verdict:
    """A VM exit from L2 to L1, with its information."""
    vmcs = nested.vmx.current
    assert vmcs is not None, "L2 runs under a current VMCS"
    fields = vmcs.fields
    fields[F.EXIT_REASON] = reason
    fields[F.EXIT_QUALIFICATION] = qualification
    fields[F.EXIT_INSTRUCTION_LENGTH] = length
    fields[F.EXIT_INTERRUPTION_INFORMATION] = interruption
    fields[F.EXIT_INTERRUPTION_ERROR_CODE] = error_code
    fields[F.EXIT_INSTRUCTION_INFORMATION] = information
    fields[F.GUEST_LINEAR_ADDRESS] = linear
    fields[F.GUEST_PHYSICAL_ADDRESS] = physical
    nested.last = reason
    if nested.iret_unblocked or vcpu.step is not None or vcpu.stepped or nested.trap_pending:
        _end_step(vcpu, nested, fields, reason)
    record_vectoring(vcpu, nested, fields)
    save_guest_state(vcpu, nested, vmcs)
    count = fields[F.EXIT_MSR_STORE_COUNT]
    if count and msr_lists.store(vcpu, nested, fields[F.EXIT_MSR_STORE_ADDRESS], count):
        return _abort(vcpu, nested, _ABORT_SAVING_MSR, "MSR-store list has an entry not saved")
    return load_host_state(vcpu, nested, fields)


def _end_step(vcpu: Vcpu, nested: NestedVmx, fields: dict[int, int], reason: ExitReason) -> None:
    """A step ends with the exit; if it was IRET's, NMIs had been unblocked when it faulted.

    SDM 3C "Information About NMI Unblocking Due to IRET".
    """
    step = vcpu.step
    at_iret = step is not None and vcpu.state.rip == step.rip  # not at what IRET went to
    unblocked, nested.iret_unblocked = nested.iret_unblocked and at_iret, False
    vcpu.cancel_step()
    nested.trap_pending = False
    if not unblocked or vcpu.exit.event:
        return
    if reason == ExitReason.EXCEPTION_OR_NMI:
        information = fields[F.EXIT_INTERRUPTION_INFORMATION]
        if information >> 8 & 7 == 3 and information & 0xFF != Vector.DF:
            fields[F.EXIT_INTERRUPTION_INFORMATION] |= _UNBLOCKED
    elif reason in _TELL_UNBLOCKING:
        fields[F.EXIT_QUALIFICATION] |= _UNBLOCKED


def leave_failed_entry(vcpu: Vcpu, nested: NestedVmx, reason: int, qualification: int) -> Verdict:
    """SDM 3C "VM-Entry Failures During or After Loading Guest State"."""
    vmcs = nested.vmx.current
    assert vmcs is not None, "an entry needs a current VMCS"
    vmcs.fields[F.EXIT_REASON] = reason
    vmcs.fields[F.EXIT_QUALIFICATION] = qualification
    nested.exit_controls = vmcs.fields[F.EXIT_CONTROLS]
    vcpu.processor.save(vcpu.vmcb02 if vcpu.in_l2 else vcpu.vmcb01)
    if not vcpu.in_l2:  # vmcb02 was not touched; carry what no transition switches
        for field in (V.RAX, V.CR2, V.DR6):
            vcpu.vmcb02.q[field >> 3] = vcpu.vmcb01.q[field >> 3]
        nested.resident = None if nested.resident is not vmcs else nested.resident
    else:
        nested.resident = None
    return load_host_state(vcpu, nested, vmcs.fields)


def record_vectoring(vcpu: Vcpu, nested: NestedVmx, fields: dict[int, int]) -> None:
    """SDM 3C "Information for VM Exits That Occur During Event Delivery"."""
    event = vcpu.exit.event
    if not event:
        fields[F.IDT_VECTORING_INFORMATION] = 0
        return
    if event >> 8 & 7 >= InterruptionType.SOFTWARE_INTERRUPT and vcpu.state.is_int:
        event, length = _software_event(vcpu, event)
        fields[F.EXIT_INSTRUCTION_LENGTH] = length
        vcpu.state.rip = vcpu.state.rip - length & _MASK64
    fields[F.IDT_VECTORING_INFORMATION] = event & 0x8000_0FFF
    fields[F.IDT_VECTORING_ERROR_CODE] = event >> 32
    vcpu.exit.event = 0


def _software_event(vcpu: Vcpu, event: int) -> tuple[int, int]:
    """A software event as VMX names it, and the length of its instruction.

    The silicon has moved RIP behind the instruction, and calls INT3 and INTO software interrupts.
    """
    one_byte = _ONE_BYTE.get(event & 0xFF)
    if one_byte and event >> 8 & 7 == InterruptionType.SOFTWARE_INTERRUPT:
        before = vcpu.read_gva(vcpu.linear_rip() - 1 & _MASK64, 1)
        if before == one_byte:
            return event & ~0x700 | InterruptionType.SOFTWARE_EXCEPTION << 8, 1
    next_rip, length = vcpu.processor.software
    return (event, length) if next_rip == vcpu.state.rip else (event, 2)


def save_guest_state(vcpu: Vcpu, nested: NestedVmx, vmcs: Vmcs) -> None:
    """SDM 3C "Saving Guest State"."""
    vmcb, fields = vcpu.vmcb02, vmcs.fields
    vcpu.processor.save_vmx(vmcb)
    vmcs.stale = True
    q = vmcb.q
    fields[F.GUEST_RIP] = q[_RIP]
    fields[F.GUEST_RSP] = q[_RSP]
    fields[F.GUEST_RFLAGS] = q[_RFLAGS]
    fields[F.GUEST_CR0] = q[_CR0]
    attributes = vmcb.w[_CS_ATTRIBUTES]
    fields[F.GUEST_CS_ACCESS_RIGHTS] = attributes & 0xFF | (attributes & 0xF00) << 4
    fields[F.ENTRY_INTERRUPTION_INFORMATION] &= ~_VALID
    fields[F.GUEST_ACTIVITY_STATE] = _STATES[vcpu.activity]
    blocked = q[_SHADOW] & 1 or nested.virtual_nmi_blocked or vcpu.nmi_blocked
    fields[F.GUEST_INTERRUPTIBILITY_STATE] = 0
    fields[F.GUEST_PENDING_DEBUG_EXCEPTIONS] = nested.pending_debug
    if blocked:
        _save_blocking(vcpu, nested, fields)
    nested.pending_debug = 0
    long_mode = q[_EFER] & _LMA
    if nested.saves_efer:
        fields[F.GUEST_EFER] = q[_EFER]
    if nested.saves_more or bool(long_mode) != nested.ia32e_mode_guest:
        _save_more(vcpu, nested, vmcs)


def _save_more(vcpu: Vcpu, nested: NestedVmx, vmcs: Vmcs) -> None:
    """What an exit saves only when a control asks for it."""
    q, fields = vcpu.vmcb02.q, vmcs.fields
    controls = nested.exit_controls
    if controls & ExitControls.save_debug_controls:
        fields[F.GUEST_DR7] = q[V.DR7 >> 3]
        fields[F.GUEST_DEBUGCTL] = vcpu.msrs.get(Msr.DEBUGCTL, 0)
    if controls & ExitControls.save_pat:
        fields[F.GUEST_PAT] = vcpu.msrs[Msr.PAT]
    nested.save_timer(vcpu, fields)
    if nested.capabilities.misc.exit_stores_efer_lma:
        long_mode = q[V.EFER >> 3] & Efer.lma
        entry_controls = fields[F.ENTRY_CONTROLS] & ~EntryControls.ia32e_mode_guest
        new = entry_controls | (EntryControls.ia32e_mode_guest if long_mode else 0)
        if new != fields[F.ENTRY_CONTROLS]:
            fields[F.ENTRY_CONTROLS] = new
            nested.ia32e_mode_guest = bool(long_mode)


def _save_blocking(vcpu: Vcpu, nested: NestedVmx, fields: dict[int, int]) -> None:
    """The interruptibility state, and the single step that blocking by MOV SS holds back.

    SDM 3C "Saving Non-Register State".
    """
    state = _interruptibility(vcpu, nested)
    fields[F.GUEST_INTERRUPTIBILITY_STATE] = state
    if state & InterruptibilityState.blocking_by_mov_ss and vcpu.vmcb02.q[_RFLAGS] & Rflags.tf:
        fields[F.GUEST_PENDING_DEBUG_EXCEPTIONS] |= PendingDebugExceptions.bs


def _interruptibility(vcpu: Vcpu, nested: NestedVmx) -> int:
    value = 0
    if vcpu.vmcb02.q[V.INTERRUPT_SHADOW >> 3] & 1:
        value = (
            InterruptibilityState.blocking_by_mov_ss
            if nested.shadow_is_mov_ss(vcpu)
            else InterruptibilityState.blocking_by_sti
        )
    virtual = nested.pin & PinBasedControls.virtual_nmis
    if nested.virtual_nmi_blocked if virtual else vcpu.nmi_blocked:
        value |= InterruptibilityState.blocking_by_nmi
    return value


def load_host_state(vcpu: Vcpu, nested: NestedVmx, fields: dict[int, int]) -> Verdict:
    """SDM 3C "Loading Host State": L1 goes on at its host RIP."""
    host, q02 = vcpu.vmcb01, vcpu.vmcb02.q
    host.b[_SAVE_AREA] = nested.host_vmcb.b[_SAVE_AREA]
    q = host.q
    q[_RAX], q[_CR2], q[_DR6] = q02[_RAX], q02[_CR2], q02[_DR6]
    if not nested.loads_host_efer:
        q[_EFER] = _host_efer(vcpu, nested)
    vcpu.in_l2, vcpu.vmcb = False, host
    vcpu.activity = Activity.ACTIVE
    vcpu.attention = vcpu.has_pending
    vcpu.processor.request_window(False)
    vcpu.load_vmx(host)
    return _load_more(vcpu, nested, fields) if nested.loads_more else SWITCHED


def _load_more(vcpu: Vcpu, nested: NestedVmx, fields: dict[int, int]) -> Verdict:
    """What an exit loads only when a control asks for it, or an MSR is there to be cleared."""
    nested.save_msr(vcpu, Msr.DEBUGCTL, 0)
    if nested.exit_controls & ExitControls.load_pat:
        vcpu.msrs[Msr.PAT] = fields[F.HOST_PAT]
    if fields[F.EXIT_MSR_LOAD_COUNT]:
        address, count = fields[F.EXIT_MSR_LOAD_ADDRESS], fields[F.EXIT_MSR_LOAD_COUNT]
        if msr_lists.load(vcpu, nested, address, count):
            return _abort(vcpu, nested, _ABORT_HOST_MSR, "MSR-load list has an entry not loaded")
    return SWITCHED


def _abort(vcpu: Vcpu, nested: NestedVmx, indicator: int, why: str) -> Verdict:
    """A VMX abort: the processor enters the shutdown state."""
    assert nested.vmx.current is not None
    nested.vmx.store.abort(nested.vmx.current.gpa, indicator)
    text = f"VMX abort {indicator}: the VM-exit {why}"
    return Stop(Outcome(Ending.VMX_ABORT, f"{text}\n{describe.registers(vcpu)}"))
