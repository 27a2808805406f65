"""All rules of a vendor on one target: what each broken entry does.

A wrong L0 may let L2 run with any state, so nothing after a wrong entry is trusted: the machine is
started again.  Where it dies or hangs, the entries of the batch are made one by one to find which.
An entry that must end in a VMX abort is made on a second processor where there is one, and the
first one looks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from undervisor.conformance.entries.svm.entries import SvmEntries
from undervisor.conformance.entries.trial import How, NotApplicable, Seen, Trial
from undervisor.conformance.entries.vmx.entries import VmxEntries
from undervisor.errors import GuestDied, TimedOut
from undervisor.guest.image import Image
from undervisor.guest.probe.client import Batch, Probe, ProbeSilent
from undervisor.guest.probe.l1 import Runner
from undervisor.guest.probe.program import program
from undervisor.targets import End, Job, Running, Target

MEMORY: Final = 32 << 20
AT_ONCE: Final = 24
"""Entries of one request."""
ANSWER_TIME: Final = 20.0
"""Seconds for a request of entries; a target that needs longer hangs."""
BOOT_TIME: Final = 60.0
_END_TIME: Final = 2.0
_ABORT_WORDS: Final = "VMX abort "


class Result(Enum):
    """What a target makes of a rule."""

    AGREES = "agrees"
    DIFFERS = "differs"
    NOT_APPLICABLE = "not applicable"
    NOT_RUN = "could not run"


@dataclass(frozen=True, slots=True)
class Row:
    """One rule on one target.

    `expected` and `seen` are set where the entry was made; `why` says why it was not, or what else
    there is to know.
    """

    rule: str
    result: Result
    mode: str = ""
    expected: Seen | None = None
    seen: Seen | None = None
    why: str = ""


class Entries(Protocol):
    """A probe whose processor is asked to enter states of its vendor."""

    runner: Runner
    rules: tuple[str, ...]

    def trial(self, rule: str) -> Trial | NotApplicable:
        """The attempt to break `rule` here."""

    def unbroken(self, trial: Trial, batch: Batch) -> Callable[[], Seen]:
        """Enter the valid state that `trial` starts from."""

    def broken(self, trial: Trial, batch: Batch) -> Callable[[], Seen]:
        """Enter the broken state."""

    def abort_indicator(self) -> int:
        """What a VMX abort has left in the VMCS, 0 for none; asked of the first processor."""


VENDORS: Final[dict[str, Callable[[Probe, int], Entries]]] = {"vmx": VmxEntries, "svm": SvmEntries}


class Session:
    """A vendor's rules on a target; the machine is started again whenever that is needed."""

    def __init__(self, target: Target, vendor: str, answer_time: float = ANSWER_TIME) -> None:
        self.target = target
        self.boots = 0
        self._make = VENDORS[vendor]
        self._answer_time = answer_time
        self._running: Running | None = None
        self._entries: Entries | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def run(self, rules: Iterable[str] | None = None) -> Iterator[Row]:
        """Each rule's row, in the order of the rules; all rules unless some are named."""
        entries = self._started()
        trials: list[Trial] = []
        for rule in entries.rules if rules is None else rules:
            trial = entries.trial(rule)
            if isinstance(trial, NotApplicable):
                yield Row(rule, Result.NOT_APPLICABLE, why=trial.why)
            else:
                trials.append(trial)
        for at in range(0, len(trials), AT_ONCE):
            yield from self._batch(trials[at : at + AT_ONCE])

    def _batch(self, trials: list[Trial]) -> Iterator[Row]:
        """As many as can be believed from one request, then the rest."""
        one_by_one = False
        while trials:
            rows = [] if one_by_one or trials[0].expected.fatal else self._try(trials)
            if not rows:
                rows = [self._single(trials[0])]
                one_by_one = rows[0].result is Result.AGREES
            yield from rows
            trials = trials[len(rows) :]

    def _try(self, trials: list[Trial]) -> list[Row]:
        """Rows up to the first entry that went wrong; none where the machine was lost."""
        trials = [trial for trial in trials if not trial.expected.fatal]
        seen = self._perform(trials)
        if isinstance(seen, Seen):
            return []
        rows = []
        for trial, (before, after) in zip(trials, seen, strict=True):
            rows.append(_row(trial, before, after))
            if rows[-1].result is not Result.AGREES:
                self._end()
                break
        return rows

    def _single(self, trial: Trial) -> Row:
        """One entry in requests of its own."""
        if trial.expected.fatal:
            return self._last(trial)
        before = self._ask(lambda entries, batch: entries.unbroken(trial, batch))
        if not before.entered:
            self._end()
            return _row(trial, before, before)
        row = _row(trial, before, self._ask(lambda entries, batch: entries.broken(trial, batch)))
        if row.result is not Result.AGREES:
            self._end()
        return row

    def _last(self, trial: Trial) -> Row:
        """An entry that its processor does not survive, if possible with another one to look."""
        self._end()
        self._start(processor=1 if self.target.abilities.most_cpus > 1 else 0)
        before = self._ask(lambda entries, batch: entries.unbroken(trial, batch))
        after = before
        if before.entered:
            after = self._ask(lambda entries, batch: entries.broken(trial, batch))
        if after.how is How.SILENT and self._entries is not None:
            indicator = self._entries.abort_indicator()
            after = Seen(How.ABORT, indicator) if indicator else after
        self._end()
        return _row(trial, before, after)

    def _ask(self, enter: Callable[[Entries, Batch], Callable[[], Seen]]) -> Seen:
        """One entry; or how the machine was lost."""
        entries, batch = self._started(), Batch()
        look = enter(entries, batch)
        try:
            entries.runner.run(batch, self._answer_time)
            return look()
        except (GuestDied, TimedOut) as error:
            return self._lost(error)

    def _perform(self, trials: list[Trial]) -> list[tuple[Seen, Seen]] | Seen:
        """Both entries of each trial in one request; or how the machine was lost."""
        entries, batch = self._started(), Batch()
        looks = [(entries.unbroken(t, batch), entries.broken(t, batch)) for t in trials]
        try:
            entries.runner.run(batch, self._answer_time)
            return [(before(), after()) for before, after in looks]
        except (GuestDied, TimedOut) as error:
            seen = self._lost(error)
            self._end()
            return seen

    def _lost(self, error: GuestDied | TimedOut) -> Seen:
        """What became of the machine that gave no answer."""
        assert self._running is not None
        end: End | None = None
        if not isinstance(error, ProbeSilent):
            with suppress(TimedOut):
                end = self._running.wait(_END_TIME)
        words = end.text if end is not None else error.message
        if words.startswith(_ABORT_WORDS):
            return Seen(How.ABORT, int(words[len(_ABORT_WORDS) :].split(":")[0]))
        return Seen(How.SILENT if isinstance(error, ProbeSilent) else How.DIED, words=words)

    def _started(self) -> Entries:
        """The machine, started if there is none."""
        return self._entries or self._start()

    def _start(self, processor: int = 0) -> Entries:
        """Start the machine; entries will be made on `processor`."""
        job = Job(Image.parse(program().elf, "probe"), cpus=processor + 1, memory=MEMORY)
        self._running = self.target.start(job)
        self.boots += 1
        probe = Probe(self._running)
        probe.wait_for_hello(BOOT_TIME)
        if processor:
            probe.start_aps([processor])
        self._entries = self._make(probe, processor)
        return self._entries

    def _end(self) -> None:
        if self._running is not None:
            self._running.__exit__(None, None, None)
        self._running = self._entries = None


def _row(trial: Trial, before: Seen, after: Seen) -> Row:
    common = (trial.mode, trial.expected)
    if not before.entered:
        why = f"the unbroken state {trial.mode!r} is not entered: {before}"
        return Row(trial.rule, Result.NOT_RUN, *common, why=why)
    result = Result.AGREES if after == trial.expected else Result.DIFFERS
    return Row(trial.rule, result, *common, after)
