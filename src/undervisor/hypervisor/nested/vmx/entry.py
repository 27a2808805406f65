"""VM entry: checks, merging vmcs12 into vmcb02, loading guest state, injecting an event.

SDM 3C "VM Entries".  A VMCS that was entered before is mostly in vmcb02 already: only what L1 has
written since is checked and loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from undervisor.arch.vmx.checks import EntryInput, refresh_inputs
from undervisor.arch.vmx.controls import (
    EntryControls,
    InterruptionType,
)
from undervisor.arch.vmx.ept import Eptp
from undervisor.arch.vmx.errors import VmInstructionError
from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import FieldArea
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.msr import Msr
from undervisor.arch.x86.registers import Cr0, Efer
from undervisor.arch.x86.segments import UNUSABLE, Segment, attributes_of
from undervisor.hypervisor.nested.vmx import apic, controls, events, exit, msr_lists, paging
from undervisor.hypervisor.nested.vmx.state import ACTIVITIES, PLAIN, SEGMENTS, Vmcs
from undervisor.hypervisor.vcpu import Activity
from undervisor.hypervisor.verdict import SWITCHED, Switched, Verdict
from undervisor.silicon.layout import Env
from undervisor.silicon.processor import RESUME, SiliconVmcb
from undervisor.silicon.world import VmcbField as V

if TYPE_CHECKING:
    from undervisor.hypervisor.nested.vmx import NestedVmx
    from undervisor.hypervisor.vcpu import Vcpu

# Fields that L1 writes at almost every exit and whose rules read no lazy field but CS.
_QUIET: Final = frozenset(
    {
        F.GUEST_RIP,
        F.GUEST_RSP,
        F.ENTRY_INTERRUPTION_INFORMATION,
        F.ENTRY_EXCEPTION_ERROR_CODE,
        F.ENTRY_INSTRUCTION_LENGTH,
        F.PREEMPTION_TIMER_VALUE,
        F.GUEST_INTERRUPTIBILITY_STATE,
    }
)
_CONTROL_FIELDS: Final = frozenset(int(f) for f in F if f.area is FieldArea.CONTROL) - {
    F.ENTRY_INTERRUPTION_INFORMATION,
    F.ENTRY_EXCEPTION_ERROR_CODE,
    F.ENTRY_INSTRUCTION_LENGTH,
}
_HOST_FIELDS: Final = frozenset(int(f) for f in F if f.area is FieldArea.HOST) | {F.EXIT_CONTROLS}
_FAILURE: Final = 1 << 31
_RAX, _CR2, _DR6, _DR7 = V.RAX >> 3, V.CR2 >> 3, V.DR6 >> 3, V.DR7 >> 3
_SHADOW, _EFER = V.INTERRUPT_SHADOW >> 3, V.EFER >> 3
_LONG: Final = int(Efer.lma | Efer.lme)
_LIVE_CR2, _LIVE_DR6, _LIVE_DR7 = Env.CR2 >> 3, Env.DR6 >> 3, Env.DR7 >> 3
_KEPT_CR0: Final = Cr0.cd | Cr0.nw


def is_eptp_valid(nested: NestedVmx, eptp: int) -> bool:
    """SDM 3C "VM-Execution Control Fields", the checks of the EPTP."""
    value, ept = Eptp(eptp), nested.capabilities.ept_vpid
    kind = value.memory_type
    if not (ept.memory_type_wb if kind == 6 else ept.memory_type_uc if kind == 0 else False):
        return False
    if not (value.walk_length == 3 and ept.walk_length_4):
        return False
    if value.accessed_dirty and not ept.accessed_dirty:
        return False
    return not eptp & (nested.capabilities.beyond_maxphyaddr | 0xF80)


def enter(
    vcpu: Vcpu, nested: NestedVmx, vmcs: Vmcs, *, launch: bool
) -> Verdict | VmInstructionError:
    """VMLAUNCH or VMRESUME after the checks of the instruction itself."""
    written = vmcs.written
    fresh = nested.resident is not vmcs
    if fresh or not written <= _QUIET:
        vmcs.synchronize(vcpu.vmcb02)
        written |= refresh_inputs(vmcs.fields, vcpu.memory.u64, _facts(vcpu, vmcs))
    elif nested.inputs_move:
        written |= refresh_inputs(vmcs.fields, vcpu.memory.u64, _facts(vcpu, vmcs))
    failure = vmcs.checker.check(vmcs.fields, written)
    if failure is not None:
        nested.failure = failure
        if failure.error is not None:
            return failure.error
        assert failure.exit_reason is not None
        nested.reason = f"VM-entry failure: {failure.violation}"
        _prepare_host(vcpu, nested, vmcs, written, fresh=fresh)
        reason = failure.exit_reason | _FAILURE
        return exit.leave_failed_entry(vcpu, nested, reason, failure.qualification)
    _prepare_host(vcpu, nested, vmcs, written, fresh=fresh)
    if fresh or not _CONTROL_FIELDS.isdisjoint(written):
        controls.merge(vcpu, nested, vmcs)
    load_guest_state(vcpu, nested, vmcs, fresh=fresh)
    return _launch(vcpu, nested, vmcs, launch=launch)


def _facts(vcpu: Vcpu, vmcs: Vmcs) -> dict[int, int]:
    return {
        EntryInput.LONG_MODE_ACTIVE: int(bool(vcpu.state.efer & Efer.lma)),
        EntryInput.IN_SMM: 0,
        EntryInput.TRACING: 0,
        EntryInput.CURRENT_VMCS: vmcs.gpa,
        EntryInput.LINKED_VMCS: 0,
    }


def _prepare_host(
    vcpu: Vcpu, nested: NestedVmx, vmcs: Vmcs, written: set[int], *, fresh: bool
) -> None:
    if fresh or nested.host_of is not vmcs or not _HOST_FIELDS.isdisjoint(written):
        exit.prepare_host_state(vcpu, nested, vmcs)
        nested.host_of = vmcs


def load_guest_state(vcpu: Vcpu, nested: NestedVmx, vmcs: Vmcs, *, fresh: bool) -> None:
    """Bring vmcb02 up to date. SDM 3C "Loading Guest State"."""
    vmcb, fields = vcpu.vmcb02, vmcs.fields
    for name in vmcs.written if not fresh else _LOADERS:
        loader = _LOADERS.get(name)
        if loader is not None:
            loader(vmcb, fields)
    q, live = vmcb.q, vcpu.state.q
    q[_RAX], q[_CR2], q[_DR6] = live[0], live[_LIVE_CR2], live[_LIVE_DR6]
    if not nested.loads_debug:
        q[_DR7] = live[_LIVE_DR7]
    shadows = fields[F.GUEST_INTERRUPTIBILITY_STATE]
    q[_SHADOW] = 1 if shadows & 3 else 0
    nested.blocking_by_mov_ss = bool(shadows & 2)
    if fresh or nested.enters_more or not vmcs.written <= _QUIET:
        _load_more(vcpu, nested, vmcs, fresh=fresh)
    elif not nested.loads_efer:
        q[_EFER] = guest_efer(vcpu, nested, fields)


def _load_more(vcpu: Vcpu, nested: NestedVmx, vmcs: Vmcs, *, fresh: bool) -> None:
    """What does not change between the entries of a VMCS that is only resumed."""
    vmcb, fields, state = vcpu.vmcb02, vmcs.fields, vcpu.state
    q = vmcb.q
    q[V.CR0 >> 3] = fields[F.GUEST_CR0] & ~_KEPT_CR0 | state.cr0 & _KEPT_CR0 | Cr0.et
    if nested.loads_debug:
        q[_DR7] = fields[F.GUEST_DR7] & 0xFFFF_FFFF | 0x400
        nested.save_msr(vcpu, Msr.DEBUGCTL, fields[F.GUEST_DEBUGCTL])
    q[_EFER] = guest_efer(vcpu, nested, fields)
    if fresh or F.GUEST_SS_ACCESS_RIGHTS in vmcs.written:
        vmcb.cpl = attributes_of(fields[F.GUEST_SS_ACCESS_RIGHTS]) >> 5 & 3
    if nested.entry_controls & EntryControls.load_pat:
        vcpu.msrs[Msr.PAT] = fields[F.GUEST_PAT]


def guest_efer(vcpu: Vcpu, nested: NestedVmx, fields: dict[int, int]) -> int:
    """EFER for L2: loaded, or L1's with LMA and LME as the entry controls say."""
    if nested.loads_efer:
        return fields[F.GUEST_EFER]
    efer: int = vcpu.state.efer
    if nested.ia32e_mode_guest:
        return efer | _LONG
    efer &= ~Efer.lma
    return efer & ~Efer.lme if fields[F.GUEST_CR0] & Cr0.pg else efer


def _launch(vcpu: Vcpu, nested: NestedVmx, vmcs: Vmcs, *, launch: bool) -> Verdict:
    """The committed half: MSRs, the world switch, timers, blocking and the event."""
    fields = vmcs.fields
    vcpu.in_l2, vcpu.vmcb = True, vcpu.vmcb02
    if nested.tables_change:
        paging.activate(vcpu, nested, vmcs)
        nested.tables_change = False
    events.load_blocking(vcpu, nested, fields)
    vcpu.load_vmx(vcpu.vmcb02)
    if vcpu.nmi_blocked or nested.virtual_nmi_blocked:
        events.watch_iret(vcpu, nested)
    nested.resident = vmcs
    vcpu.l2_tsc_offset = nested.tsc_offset
    if fields[F.ENTRY_MSR_LOAD_COUNT]:
        number = msr_lists.load(
            vcpu, nested, fields[F.ENTRY_MSR_LOAD_ADDRESS], fields[F.ENTRY_MSR_LOAD_COUNT]
        )
        if number:
            reason = ExitReason.ENTRY_FAILURE_MSR_LOADING | _FAILURE
            return exit.leave_failed_entry(vcpu, nested, reason, number)
    vmcs.written.clear()
    if launch:
        vmcs.launched = True
    if nested.enters_more:
        nested.start_timer(vcpu, fields[F.PREEMPTION_TIMER_VALUE])
    if nested.tpr_shadow:
        apic.at_entry(vcpu, nested)
    vcpu.activity = ACTIVITIES[fields[F.GUEST_ACTIVITY_STATE]]
    vcpu.attention = nested.watchful or vcpu.activity is not Activity.ACTIVE or vcpu.has_pending
    if fields[F.GUEST_PENDING_DEBUG_EXCEPTIONS]:
        events.load_pending_debug(vcpu, nested, fields)
    if not fields[F.ENTRY_INTERRUPTION_INFORMATION] >> 31:
        return SWITCHED
    deliver = inject_event(vcpu, nested, fields)
    if deliver != RESUME:
        events.delivered(vcpu, nested)
    return Switched(deliver)


def inject_event(vcpu: Vcpu, nested: NestedVmx, fields: dict[int, int]) -> int:
    """SDM 3C "Event Injection"; the silicon's action."""
    information = fields[F.ENTRY_INTERRUPTION_INFORMATION]
    vector, kind = information & 0xFF, information >> 8 & 7
    length = fields[F.ENTRY_INSTRUCTION_LENGTH]
    processor = vcpu.processor
    if kind != InterruptionType.OTHER_EVENT:
        vcpu.activity = Activity.ACTIVE
    if kind == InterruptionType.EXTERNAL_INTERRUPT:
        return processor.inject_interrupt(vector)
    if kind == InterruptionType.NMI:
        nested.block_nmi(vcpu)
        return processor.inject_nmi()
    if kind == InterruptionType.HARDWARE_EXCEPTION:
        code = fields[F.ENTRY_EXCEPTION_ERROR_CODE] if information & 0x800 else None
        return processor.inject_exception(vector, code)
    if kind == InterruptionType.OTHER_EVENT:
        nested.trap_pending = vcpu.attention = True
        return RESUME
    return processor.inject_software(vector, length, kind)


# -- how a field reaches vmcb02 -----------------------------------------------------------------


def _plain(field: F, target: V):  # type: ignore[no-untyped-def]
    if target.width == 8:
        index = target >> 3

        def load(vmcb: SiliconVmcb, fields: dict[int, int]) -> None:
            vmcb.q[index] = fields[field]

        return load

    def load_narrow(vmcb: SiliconVmcb, fields: dict[int, int]) -> None:
        vmcb[target] = fields[field]

    return load_narrow


def _segment(name: str, where: V):  # type: ignore[no-untyped-def]
    selector, base = F[f"GUEST_{name}_SELECTOR"], F[f"GUEST_{name}_BASE"]
    limit, rights = F[f"GUEST_{name}_LIMIT"], F[f"GUEST_{name}_ACCESS_RIGHTS"]

    def load(vmcb: SiliconVmcb, fields: dict[int, int]) -> None:
        attributes = attributes_of(fields[rights]) if not fields[rights] & UNUSABLE else 0
        if fields[rights] & UNUSABLE and name == "SS":
            attributes = fields[rights] & 0x60  # its DPL is the CPL all the same
        vmcb.set_segment(where, Segment(fields[selector], fields[base], fields[limit], attributes))

    return {selector: load, base: load, limit: load, rights: load}


_LOADERS = {
    **{int(field): _plain(field, target) for field, target in PLAIN.items()},
    **{int(f): load for name, where in SEGMENTS for f, load in _segment(name, where).items()},
}
