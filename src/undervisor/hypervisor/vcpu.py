"""A virtual processor: what L0 keeps beside the state that the silicon holds while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final, Protocol

from undervisor.arch.bits import plain_members
from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.svm.vmcb import VmcbField
from undervisor.arch.x86.boot import BootMode, BootState
from undervisor.arch.x86.cpuid import Vendor
from undervisor.arch.x86.events import DB, Fault, GuestFault
from undervisor.arch.x86.msr import Msr
from undervisor.arch.x86.paging import (
    USER,
    WRITE,
    PageFault,
    PagingRules,
    accessed_dirty_updates,
    paging_rules,
    walk,
)
from undervisor.arch.x86.registers import (
    DR6_FIXED_ONE,
    DR7_FIXED_ONE,
    RFLAGS_FIXED_ONE,
    Cr0,
    Cr4,
    Dr6,
    Dr7,
    Rflags,
)
from undervisor.arch.x86.segments import Segment, real_mode_segment
from undervisor.hypervisor.models.leaves import CpuidState
from undervisor.hypervisor.verdict import RESUME, Inject, Verdict
from undervisor.silicon.layout import Env, Hflags
from undervisor.silicon.memory import PAGE
from undervisor.silicon.processor import RESUME as RUN_ON
from undervisor.silicon.processor import SiliconVmcb

if TYPE_CHECKING:
    from undervisor.devices.lapic import Lapic
    from undervisor.hypervisor.exit import Exit
    from undervisor.hypervisor.machine import Machine
    from undervisor.hypervisor.nested import Handler, Nested

# The silicon keeps intercept words 3 and 4 as one quadword.
IRET_MASK: Final = 1 << (Intercept.IRET - Intercept.INTR)
_RIP, _RFLAGS, _HFLAGS = Env.RIP >> 3, Env.RFLAGS >> 3, Env.HFLAGS >> 2
_CODE64, _SHADOW = 1 << Hflags.CS64, 1 << Hflags.INTERRUPT_SHADOW
_TRAP_FLAG: Final = 0x100
_INTERRUPT_FLAG: Final = 0x200
_ALIGNMENT_CHECK: Final = 0x40000
_MASK64: Final = (1 << 64) - 1


@plain_members
class Activity(Enum):
    """SDM 3C "Guest Non-Register State" (activity state); all vendors have these."""

    ACTIVE = 0
    HALTED = 1
    SHUTDOWN = 2
    WAIT_FOR_SIPI = 3


class Window(Protocol):
    """A page of L1's memory whose accesses by L2 go elsewhere, at host-physical `page`."""

    page: int

    def load(self, hpa: int, size: int) -> int:
        """Read `size` bytes; GuestExit where L1 must see the access."""

    def store(self, hpa: int, size: int, value: int) -> None:
        """Write `size` bytes; GuestExit where L1 must see the access."""


@dataclass(slots=True)
class Step:
    """One instruction that is being stepped over: where it began, and when."""

    rip: int
    count: int
    blocks: int


class Vcpu:
    """One logical processor of L1.

    `vmcb01` is what our L0 hands to the silicon for L1, `vmcb02` for L2; `vmcb` is the one that
    runs.  `state` is the silicon's live state and belongs to this vCPU only while it is the
    machine's current one; what rests is in `parked`.
    """

    lapic: Lapic
    nested: Nested
    exit: Exit
    l1_handlers: dict[int, Handler]
    l2_handlers: dict[int, Handler]

    def __init__(self, machine: Machine, index: int) -> None:
        self.machine = machine
        self.index = index
        self.memory = machine.memory
        self.processor = machine.processor
        self.state = machine.processor.state
        self.model = machine.model
        self.msrs: dict[int, int] = dict(machine.model.msrs())
        self.vmcb01 = SiliconVmcb(self.memory)
        self.vmcb02 = SiliconVmcb(self.memory)
        self.vmcb = self.vmcb01
        self.in_l2 = False
        self.activity = Activity.ACTIVE if index == 0 else Activity.WAIT_FOR_SIPI
        self.attention = False
        self.step: Step | None = None
        self.stepped = False
        self.dr6_before = 0
        self.debug_raised = 0
        self.window: Window | None = None
        self.nmi_pending = 0
        self.nmi_blocked = False
        self.smi_pending = False
        self.init_pending = False
        self.sipi_vector: int | None = None
        self.gif = True
        self.window_wanted = False
        self.debug_conditions = 0  # DR6 bits of breakpoints that the instruction has met
        self.tsc_offset = 0
        self.tsc_adjust: int = 0
        self.l2_tsc_offset = 0
        self.rules = machine.model.processor
        self.msr_specs = machine.model.msr_table
        self.is_amd = machine.model.vendor is Vendor.AMD
        self._has_1g_pages = machine.model.has("pdpe1gb")
        self.linear: int | None = None  # what `translate` looked for last
        self.parked: bytes | None = None

    # -- what devices tell it (InterruptSink) --------------------------------------------------

    def nmi(self) -> None:
        """An NMI arrived: one is kept while one is being handled, and one about to be."""
        self.nmi_pending = min(self.nmi_pending + 1, 1 if self.nmi_blocked else 2)
        self.attention = True

    def init(self) -> None:
        """An INIT arrived."""
        self.init_pending = True
        self.attention = True

    def sipi(self, vector: int) -> None:
        """A startup IPI arrived."""
        self.sipi_vector = vector
        self.attention = True

    def smi(self) -> None:
        """An SMI arrived.  L1 may intercept it in L2; system-management mode is not modelled."""
        self.smi_pending = True
        self.attention = True

    def wake(self) -> None:
        """The local APIC has an interrupt to deliver."""
        self.attention = True

    @property
    def has_pending(self) -> bool:
        """Whether any event waits for this processor."""
        if self.nmi_pending or self.init_pending or self.smi_pending:
            return True
        return self.lapic.pending() is not None

    # -- worlds --------------------------------------------------------------------------------

    def reload(self, change: Callable[[SiliconVmcb], None]) -> None:
        """Change control registers or segments of the running world, at rest."""
        self.processor.save(self.vmcb)
        self.processor.save_extra(self.vmcb)
        change(self.vmcb)
        self.load(self.vmcb)
        self.processor.load_extra(self.vmcb)

    def load(self, vmcb: SiliconVmcb) -> None:
        """Make `vmcb` the running world; what VMLOAD loads is the caller's."""
        self.processor.load(vmcb)
        self.watch_iret()

    def watch_iret(self) -> None:
        """Of a world just loaded: NMIs may be blocked until its next IRET."""
        if self.nmi_blocked:
            self.state.intercepts |= IRET_MASK

    def load_vmx(self, vmcb: SiliconVmcb) -> None:
        """Make `vmcb` the running world, with all that VMX transitions load."""
        self.processor.load_vmx(vmcb)
        if self.nmi_blocked:
            self.state.intercepts |= IRET_MASK

    def set_cr0(self, value: int) -> None:
        """Load CR0 and the EFER.LMA that follows from it."""
        efer = self.state.efer
        active = efer & 0x100 and value & Cr0.pg
        efer = efer | 0x400 if active else efer & ~0x400

        def change(vmcb: SiliconVmcb) -> None:
            vmcb.cr0, vmcb.efer = value, efer

        self.reload(change)

    def set_cr4(self, value: int) -> None:
        """Load CR4."""
        self.reload(lambda vmcb: setattr(vmcb, "cr4", value))

    def set_efer(self, value: int) -> None:
        """Load EFER."""
        self.reload(lambda vmcb: setattr(vmcb, "efer", value))

    def set_cr3(self, value: int) -> None:
        """Load CR3 and drop translations."""
        self.state.cr3 = value
        self.processor.flush()

    # -- instructions --------------------------------------------------------------------------

    def advance(self, length: int) -> int:
        """Complete an instruction of `length` bytes; the silicon's action to go on with."""
        self.pass_over(length)
        if self.state.q[_RFLAGS] & _TRAP_FLAG or self.debug_conditions:
            return self.machine.raise_trap(self, self._debug_trap())
        return RUN_ON

    def pass_over(self, length: int) -> None:
        """RIP goes behind an instruction of `length` bytes, and the interrupt shadow ends."""
        q, d = self.state.q, self.state.d
        rip, hflags = q[_RIP] + length, d[_HFLAGS]
        q[_RIP] = rip if hflags & _CODE64 else rip & 0xFFFF_FFFF
        if hflags & _SHADOW:
            d[_HFLAGS] = hflags & ~_SHADOW

    def _debug_trap(self) -> Fault:
        """The #DB after an instruction or an iteration, with DR6 saying why."""
        step = Dr6.bs if self.state.q[17] & _TRAP_FLAG else 0
        self.raise_debug(self.debug_conditions | step)
        self.debug_conditions = 0
        return DB

    def raise_debug(self, conditions: int) -> None:
        """A debug exception for `conditions`, in DR6's form, which a VM exit may take back."""
        self.dr6_before, self.debug_raised = self.state.dr6, conditions
        self.state.dr6 |= conditions

    def take_back_debug(self) -> int:
        """DR6 and DR7 are as before `raise_debug`, whose conditions are given back."""
        state, raised = self.state, self.debug_raised
        state.dr6, self.debug_raised = self.dr6_before, 0
        if raised & Dr6.bd:
            state.dr7 |= Dr7.gd
        return raised

    def stops_after_iteration(self, conditions: int) -> bool:
        """Whether a repeated string instruction traps now: a single step, or `conditions`."""
        self.debug_conditions |= conditions
        if self.step is not None or self.attention:
            return True
        return bool(self.debug_conditions or self.state.q[17] & _TRAP_FLAG)

    def interrupted_iteration(self) -> Verdict:
        """A repeated string instruction is not finished: run it again, after a #DB that is due."""
        if self.debug_conditions or self.state.q[17] & _TRAP_FLAG:
            return Inject(self._debug_trap())
        return RESUME

    def begin_step(self) -> None:
        """Run one instruction, or one iteration with REP; then `stepped` and `attention` are set.

        What is delivered first or in the instruction's place ends the step behind the delivery.
        An instruction that L0 carries out, or must let begin again, makes no difference.
        """
        state = self.state
        self.step = Step(state.q[16], state.q[1], self.processor.blocks)

    def cancel_step(self) -> None:
        """The world is left: the step ends with nobody told."""
        self.step, self.stepped = None, False

    def end_step(self) -> None:
        """The step is over."""
        self.step, self.stepped, self.attention = None, True, True

    def inject(self, fault: Fault) -> int:
        """Prepare an exception of the running world; the silicon's action that delivers it."""
        if fault.address is not None:
            self.state.cr2 = fault.address
        self.dr6_before = self.state.dr6
        return self.processor.inject_exception(fault.vector, fault.error_code)

    @property
    def interrupts_enabled(self) -> bool:
        """Whether the running world takes maskable interrupts at this instruction."""
        return bool(self.state.q[17] & _INTERRUPT_FLAG) and not self.state.interrupt_shadow

    # -- what the model says ------------------------------------------------------------------

    def has(self, feature: str) -> bool:
        """Whether the CPU model has a feature, by name."""
        return feature in self.model.features

    def cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """CPUID on this processor as it is now."""
        now = CpuidState(
            apic_id=self.index,
            cpus=len(self.machine.vcpus),
            osxsave=bool(self.state.cr4 & Cr4.osxsave),
            apic_enabled=self.lapic.enabled,
            misc_enable=self.msrs.get(Msr.MISC_ENABLE, 0),
        )
        return self.model.cpuid(leaf, subleaf, now)

    def all_msrs(self) -> dict[int, int]:
        """The MSRs that rules about other MSRs look at."""
        self.msrs[Msr.EFER] = self.state.efer
        return self.msrs

    def tsc01(self) -> int:
        """L1's time-stamp counter."""
        return self.machine.now() + self.tsc_offset & _MASK64

    def tsc(self) -> int:
        """The time-stamp counter of the running world."""
        offset = self.tsc_offset + (self.l2_tsc_offset if self.in_l2 else 0)
        return self.machine.now() + offset & _MASK64

    def move_tsc(self, change: int) -> None:
        """A write of the TSC or of TSC_ADJUST: both move by `change`."""
        self.tsc_offset += change
        self.tsc_adjust += change
        self.lapic.timer.tsc_offset = self.tsc_offset

    # -- memory --------------------------------------------------------------------------------

    def read_gpa_u64(self, gpa: int) -> int:
        """A quadword of the running world's guest-physical memory."""
        return self.memory.u64(self.nested.to_hpa(self, gpa, tables=True) if self.in_l2 else gpa)

    def paging_rules(self) -> PagingRules:
        """How the running world's control registers say that linear addresses are translated."""
        state = self.state
        return paging_rules(
            state.cr0,
            state.cr4,
            state.efer,
            self.model.physical_width,
            page1gb=self._has_1g_pages,
            amd=self.is_amd,
        )

    def translate(self, gva: int, access: int = 0, *, system: bool = False) -> int | Fault:
        """The host-physical address of a linear address, or the page fault; sets A and D.

        `system`: an implicit supervisor access, to a descriptor table or a TSS.
        """
        state = self.state
        self.linear = gva
        if not system and state.cpl == 3:
            access |= USER
        result = walk(
            self.paging_rules(),
            state.cr3,
            gva,
            access,
            self.read_gpa_u64,
            ac=not system and bool(state.q[17] & _ALIGNMENT_CHECK),
        )
        if isinstance(result, PageFault):
            return result.fault()
        for entry, value in accessed_dirty_updates(result, access):
            hpa = self.nested.to_hpa(self, entry, write=True, tables=True) if self.in_l2 else entry
            self.memory.set_u64(hpa, value)
        if not self.in_l2:
            return result.gpa
        return self.nested.to_hpa(self, result.gpa, write=bool(access & WRITE))

    def read_gva(
        self, gva: int, size: int, access: int = 0, *, system: bool = False
    ) -> bytes | Fault:
        """`size` bytes at a linear address, or the page fault."""
        data = b""
        while size:
            part = min(size, PAGE - gva % PAGE)
            hpa = self.translate(gva, access, system=system)
            if isinstance(hpa, Fault):
                return hpa
            data += self.memory.read(hpa, part)
            gva, size = gva + part & _MASK64, size - part
        return data

    def read_gva_system(self, gva: int, size: int) -> bytes:
        """An implicit supervisor access to a system table; GuestFault where it faults."""
        data = self.read_gva(gva, size, system=True)
        if isinstance(data, Fault):
            raise GuestFault(data)
        return data

    def write_gva(self, gva: int, data: bytes, *, system: bool = False) -> Fault | None:
        """Write at a linear address; the page fault, with nothing written, where there is one."""
        pieces = []
        while data:
            part = min(len(data), PAGE - gva % PAGE)
            hpa = self.translate(gva, WRITE, system=system)
            if isinstance(hpa, Fault):
                return hpa
            pieces.append((hpa, data[:part]))
            gva, data = gva + part & _MASK64, data[part:]
        for hpa, piece in pieces:
            self.memory.write(hpa, piece)
        return None

    def write_gva_system(self, gva: int, data: bytes) -> Fault | None:
        """An implicit supervisor write of a system table."""
        return self.write_gva(gva, data, system=True)

    # -- starting ------------------------------------------------------------------------------

    def reset(self) -> None:
        """The state after power-up or INIT. SDM 3A "Processor State After Reset"."""
        vmcb = self.vmcb01
        for field in (VmcbField.ES_SELECTOR, VmcbField.SS_SELECTOR, VmcbField.DS_SELECTOR):
            vmcb.set_segment(field, real_mode_segment(0))
        for field in (VmcbField.FS_SELECTOR, VmcbField.GS_SELECTOR):
            vmcb.set_segment(field, real_mode_segment(0))
        vmcb.set_segment(VmcbField.CS_SELECTOR, Segment(0xF000, 0xFFFF_0000, 0xFFFF, 0x9B))
        vmcb.set_segment(VmcbField.LDTR_SELECTOR, Segment(0, 0, 0xFFFF, 0x82))
        vmcb.set_segment(VmcbField.TR_SELECTOR, Segment(0, 0, 0xFFFF, 0x8B))
        vmcb.gdtr_base = vmcb.idtr_base = 0
        vmcb.gdtr_limit = vmcb.idtr_limit = 0xFFFF
        vmcb.cr0, vmcb.cr2, vmcb.cr3, vmcb.cr4, vmcb.efer = 0x6000_0010, 0, 0, 0, 0
        vmcb.dr6, vmcb.dr7 = DR6_FIXED_ONE, DR7_FIXED_ONE
        vmcb.rflags, vmcb.rip, vmcb.rsp, vmcb.rax, vmcb.cpl = RFLAGS_FIXED_ONE, 0xFFF0, 0, 0, 0
        vmcb.interrupt_shadow = 0
        self.state.q[0:16] = memoryview(bytes(128)).cast("Q")
        self.state.q[2] = self.model.cpuid(1, 0, CpuidState())[0]

    def start(self, boot: BootState) -> None:
        """Enter an image as its boot protocol says."""
        self.processor.reset()
        self.reset()
        vmcb = self.vmcb01
        if boot.mode is BootMode.REAL:
            vmcb.cr0 = Cr0.et  # firmware has switched the caches on
            vmcb.set_segment(VmcbField.CS_SELECTOR, real_mode_segment(boot.cs, code=True))
        else:
            vmcb.cr0 = Cr0.pe | Cr0.et
            vmcb.set_segment(VmcbField.CS_SELECTOR, Segment(boot.cs, 0, 0xFFFF_FFFF, 0xC9B))
            for field in _DATA_SEGMENTS:
                vmcb.set_segment(field, Segment(boot.data, 0, 0xFFFF_FFFF, 0xC93))
        if boot.gdt is not None:
            vmcb.gdtr_base, vmcb.gdtr_limit = boot.gdt
        vmcb.rip, vmcb.rax, vmcb.rsp = boot.eip, boot.eax, boot.esp
        q = self.state.q
        q[1], q[2], q[3] = boot.ecx, boot.edx, boot.ebx
        q[5], q[6], q[7] = boot.ebp, boot.esi, boot.edi
        self._enter_l1()

    def start_by_sipi(self, vector: int) -> None:
        """SIPI: begin at `vector << 12` in real mode. SDM 3A "MP Initialization Protocol"."""
        cs = real_mode_segment(vector << 8, code=True)
        self.reload(lambda vmcb: vmcb.set_segment(VmcbField.CS_SELECTOR, cs))
        self.state.rip = 0
        self.activity = Activity.ACTIVE

    def reset_by_init(self) -> None:
        """INIT: as after reset, but the FPU, most MSRs and CR0's CD and NW stay."""
        kept = self.state.cr0 & (Cr0.cd | Cr0.nw)
        self.reset()
        self.vmcb01.cr0 = Cr0.et | kept
        self.vmcb, self.in_l2 = self.vmcb01, False
        self._enter_l1()
        self.lapic.reset_by_init()
        self.nested.reset(self)
        self.nmi_blocked = False
        self.activity = Activity.ACTIVE if self.index == 0 else Activity.WAIT_FOR_SIPI

    def _enter_l1(self) -> None:
        self.vmcb, self.in_l2 = self.vmcb01, False
        self.load(self.vmcb01)
        self.processor.load_extra(self.vmcb01)

    def linear_rip(self) -> int:
        """The linear address of the next instruction."""
        rip: int = self.state.q[Env.RIP >> 3]
        return self.state.segment_base(Env.CS) + rip & _MASK64

    def rflags_without(self, flags: int) -> int:
        """RFLAGS with some flags clear."""
        rflags: int = self.state.rflags
        return rflags & ~flags & Rflags.DECLARED | RFLAGS_FIXED_ONE


_DATA_SEGMENTS: Final = (
    VmcbField.ES_SELECTOR,
    VmcbField.SS_SELECTOR,
    VmcbField.DS_SELECTOR,
    VmcbField.FS_SELECTOR,
    VmcbField.GS_SELECTOR,
)
