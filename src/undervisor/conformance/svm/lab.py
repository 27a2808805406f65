"""L1 with SVM enabled and one VMCB, and an L2 for it.

    run = lab.run("mov $5, %eax; cpuid", wants=[Intercept.CPUID])
    run.exits_with(ExitCode.CPUID)

An L2 begins in 64-bit mode at CPL 0 with L1's page tables; its GDT, TSS and IDT are its own, and
the handler of each vector is a VMMCALL.  Each run begins with the same VMCB, `changes` apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.svm.vmcb import SIZE, NestedControl, Vmcb, VmcbField
from undervisor.arch.x86.segments import Segment
from undervisor.conformance.lab import Lab
from undervisor.conformance.places import CS64, DS, TR
from undervisor.conformance.svm.run import BRIEF, READ, Ranges, Run
from undervisor.guest.probe.answers import Answer, L2Run, VmxOutcome, VmxResult
from undervisor.guest.probe.client import Batch, Probe
from undervisor.guest.probe.l1 import CODE_SEGMENT, DATA_SEGMENT, L1State
from undervisor.guest.probe.svm_setup import l2_vmcb, svm_on

Changes = Mapping[VmcbField, int]
"""VMCB fields and their values."""
NPT_ENTRY, NPT_LARGE = 7, 0x80
"""Present, writable, user; a page of more than 4 KiB. APM 2, "Nested Paging"."""
BUSY_TSS: Final = 0x8B
LDT: Final = 0x82
LEAF_SVM: Final = 0x8000000A
LEAF_SIZES: Final = 0x80000008


@dataclass(frozen=True, slots=True)
class SvmFacts:
    """CPUID Fn8000_000A, and the probe's own state with SVM enabled."""

    asids: int
    features: int
    l1: L1State


class SvmLab(Lab):
    """L1 with EFER.SVME set; `facts` are the processor's, `vmcb` what each run begins with."""

    exit_instruction = "vmmcall"

    def __init__(self, probe: Probe, processor: int = 0) -> None:
        super().__init__(probe, processor)
        self.facts: SvmFacts
        self.vmcb = Vmcb(bytearray(SIZE))
        self._there = bytearray()  # what memory holds of the VMCB; empty: not known

    def on(self, like: SvmLab | None = None) -> None:
        """Set EFER.SVME and VM_HSAVE_PA, and lay out an L2.

        `like`: the lab of another processor of the same kind, which need not be asked again.
        """
        places = self.places
        l1 = svm_on(self._runner, places.region)
        self.facts = replace(like.facts, l1=l1) if like else self._ask(l1)
        self.surround()
        self.fill(places.msr, 0x2000)
        vmcb = self.vmcb = Vmcb(l2_vmcb(l1, places.code, places.stack))
        vmcb.gdtr_base, vmcb.gdtr_limit = places.gdt, 0x4F
        vmcb.idtr_base, vmcb.idtr_limit = places.idt, 0xFFF
        vmcb.iopm_base_pa, vmcb.msrpm_base_pa = places.io, places.msr
        code, data = CODE_SEGMENT, DATA_SEGMENT
        flat = Segment(DS, data.base, data.limit, data.attributes)
        for register in ["ES", "SS", "DS", "FS", "GS"]:
            vmcb.set_segment(VmcbField[f"{register}_SELECTOR"], flat)
        vmcb.set_segment(
            VmcbField.CS_SELECTOR, Segment(CS64, code.base, code.limit, code.attributes)
        )
        vmcb.set_segment(VmcbField.TR_SELECTOR, Segment(TR, places.tss, 0x67, BUSY_TSS))
        vmcb.set_segment(VmcbField.LDTR_SELECTOR, Segment(0, 0, 0, LDT))
        self._send(self._waiting, bytearray(vmcb.b))
        self._there = bytearray(vmcb.b)

    def _ask(self, l1: L1State) -> SvmFacts:
        leaf = self.l1.cpuid(LEAF_SVM).value
        return SvmFacts(leaf["rbx"] & 0xFFFFFFFF, leaf["rdx"] & 0xFFFFFFFF, l1)

    def feature(self, mask: int) -> bool:
        """Whether all bits of `mask` are 1 in CPUID Fn8000_000A_EDX."""
        return self.facts.features & mask == mask

    def physical_width(self) -> int:
        """The supported physical address size in bits, CPUID Fn8000_0008_EAX[7:0]."""
        return self.l1.cpuid(LEAF_SIZES).value["rax"] & 0xFF

    # -- fields to change ----------------------------------------------------------------------

    def npt(self, shift: int = 21, root: int = 0, leaf: int = NPT_ENTRY) -> dict[VmcbField, int]:
        """Identity nested tables of 4-KiB (12), 2-MiB (21) or 1-GiB (30) pages; what enables them.

        Entries are at `nested_entry(gpa, level)`.
        """
        root = root or self.places.nested
        self.nested_tables(shift, root, NPT_ENTRY, leaf, NPT_LARGE)
        return {VmcbField.NESTED_CONTROL: NestedControl.np_enable, VmcbField.N_CR3: root}

    # -- running -------------------------------------------------------------------------------

    def run(
        self,
        source: str | None = None,
        changes: Changes | None = None,
        registers: Mapping[str, int] | None = None,
        *,
        wants: Iterable[Intercept] = (),
        without: Iterable[Intercept] = (),
        end: str | None = None,
    ) -> Run:
        """VMRUN with `vmcb`, `changes` apart, and `source` as L2's code where it is given.

        `wants` are intercepted beside VMRUN, VMMCALL and HLT; `without` are not.
        """
        if source is not None:
            self.code(source, end=end)
        return self._execute(self.area(changes, wants, without), registers)

    def resume(
        self, changes: Changes | None = None, registers: Mapping[str, int] | None = None
    ) -> Run:
        """VMRUN again with the VMCB as the last exit left it, some fields changed.

        General registers are all given anew; RAX and RSP are the VMCB's.
        """
        return self._execute(_changed(self._there, changes), registers)

    def skip(
        self,
        run: Run,
        length: int,
        changes: Changes | None = None,
        registers: Mapping[str, int] | None = None,
    ) -> Run:
        """Go on `length` bytes behind where L2 exited, with its registers as they were."""
        beyond = {VmcbField.RIP: run.rip + length}
        given = {name: value for name, value in run.registers.items() if name != "rax"}
        return self.resume(beyond | dict(changes or {}), given | dict(registers or {}))

    def sweep(self, cases: Sequence[Changes], *, wants: Iterable[Intercept] = ()) -> list[Run]:
        """A VMRUN for each of `cases`, as independent as by `run`, in as few requests as fit.

        Of the VMCB after each exit there is only `BRIEF`.
        """
        batch, runs = Batch(), []
        base, template = self.area(None, wants), self.places.scratch + 0x4000
        batch.write(template, bytes(base))
        for case in cases:
            batch.copy(self.places.control, template, SIZE)
            self._there = bytearray(base)
            self._send(batch, _changed(base, case))
            runs.append(self.plan_entry(batch, None, ranges=BRIEF))
        self._there = bytearray()
        self.execute(batch)
        return runs

    def area(
        self,
        changes: Changes | None = None,
        wants: Iterable[Intercept] = (),
        without: Iterable[Intercept] = (),
    ) -> bytearray:
        """The bytes of `vmcb` with fields and intercepts changed."""
        area = _changed(self.vmcb.b, changes)
        for intercept in wants:
            area[intercept // 8] |= 1 << intercept % 8
        for intercept in without:
            area[intercept // 8] &= ~(1 << intercept % 8)
        return area

    def plan_entry(
        self,
        batch: Batch,
        registers: Mapping[str, int] | None,
        vmcb: int = 0,
        ranges: Ranges = READ,
    ) -> Run:
        """Add to `batch`: VMRUN, and the reading of what the exit wrote."""
        where = vmcb or self.places.control
        answer = batch.svm_run(where, registers)
        parts = self._reading(batch, where, ranges)
        return Run(answer, parts, self.vector_of, ranges)

    def plan_reading(self, batch: Batch, vmcb: int = 0) -> Run:
        """Add to `batch`: only the reading of the VMCB, behind code that has run L2 itself.

        The general registers of such a run are not known.
        """
        parts = self._reading(batch, vmcb or self.places.control, READ)
        nothing: Answer[L2Run] = Answer("L2 run")
        nothing.set(L2Run(VmxResult(VmxOutcome.SUCCEED), {}))
        return Run(nothing, parts, self.vector_of)

    @staticmethod
    def _reading(batch: Batch, where: int, ranges: Ranges) -> tuple[Answer[bytes], ...]:
        return tuple(batch.read(where + offset, size) for offset, size in ranges)

    def plan_launch(self, batch: Batch, area: bytes, vmcb: int = 0) -> None:
        """Add to `batch`: the whole VMCB, written where it is not the lab's own known one."""
        batch.write(vmcb or self.places.control, bytes(area))
        if not vmcb:
            self._there = bytearray()

    def _execute(self, area: bytearray, registers: Mapping[str, int] | None) -> Run:
        batch = Batch()
        self._send(batch, area)
        run = self.plan_entry(batch, registers)
        self.execute(batch)
        self._there = bytearray(area)
        for (offset, size), part in zip(READ, run.parts, strict=True):
            self._there[offset : offset + size] = part.value
        return run

    def _send(self, batch: Batch, area: bytearray) -> None:
        """Write what differs from what memory holds; all of it where that is not known."""
        if not self._there:
            batch.fill(self.places.control, SIZE)
            self._there = bytearray(SIZE)
        for offset in range(0, SIZE, PIECE):
            piece = area[offset : offset + PIECE]
            if piece != self._there[offset : offset + PIECE]:
                batch.write(self.places.control + offset, bytes(piece))


PIECE: Final = 0x20
"""The VMCB is written in pieces of this size, those that differ."""


def _changed(area: bytes | bytearray | memoryview, changes: Changes | None) -> bytearray:
    copy = bytearray(area)
    view = Vmcb(copy)
    for field, value in (changes or {}).items():
        view[field] = value & (1 << 8 * field.width) - 1
    return copy
