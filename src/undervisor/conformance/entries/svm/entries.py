"""VMRUNs in the probe: the unbroken state, then the broken one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from undervisor.arch.svm.boundary import MODES
from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.svm.vmcb import SIZE
from undervisor.arch.svm.vmcb import VmcbField as F
from undervisor.conformance.entries.svm import breaks
from undervisor.conformance.entries.svm.processor import read_capabilities
from undervisor.conformance.entries.svm.states import (
    BASE,
    END,
    HOST_SAVE,
    OUTSIDE,
    TEMPLATES,
    VMCB,
    SvmStates,
    memory,
)
from undervisor.conformance.entries.trial import How, NotApplicable, Seen, Trial
from undervisor.guest.probe.answers import Answer, Fault, L2Run, Refused, Returned
from undervisor.guest.probe.client import Batch, Probe
from undervisor.guest.probe.svm_setup import svm_on

_INVALID: Final = int(ExitCode.INVALID) & (1 << 64) - 1
_LOW: Final = 0xFFFF_FFFF
_WIDTHS: Final = {int(field): field.width for field in F}
Look = Callable[[], Seen]


class SvmEntries:
    """A probe with SVM enabled whose processor is asked to enter states."""

    rules = breaks.ALL

    def __init__(self, probe: Probe, processor: int = 0) -> None:
        self.probe, self.runner = probe, probe.on(processor)
        batch = Batch()
        batch.fill(BASE, END - BASE)
        for gpa, data in memory():
            batch.write(gpa, data)
        probe.run(batch)
        l1 = svm_on(self.runner, HOST_SAVE)
        self.states = SvmStates(read_capabilities(self.runner, l1), l1)
        self._templates = {mode: TEMPLATES + SIZE * n for n, mode in enumerate(MODES)}
        for mode, gpa in self._templates.items():
            probe.load(gpa, self.states.vmcb(mode))

    def trial(self, rule: str) -> Trial | NotApplicable:
        """The attempt to break `rule` here."""
        return breaks.trial(rule, self.states)

    def unbroken(self, trial: Trial, batch: Batch) -> Look:
        """Enter the valid state that `trial` starts from; what happened, when the batch has run."""
        return self._enter(trial.mode, {}, batch, outside=False)

    def broken(self, trial: Trial, batch: Batch) -> Look:
        """Enter the broken state."""
        return self._enter(trial.mode, trial.changes, batch, outside=trial.outside)

    def abort_indicator(self) -> int:
        """0: SVM has no abort."""
        return 0

    def _enter(self, mode: str, changes: Mapping[int, int], batch: Batch, *, outside: bool) -> Look:
        batch.copy(VMCB, self._templates[mode], SIZE)
        for name, value in changes.items():
            batch.write(VMCB + name, value.to_bytes(_WIDTHS[name], "little"))
        if outside:
            run: Answer[Returned] | Answer[L2Run] = batch.call(OUTSIDE, {}, [], what="VMRUN")
        else:
            run = batch.svm_run(VMCB)
        code = batch.read(VMCB + F.EXITCODE, 8)
        return lambda: _seen(run.outcome, int.from_bytes(code.value, "little"))


def _seen(run: L2Run | Returned | Fault | Refused, code: int) -> Seen:
    if isinstance(run, Fault):
        return Seen(How.FAULT, run.vector, words=str(run))
    if isinstance(run, Refused):
        return Seen(How.DIED, words=str(run))
    if code == _INVALID & _LOW:
        return Seen(How.INVALID, words="bits 63:32 of EXITCODE are 0")
    return Seen(How.INVALID) if code == _INVALID else Seen(How.ENTERED, code)
