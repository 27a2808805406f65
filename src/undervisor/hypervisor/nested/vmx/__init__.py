"""Nested VMX: what L0 shows of it to L1, and the worlds that it makes of a VMCS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from undervisor.arch.vmx.checks import EntryFailure
from undervisor.arch.vmx.ept import EptRules
from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.x86.events import Fault, Vector
from undervisor.arch.x86.msr import Msr
from undervisor.arch.x86.registers import Dr6
from undervisor.hypervisor import decode
from undervisor.hypervisor.exit import Exit
from undervisor.hypervisor.nested import Handler
from undervisor.hypervisor.nested.vmx import (
    apic,
    events,
    functions,
    instructions,
    paging,
    reflect,
    timers,
)
from undervisor.hypervisor.nested.vmx.state import Vmcs, VmcsStore, VmxState
from undervisor.hypervisor.nested_paging import NestedTables
from undervisor.hypervisor.vcpu import Activity
from undervisor.hypervisor.verdict import Verdict
from undervisor.silicon.processor import SiliconVmcb
from undervisor.silicon.world import ExitCode

if TYPE_CHECKING:
    from undervisor.hypervisor.vcpu import Vcpu

_L1_EXITS: Final[Mapping[int, Handler]] = {ExitCode.EXCP_UD: instructions.undefined}
_L2_EXITS: Final[Mapping[int, Handler]] = {ExitCode.IRET: events.iret}
_UNRESTRICTED: Final = 0x8000_0001  # CR0.PG and CR0.PE


class NestedVmx:
    """`Nested` for VMX.

    The words `pin` to `exit_controls` are those of the VMCS that runs; `resident` is the VMCS
    whose guest state vmcb02 holds, `host_of` the one that `host_vmcb` was prepared for.
    """

    l1_exits = _L1_EXITS
    l2_exits = _L2_EXITS

    def __init__(self, vcpu: Vcpu) -> None:
        assert vcpu.model.vmx is not None
        self.vcpu = vcpu
        self.capabilities = vcpu.model.vmx
        self.ept_rules = EptRules.of(self.capabilities)
        self.vmx = VmxState(VmcsStore(vcpu.memory, vcpu.model))
        self.writable = self._writable()
        self.host_vmcb = SiliconVmcb(vcpu.memory)
        self.last: ExitReason | str = ""
        self.ia32e_mode_guest = self.loads_debug = self.loads_efer = False
        self.loads_host_efer = self.saves_efer = self.enters_more = self.saves_more = (
            self.loads_more
        ) = False
        self.watchful = False
        self.tables_change = True
        self.failure: EntryFailure | None = None
        self.resident: Vmcs | None = None
        self.host_of: Vmcs | None = None
        self.pin = self.primary = self.secondary = 0
        self.entry_controls = self.exit_controls = 0
        self.tsc_offset = 0
        self.inputs_move = False
        self.eptp: int | None = None
        self.shadow: NestedTables | None = None
        self.shadows: dict[int, NestedTables] = {}
        self.apic_access_page: int | None = None
        self.flat: NestedTables | None = None
        self.tpr_shadow = self.virtual_pending = False
        self.exit_behind: tuple[ExitReason, int] | None = None
        self.virtual_nmi_blocked = False
        self.blocking_by_mov_ss = False
        self.shadow_rip = -1
        self.trap_pending = False
        self.pending_debug = 0
        self.iret_unblocked = False
        self.monitor_armed = False
        self.timer_deadline: int | None = None
        self.pause_first = self.pause_last = 0

    def _writable(self) -> frozenset[int]:
        """The fields that VMWRITE may write."""
        known = self.vmx.store.known
        anything = self.capabilities.misc.vmwrite_any_field
        return known if anything else known - instructions.READ_ONLY

    @property
    def reason(self) -> str:
        """The exit reason of the last transition, or what was wrong with an entry."""
        return self.last if isinstance(self.last, str) else self.last.name

    @reason.setter
    def reason(self, text: str) -> None:
        self.last = text

    # -- Nested --------------------------------------------------------------------------------

    def reflect(self, vcpu: Vcpu, exit: Exit) -> Verdict | None:
        """L1's controls decide, by a function per exit."""
        self.last = ""
        if exit.code == ExitCode.EXCP_DB:
            vcpu.debug_raised = Dr6.bs  # the silicon has no breakpoints
            held = events.hold_debug_trap(vcpu, self)
            if held is not None:
                return held
        wants = reflect.REFLECT.get(exit.code)
        return wants(vcpu, self, exit) if wants is not None else None

    def reflect_fault(self, vcpu: Vcpu, exit: Exit, fault: Fault) -> Verdict | None:
        """L1's exception bitmap decides."""
        if fault.vector == Vector.DB:
            held = events.hold_debug_trap(vcpu, self)
            if held is not None:
                return held
        if not reflect.wants_exception(self, fault.vector, fault.error_code or 0):
            if fault.vector == Vector.DB:
                events.deliver_debug(vcpu, self)
            return None
        return reflect.leave_for(vcpu, self, fault)

    def deliver(self, vcpu: Vcpu) -> int:
        """Pending events while L2 runs."""
        return events.deliver(vcpu, self)

    def take_init(self, vcpu: Vcpu) -> int | None:
        """INIT is blocked in VMX root operation and exits in non-root operation."""
        return events.take_init(vcpu, self)

    def to_hpa(self, vcpu: Vcpu, gpa: int, *, write: bool = False, tables: bool = False) -> int:
        """Through L1's EPT."""
        return paging.to_hpa(vcpu, self, gpa, write=write, tables=tables)

    def peek_gpa(self, vcpu: Vcpu, gpa: int) -> int:
        """A quadword of L2's guest-physical memory, without side effects."""
        return paging.read_gpa(vcpu, self, gpa)

    def allows_cr0(self, vcpu: Vcpu, value: int) -> bool:
        """Bits fixed in VMX operation; an unrestricted guest may clear PE and PG."""
        if not self.vmx.in_operation:
            return True
        fixed0 = self.capabilities.cr0_fixed0
        if vcpu.in_l2 and self.secondary & functions.UNRESTRICTED_GUEST:
            fixed0 &= ~_UNRESTRICTED
        return not fixed0 & ~value and not value & ~self.capabilities.cr0_fixed1 & 0xFFFF_FFFF

    def allows_cr4(self, vcpu: Vcpu, value: int) -> bool:
        """Bits fixed in VMX operation; VMXE among them."""
        if not self.vmx.in_operation:
            return True
        return (
            not self.capabilities.cr4_fixed0 & ~value and not value & ~self.capabilities.cr4_fixed1
        )

    def allows_fixed(self, vcpu: Vcpu, cr0: int, cr4: int) -> bool:
        """Whether VMX operation may begin with these control registers."""
        caps = self.capabilities
        good0 = not caps.cr0_fixed0 & ~cr0 and not cr0 & ~caps.cr0_fixed1
        return good0 and not caps.cr4_fixed0 & ~cr4 and not cr4 & ~caps.cr4_fixed1

    def allows_instruction(self, vcpu: Vcpu, feature: str) -> bool:
        """The secondary control that enables an instruction in L2, where there is one."""
        if not vcpu.in_l2:
            return True
        control = functions.ENABLING_CONTROLS.get(feature)
        return control is None or bool(self.secondary & control)

    def deadline(self) -> int | None:
        """The VMX-preemption timer; in the wait-for-SIPI state it causes no exit."""
        return None if self.vcpu.activity is Activity.WAIT_FOR_SIPI else self.timer_deadline

    def reset(self, vcpu: Vcpu) -> None:
        """VMX operation ends; VMCS data that were cached are lost, as by INIT."""
        self.leave_operation(vcpu)

    # -- for the modules beside ----------------------------------------------------------------

    @property
    def fields(self) -> dict[int, int]:
        """The fields of the VMCS that runs."""
        assert self.vmx.current is not None
        return self.vmx.current.fields

    def leave_operation(self, vcpu: Vcpu) -> None:
        """VMXOFF, or INIT outside VMX operation."""
        self.vmx.set_current(None, vcpu.vmcb02)
        self.vmx.in_operation = False
        self.resident = self.host_of = None
        paging.release(self)
        apic.release(vcpu, self)

    def save_msr(self, vcpu: Vcpu, number: Msr, value: int) -> None:
        """Set an MSR that the model may lack."""
        if number in vcpu.msrs:
            vcpu.msrs[number] = value

    def shadow_is_mov_ss(self, vcpu: Vcpu) -> bool:
        """Whether it is MOV SS or POP SS, not STI, whose shadow L2's next instruction is in."""
        return events.shadow_is_mov_ss(vcpu, self)

    def block_nmi(self, vcpu: Vcpu) -> None:
        """An NMI is injected: NMIs are blocked until IRET."""
        events.block_nmi(vcpu, self)

    def start_timer(self, vcpu: Vcpu, value: int) -> None:
        """VM entry: the preemption timer counts from `value`."""
        timers.start(vcpu, self, value)

    def save_timer(self, vcpu: Vcpu, fields: dict[int, int]) -> None:
        """VM exit: the preemption timer stops, and is saved on demand."""
        timers.save(vcpu, self, fields)

    def is_pause_loop(self, vcpu: Vcpu) -> bool:
        """PAUSE-loop exiting."""
        return timers.is_pause_loop(vcpu, self)

    def vmfunc(self, vcpu: Vcpu, decoded: decode.Instruction) -> Verdict | None:
        """VMFUNC in L2."""
        return functions.vmfunc(vcpu, self, decoded)

    def shadow_access(self, vcpu: Vcpu, decoded: decode.Instruction) -> Verdict | None:
        """VMREAD or VMWRITE of L2 under VMCS shadowing."""
        return functions.shadow_access(vcpu, self, decoded)
