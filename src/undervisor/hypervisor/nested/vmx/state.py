"""What a vCPU's VMX keeps: VMX operation, the current VMCS, and where its guest state is."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final

from undervisor.arch.vmx.checks import EntryChecker
from undervisor.arch.vmx.controls import ActivityState
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.segments import access_rights_of
from undervisor.hypervisor.models import CpuModel
from undervisor.hypervisor.vcpu import Activity
from undervisor.silicon.memory import Memory
from undervisor.silicon.processor import SiliconVmcb
from undervisor.silicon.world import VmcbField as V

ACTIVITIES: Final[dict[int, Activity]] = {
    ActivityState.ACTIVE: Activity.ACTIVE,
    ActivityState.HLT: Activity.HALTED,
    ActivityState.SHUTDOWN: Activity.SHUTDOWN,
    ActivityState.WAIT_FOR_SIPI: Activity.WAIT_FOR_SIPI,
}
NO_VMCS: Final = (1 << 64) - 1
SHADOW_BIT: Final = 1 << 31

# Our layout of a VMCS region: revision, abort indicator, launch state, then every field.
# SDM 3C "Format of the VMCS Region"; the data behind the first 8 bytes are the processor's own.
ABORT_OFFSET: Final = 4
LAUNCHED_OFFSET: Final = 8
DATA_OFFSET: Final = 16

SEGMENTS: Final = (
    ("ES", V.ES_SELECTOR),
    ("CS", V.CS_SELECTOR),
    ("SS", V.SS_SELECTOR),
    ("DS", V.DS_SELECTOR),
    ("FS", V.FS_SELECTOR),
    ("GS", V.GS_SELECTOR),
    ("LDTR", V.LDTR_SELECTOR),
    ("TR", V.TR_SELECTOR),
)

# Guest fields that are a field of vmcb02 as they stand.
PLAIN: Final[dict[F, V]] = {
    F.GUEST_CR0: V.CR0,
    F.GUEST_CR3: V.CR3,
    F.GUEST_CR4: V.CR4,
    F.GUEST_RSP: V.RSP,
    F.GUEST_RIP: V.RIP,
    F.GUEST_RFLAGS: V.RFLAGS,
    F.GUEST_GDTR_BASE: V.GDTR_BASE,
    F.GUEST_GDTR_LIMIT: V.GDTR_LIMIT,
    F.GUEST_IDTR_BASE: V.IDTR_BASE,
    F.GUEST_IDTR_LIMIT: V.IDTR_LIMIT,
    F.GUEST_SYSENTER_CS: V.SYSENTER_CS,
    F.GUEST_SYSENTER_ESP: V.SYSENTER_ESP,
    F.GUEST_SYSENTER_EIP: V.SYSENTER_EIP,
}

# Written back at every exit, because every L1 looks; the rest only when somebody asks.
# CR0 and CS are among them for the sake of the rules about RIP and injected events.
EAGER: Final = frozenset({F.GUEST_RIP, F.GUEST_RSP, F.GUEST_RFLAGS, F.GUEST_CR0})
LAZY: Final = frozenset(
    {*PLAIN} - EAGER
    | {
        F[f"GUEST_{name}_{part}"]
        for name, _ in SEGMENTS
        for part in ("SELECTOR", "BASE", "LIMIT", "ACCESS_RIGHTS")
    }
)


@dataclass(slots=True)
class Vmcs:
    """A VMCS that is current, with its fields as L1 would read them.

    `known` are the fields that the model has; the others stay 0.  `written` are the fields that
    L1 has written since the last successful entry.  `stale` says that the `LAZY` fields are newer
    in vmcb02.
    """

    gpa: int
    fields: dict[int, int]
    known: frozenset[int]
    checker: EntryChecker
    launched: bool = False
    is_shadow: bool = False
    written: set[int] = field(default_factory=set)
    stale: bool = False

    def synchronize(self, vmcb02: SiliconVmcb) -> None:
        """Bring the lazy fields up to date from vmcb02."""
        if not self.stale:
            return
        self.stale = False
        fields = self.fields
        for field_name, source in _LAZY_PLAIN:
            fields[field_name] = vmcb02[source]
        for selector, base, limit, rights, where in _SEGMENT_FIELDS:
            segment = vmcb02.segment(where)
            fields[selector], fields[base] = segment.selector, segment.base
            fields[limit] = segment.limit
            fields[rights] = access_rights_of(segment.attributes)


_LAZY_PLAIN: Final = tuple((name, source) for name, source in PLAIN.items() if name not in EAGER)
_SEGMENT_FIELDS: Final = tuple(
    (
        F[f"GUEST_{name}_SELECTOR"],
        F[f"GUEST_{name}_BASE"],
        F[f"GUEST_{name}_LIMIT"],
        F[f"GUEST_{name}_ACCESS_RIGHTS"],
        where,
    )
    for name, where in SEGMENTS
)


class VmcsStore:
    """Reads and writes VMCS regions in L1's memory, in the model's layout."""

    def __init__(self, memory: Memory, model: CpuModel) -> None:
        assert model.vmx is not None
        self._memory = memory
        self._capabilities = model.vmx
        self.revision = int(model.vmx.basic.revision)
        self.fields = tuple(sorted(int(f) for f in model.vmcs_fields))
        self.known = frozenset(self.fields)
        self._data = struct.Struct(f"<{len(self.fields)}Q")
        # The rules of VM entry look at every field that any processor has.
        self._absent = {int(field): 0 for field in F if int(field) not in self.fields}

    def load(self, gpa: int) -> Vmcs:
        """The VMCS in the region at `gpa`."""
        values = self._data.unpack(self._memory.read(gpa + DATA_OFFSET, self._data.size))
        return Vmcs(
            gpa=gpa,
            fields=self._absent | dict(zip(self.fields, values, strict=True)),
            known=self.known,
            checker=EntryChecker(self._capabilities),
            launched=bool(self._memory.u32(gpa + LAUNCHED_OFFSET)),
            is_shadow=bool(self._memory.u32(gpa) & SHADOW_BIT),
        )

    def store(self, vmcs: Vmcs) -> None:
        """Put all data of a VMCS back into its region."""
        memory = self._memory
        memory.set_u32(vmcs.gpa + LAUNCHED_OFFSET, int(vmcs.launched))
        values = (vmcs.fields[name] for name in self.fields)
        memory.write(vmcs.gpa + DATA_OFFSET, self._data.pack(*values))

    def clear(self, gpa: int) -> None:
        """The launch state of a region that is not current becomes clear."""
        self._memory.set_u32(gpa + LAUNCHED_OFFSET, 0)

    def abort(self, gpa: int, indicator: int) -> None:
        """The VMX-abort indicator. SDM 3C "VMX Aborts"."""
        self._memory.set_u32(gpa + ABORT_OFFSET, indicator)

    def read_field(self, gpa: int, encoding: int) -> int | None:
        """A field of a (shadow) VMCS that is not current; None where there is no such field."""
        where = self._where(gpa, encoding)
        return None if where is None else self._memory.u64(where)

    def write_field(self, gpa: int, encoding: int, value: int) -> None:
        """Write a field of a (shadow) VMCS that is not current."""
        where = self._where(gpa, encoding)
        if where is not None:
            self._memory.set_u64(where, value)

    def _where(self, gpa: int, encoding: int) -> int | None:
        try:
            return gpa + DATA_OFFSET + 8 * self.fields.index(encoding)
        except ValueError:
            return None


@dataclass(slots=True)
class VmxState:
    """VMX operation of one vCPU."""

    store: VmcsStore
    vmxon_gpa: int = NO_VMCS
    current: Vmcs | None = None
    in_operation: bool = False

    def set_current(self, vmcs: Vmcs | None, vmcb02: SiliconVmcb) -> None:
        """Make another VMCS current; the old one's data go to its region."""
        old = self.current
        if old is not None:
            old.synchronize(vmcb02)
            self.store.store(old)
        self.current = vmcs
