"""L1 in VMX operation with one current VMCS, and an L2 for it.

    run = lab.run("mov $5, %eax; cpuid", {F.CR3_TARGET_COUNT: 1})
    run.exits_with(ExitReason.CPUID)

An L2 begins in 64-bit mode at CPL 0 with L1's page tables; its GDT, TSS and IDT are its own, and
the handler of each vector is a VMCALL.  Each run begins with the same fields, `changes` apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from undervisor.arch.bits import Register
from undervisor.arch.vmx.capabilities import EptVpidCapability, VmxMsr
from undervisor.arch.vmx.controls import (
    EntryControls,
    ExitControls,
    PinBasedControls,
    PrimaryControls,
    SecondaryControls,
    TertiaryControls,
)
from undervisor.arch.vmx.fields import FieldArea
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.conformance.expect import Broken, Lacking, words
from undervisor.conformance.lab import Lab
from undervisor.conformance.places import CS64, DS, TR
from undervisor.conformance.vmx.run import Run
from undervisor.guest.probe.answers import Answer, L2Run, VmxResult
from undervisor.guest.probe.client import Batch, Probe
from undervisor.guest.probe.vmx import rows_of
from undervisor.guest.probe.vmx_setup import VmxFacts, l2_fields, vmx_on

Changes = dict[Any, int]
"""VMCS fields, as such or by their encodings, and their values."""

CONTROLS: Final[dict[type[Register], F]] = {
    PinBasedControls: F.PIN_BASED_CONTROLS,
    PrimaryControls: F.PRIMARY_CONTROLS,
    SecondaryControls: F.SECONDARY_CONTROLS,
    TertiaryControls: F.TERTIARY_CONTROLS,
    ExitControls: F.EXIT_CONTROLS,
    EntryControls: F.ENTRY_CONTROLS,
}
EXIT_FIELDS: Final = tuple(
    f for f in F if f.area is FieldArea.READ_ONLY and f is not F.VM_INSTRUCTION_ERROR
)
SAVED: Final = (
    F.GUEST_RIP, F.GUEST_RSP, F.GUEST_RFLAGS, F.GUEST_CR0, F.GUEST_CR3, F.GUEST_CR4, F.GUEST_DR7,
    F.GUEST_EFER, F.GUEST_PAT, F.GUEST_DEBUGCTL, F.GUEST_INTERRUPTIBILITY_STATE,
    F.GUEST_ACTIVITY_STATE, F.GUEST_PENDING_DEBUG_EXCEPTIONS, F.GUEST_CS_SELECTOR,
    F.GUEST_CS_ACCESS_RIGHTS, F.GUEST_SS_SELECTOR, F.GUEST_SS_ACCESS_RIGHTS, F.ENTRY_CONTROLS,
    F.ENTRY_INTERRUPTION_INFORMATION, F.PREEMPTION_TIMER_VALUE,
)  # fmt: skip
"""What each run reads beside the VM-exit information; more with `reads`."""
ZERO: Final = (
    F.CR0_GUEST_HOST_MASK, F.CR4_GUEST_HOST_MASK, F.CR0_READ_SHADOW, F.CR4_READ_SHADOW,
    F.PAGE_FAULT_ERROR_CODE_MASK, F.PAGE_FAULT_ERROR_CODE_MATCH, F.ENTRY_INTERRUPTION_INFORMATION,
    F.ENTRY_MSR_LOAD_COUNT, F.EXIT_MSR_LOAD_COUNT, F.EXIT_MSR_STORE_COUNT,
)  # fmt: skip
RESIDENT, USUAL = 0x5000, 0x6800
"""Where in the scratch area `fields` are as rows, and the encodings of what each run reads."""
ALIGNMENT: Final = 16
EPT_LEAF, EPT_TABLE, EPT_LARGE = 0x37, 7, 0x80
"""RWX with memory type WB; RWX; a page of more than 4 KiB. SDM 3C, "EPT Translation Mechanism"."""
EPTP: Final = 0x1E
"""A page walk of 4 levels, through structures of memory type WB."""


class VmxLab(Lab):
    """L1 in VMX operation; `facts` are the processor's, `fields` what each run begins with."""

    exit_instruction = "vmcall"

    def __init__(self, probe: Probe, processor: int = 0) -> None:
        super().__init__(probe, processor)
        self.known: frozenset[F] = frozenset()
        self.facts: VmxFacts
        self.fields: dict[int, int] = {}
        self.usual: list[F] = []
        self._launched = False
        self._touched: set[int] = set()  # what a run has changed, and so the next one writes
        self._resident: tuple[tuple[int, int], ...] = ()  # `fields` as they are in memory

    def on(self, like: VmxLab | None = None) -> None:
        """Enter VMX operation, make a VMCS current, and lay out an L2.

        `like`: the lab of another processor of the same kind, which has the same fields.
        """
        places = self.places
        self.facts = vmx_on(self._runner, places.region, places.control)
        self.surround()
        self.known = like.known if like else self._find_fields()
        begin = l2_fields(self.facts, places.code, places.stack, self.processor)
        fields = dict[int, int](begin.items())
        fields |= dict.fromkeys(ZERO, 0)
        fields |= {
            F.GUEST_GDTR_BASE: places.gdt,
            F.GUEST_GDTR_LIMIT: 0x4F,
            F.GUEST_IDTR_BASE: places.idt,
            F.GUEST_IDTR_LIMIT: 0xFFF,
            F.GUEST_TR_SELECTOR: TR,
            F.GUEST_TR_BASE: places.tss,
            F.GUEST_CS_SELECTOR: CS64,
            F.MSR_BITMAP_ADDRESS: places.msr,
            F.IO_BITMAP_A_ADDRESS: places.io,
            F.IO_BITMAP_B_ADDRESS: places.io + 0x1000,
        }
        fields |= dict.fromkeys((F.GUEST_ES_SELECTOR, F.GUEST_SS_SELECTOR, F.GUEST_DS_SELECTOR), DS)
        self.fields = {f: v for f, v in fields.items() if f in self.known}
        self.usual = [f for f in (*EXIT_FIELDS, *SAVED) if f in self.known]
        self.write(places.scratch + RESIDENT, rows_of(self.fields))
        self.write_u32(places.scratch + USUAL, *self.usual)
        self._resident = tuple(self.fields.items())

    def _find_fields(self) -> frozenset[F]:
        with self.batch() as batch:
            found = batch.vmreads(F, self.places.scratch)
        return frozenset(f for f in F if found.value[f] is not None)

    # -- what the processor can do -------------------------------------------------------------

    def supports(self, kind: type[Register], name: str) -> bool:
        """Whether bit `name` of a control word may be 1."""
        capability = self.facts.capabilities.get(CONTROLS[kind])
        return capability is not None and bool(capability.may_be_one & getattr(kind, name))

    def needs(self, kind: type[Register], *names: str) -> None:
        """Lacking unless each of these control bits may be 1."""
        for name in names:
            if not self.supports(kind, name):
                raise Lacking(f"the processor does not allow {kind.__name__}.{name}")

    def ept_capability(self) -> EptVpidCapability:
        """IA32_VMX_EPT_VPID_CAP; 0 where the processor has no such MSR."""
        answer = self.l1.rdmsr(VmxMsr.IA32_VMX_EPT_VPID_CAP)
        return EptVpidCapability(0 if answer.fault else answer.value)

    # -- fields to change ----------------------------------------------------------------------

    def control(
        self, kind: type[Register], base: Changes | None = None, **bits: int
    ) -> dict[int, int]:
        """`{field: value}` for a control word with some bits set or cleared.

        From the value in `base`, or else in `fields`.  A secondary or tertiary word also sets its
        "activate" bit.  Lacking where the processor does not allow a bit that is set.
        """
        base = base or {}
        self.needs(kind, *(name for name, on in bits.items() if on))
        field = CONTROLS[kind]
        value = base.get(field, self.fields.get(field, 0))
        if field not in self.fields and field not in base:
            value = self.facts.adjust(field, 0)
        for name, on in bits.items():
            mask = getattr(kind, name)
            value = value | mask if on else value & ~mask
        changes = dict(base) | {field: value}
        for word, activate in (
            (SecondaryControls, PrimaryControls.activate_secondary_controls),
            (TertiaryControls, PrimaryControls.activate_tertiary_controls),
        ):
            if kind is word:
                primary = changes.get(F.PRIMARY_CONTROLS, self.fields[F.PRIMARY_CONTROLS])
                changes[F.PRIMARY_CONTROLS] = primary | activate
        return changes

    def pin(self, base: Changes | None = None, **bits: int) -> dict[int, int]:
        """Pin-based controls."""
        return self.control(PinBasedControls, base, **bits)

    def primary(self, base: Changes | None = None, **bits: int) -> dict[int, int]:
        """Primary processor-based controls."""
        return self.control(PrimaryControls, base, **bits)

    def secondary(self, base: Changes | None = None, **bits: int) -> dict[int, int]:
        """Secondary processor-based controls, activated."""
        return self.control(SecondaryControls, base, **bits)

    def on_exit(self, base: Changes | None = None, **bits: int) -> dict[int, int]:
        """VM-exit controls."""
        return self.control(ExitControls, base, **bits)

    def on_entry(self, base: Changes | None = None, **bits: int) -> dict[int, int]:
        """VM-entry controls."""
        return self.control(EntryControls, base, **bits)

    def ept(self, shift: int = 21, root: int = 0, leaf: int = EPT_LEAF) -> dict[int, int]:
        """Identity EPT of 4-KiB (12), 2-MiB (21) or 1-GiB (30) pages; the fields that enable it.

        Entries are at `nested_entry(gpa, level)`.
        """
        root = root or self.places.nested
        self.nested_tables(shift, root, EPT_TABLE, leaf, EPT_LARGE)
        return self.secondary(enable_ept=1) | {F.EPT_POINTER: root | EPTP}

    # -- running -------------------------------------------------------------------------------

    def run(
        self,
        source: str | None = None,
        changes: Changes | None = None,
        registers: Mapping[str, int] | None = None,
        *,
        end: str | None = None,
        reads: Iterable[F] = (),
    ) -> Run:
        """A new launch: all fields with `changes`, and `source` as L2's code where it is given."""
        if source is not None:
            self.code(source, end=end)
        batch = Batch()
        writes = self.plan_launch(batch, changes)
        run = self.plan_entry(batch, registers, resume=False, reads=reads)
        self.execute(batch)
        writes.check()
        self._launched = run.entered and not run.failed_entry
        return run

    def resume(
        self,
        changes: Changes | None = None,
        registers: Mapping[str, int] | None = None,
        *,
        reads: Iterable[F] = (),
    ) -> Run:
        """Go on from the last exit with some fields changed; the registers are all given anew."""
        batch, writes = Batch(), Writes()
        if changes:
            self._touched |= changes.keys()
            writes.add(batch.vmwrites(changes, self.places.scratch), changes)
        run = self.plan_entry(batch, registers, resume=self._launched, reads=reads)
        self.execute(batch)
        writes.check()
        self._launched |= run.entered and not run.failed_entry
        return run

    def skip(
        self,
        run: Run,
        changes: Changes | None = None,
        registers: Mapping[str, int] | None = None,
        *,
        reads: Iterable[F] = (),
    ) -> Run:
        """Go on behind the instruction that exited, with L2's registers as they were."""
        beyond = {F.GUEST_RIP: run.rip + run.length}
        return self.resume(
            beyond | dict(changes or {}), dict(run.registers) | dict(registers or {}), reads=reads
        )

    def sweep(
        self,
        cases: Sequence[Changes],
        *,
        sources: Sequence[str] = (),
        registers: Mapping[str, int] | None = None,
        reads: Iterable[F] = (),
    ) -> list[Run]:
        """A launch for each of `cases`, as independent as by `run`, in as few requests as fit.

        With `sources` each case has code of its own; `run.start` is where it begins.
        """
        starts = self.place(sources) if sources else [self.fields[F.GUEST_RIP]] * len(cases)
        runs, batch, writes = [], Batch(), Writes()
        for case, start in zip(cases, starts, strict=True):
            changes = {F.GUEST_RIP: start} | dict(case) if sources else case
            writes.join(self.plan_launch(batch, changes))
            runs.append(self.plan_entry(batch, registers, resume=False, reads=reads, start=start))
        self.execute(batch)
        writes.check()
        self._launched = False
        return runs

    def place(self, sources: Sequence[str]) -> list[int]:
        """Put several pieces of L2's code in place, each ended as by `code`; where each begins."""
        starts, at = [], self.places.code
        for source in sources:
            code = self.assemble(f"{source}\n{self.exit_instruction}\n", at)
            self.write(at, code)
            starts.append(at)
            at += len(code) + ALIGNMENT & -ALIGNMENT
        return starts

    def plan_launch(self, batch: Batch, changes: Changes | None) -> Writes:
        """Add to `batch`: a clear VMCS with all fields, `changes` apart."""
        places, writes = self.places, Writes()
        batch.vmclear(places.control)
        batch.vmptrld(places.control)
        there, self._resident = self._resident, tuple(self.fields.items())
        rows = places.scratch + RESIDENT
        writes.add(batch.vmwrites(self.fields, rows, there=there == self._resident), self.fields)
        absent = dict.fromkeys(self._touched - self.fields.keys(), 0)
        changes = absent | dict(changes or {})
        self._touched |= changes.keys()
        if changes:
            writes.add(batch.vmwrites(changes, places.scratch), changes)
        return writes

    def plan_entry(
        self,
        batch: Batch,
        registers: Mapping[str, int] | None,
        *,
        resume: bool,
        reads: Iterable[F] = (),
        start: int = 0,
    ) -> Run:
        """Add to `batch`: VM entry, and VMREADs of what a test looks at."""
        scratch = self.places.scratch
        answer: Answer[L2Run] = batch.vmx_run(registers, resume=resume)
        fields = [batch.vmreads(self.usual, scratch + USUAL, there=True)]
        if asked := [f for f in reads if f in self.known]:
            fields.append(batch.vmreads(asked, scratch))
        return Run(answer, fields, self.vector_of, start or self.fields[F.GUEST_RIP])


class Writes:
    """VMWRITEs that must all succeed."""

    def __init__(self) -> None:
        self._writes: list[tuple[Answer[tuple[int, VmxResult]], Changes]] = []

    def add(self, answer: Answer[tuple[int, VmxResult]], fields: Changes) -> None:
        """The answer to a `vmwrites` of `fields`."""
        self._writes.append((answer, fields))

    def join(self, others: Writes) -> None:
        """All of `others` too."""
        self._writes += others._writes

    def check(self) -> None:
        """Broken where one failed."""
        for answer, fields in self._writes:
            count, result = answer.value
            if not result.succeeded:
                which = F(list(fields)[count]).name
                raise Broken(f"VMWRITE of {which}: {result.outcome.value} {words(result.error)}")
