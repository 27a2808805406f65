"""VM entries in the probe: the unbroken state, then the broken one."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.conformance.entries.trial import How, NotApplicable, Seen, Trial
from undervisor.conformance.entries.vmx import breaks
from undervisor.conformance.entries.vmx import outside as from_32_bit_host
from undervisor.conformance.entries.vmx.processor import (
    VmxProcessor,
    known_fields,
    read_capabilities,
)
from undervisor.conformance.entries.vmx.states import (
    BASE,
    CHANGES,
    END,
    REGION,
    ROWS,
    SCRATCH,
    VMCS,
    VmxStates,
    memory,
)
from undervisor.guest.probe.answers import Answer, Fault, L2Run, Refused, VmxOutcome, VmxResult
from undervisor.guest.probe.client import Batch, Probe
from undervisor.guest.probe.program import Block
from undervisor.guest.probe.vmx import ERROR
from undervisor.guest.probe.vmx_setup import vmx_on

_ENTRY_FAILURE: Final = 1 << 31
_ROW: Final = struct.Struct("<IQ")
HOST_32: Final = "host-32"
"""The valid state of a 32-bit host."""
_MODE_ROOM: Final = 0x1000
Look = Callable[[], Seen]


class VmxEntries:
    """A probe in VMX operation whose processor is asked to enter states."""

    rules = breaks.ALL

    def __init__(self, probe: Probe, processor: int = 0) -> None:
        self.probe, self.runner = probe, probe.on(processor)
        batch = Batch()
        batch.fill(BASE, END - BASE)
        for gpa, data in memory():
            batch.write(gpa, data)
        batch.write(*from_32_bit_host.program())
        probe.run(batch)
        facts = vmx_on(self.runner, REGION, VMCS)
        self.processor = VmxProcessor(
            read_capabilities(self.runner), known_fields(self.runner, SCRATCH), facts.l1
        )
        self.states = VmxStates(self.processor, Block(processor))
        self._rows: dict[str, int] = {}

    def trial(self, rule: str) -> Trial | NotApplicable:
        """The attempt to break `rule` here."""
        return breaks.trial(rule, self.states)

    def unbroken(self, trial: Trial, batch: Batch) -> Look:
        """Enter the valid state that `trial` starts from; what happened, when the batch has run."""
        return self._enter(trial, trial.mode == HOST_32, {}, batch)

    def broken(self, trial: Trial, batch: Batch) -> Look:
        """Enter the broken state; memory is put back behind it."""
        for patch in trial.patches:
            batch.write(patch.gpa, patch.data)
        look = self._enter(trial, trial.outside, trial.changes, batch)
        for patch in trial.patches:
            batch.write(patch.gpa, patch.before)
        return look

    def abort_indicator(self) -> int:
        """What a VMX abort has left in the VMCS, 0 for none. SDM 3C "VMX Aborts"."""
        batch = Batch()
        indicator = batch.read(VMCS + 4, 4)
        self.probe.run(batch)
        return int.from_bytes(indicator.value, "little")

    def _enter(self, trial: Trial, outside: bool, changes: Mapping[int, int], batch: Batch) -> Look:
        batch.vmclear(VMCS)
        batch.vmptrld(VMCS)
        written = [self._write_state(trial.mode, batch)]
        if changes:
            batch.write(CHANGES, b"".join(_ROW.pack(n, v) for n, v in changes.items()))
            written.append(_write_rows(batch, CHANGES, len(changes)))
        alone = trial.alone and bool(changes)
        if outside:
            run: Answer[L2Run] | Answer[VmxResult] = from_32_bit_host.run(batch, alone=alone)
        else:
            run = batch.vmlaunch() if alone else batch.vmx_run()
        reason = batch.vmread(F.EXIT_REASON)
        qualification = batch.vmread(F.EXIT_QUALIFICATION)
        return lambda: _seen(written, run.outcome, reason, qualification)

    def _write_state(self, mode: str, batch: Batch) -> Answer[tuple[int, VmxResult]]:
        """VMWRITE of every field; the rows stay in memory, because the line is slow."""
        state = self.states.valid(mode)
        fields = sorted(self.processor.fields)
        if mode not in self._rows:
            self._rows[mode] = ROWS + _MODE_ROOM * len(self._rows)
            rows = b"".join(_ROW.pack(field, state[field]) for field in fields)
            assert len(rows) <= _MODE_ROOM, "the rows of a state fit in its room"
            batch.write(self._rows[mode], rows)
        return _write_rows(batch, self._rows[mode], len(fields))


def _write_rows(batch: Batch, rows: int, count: int) -> Answer[tuple[int, VmxResult]]:
    """VMWRITE of rows that are in memory: how many are left, and the last one's outcome."""
    return batch.call(
        "vmwrites",
        {"rsi": rows, "rcx": count},
        ("rcx", *ERROR),
        lambda r: (r["rcx"], VmxResult.of(r)),
    )


def _seen(
    written: Iterable[Answer[tuple[int, VmxResult]]],
    run: L2Run | VmxResult | Fault | Refused,
    reason: Answer[VmxResult],
    qualification: Answer[VmxResult],
) -> Seen:
    for answer in written:
        left, result = answer.value
        if left:
            return Seen(How.WRITE, words=f"{result.outcome.value} {result.error}, {left} left")
    if isinstance(run, Fault):
        return Seen(How.FAULT, run.vector, words=str(run))
    if isinstance(run, Refused):
        return Seen(How.DIED, words=str(run))
    result = run.result if isinstance(run, L2Run) else run
    if result.outcome is VmxOutcome.FAIL_VALID:
        return Seen(How.FAIL_VALID, result.error)
    if result.outcome is VmxOutcome.FAIL_INVALID:
        return Seen(How.FAIL_INVALID)
    number = reason.value.value
    if number & _ENTRY_FAILURE:
        return Seen(How.FAILED_ENTRY, number & 0xFFFF, qualification.value.value)
    return Seen(How.ENTERED, number & 0xFFFF)
