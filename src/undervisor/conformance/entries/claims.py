"""A section's rules as one guest test: each is broken, and all that differ are named."""

from __future__ import annotations

from collections.abc import Iterable

from undervisor.conformance.entries.session import AT_ONCE, Entries
from undervisor.conformance.entries.trial import NotApplicable, Trial
from undervisor.conformance.expect import Broken, Lacking
from undervisor.guest.probe.client import Batch

_SHOWN = 6


def check(entries: Entries, rules: Iterable[str]) -> None:
    """Each of `rules` that this processor can break does what it declares.

    Lacking where it can break none.  Rules whose breaking ends the machine are left out.
    """
    found = [entries.trial(rule) for rule in rules]
    trials = [t for t in found if isinstance(t, Trial) and not t.expected.fatal]
    if not trials:
        reasons = {t.why for t in found if isinstance(t, NotApplicable)}
        reasons |= {"the processor does not survive it" for t in found if isinstance(t, Trial)}
        raise Lacking(f"none of these rules can be broken here: {'; '.join(sorted(reasons))}")
    wrong = [line for at in range(0, len(trials), AT_ONCE) for line in _wrong(entries, trials, at)]
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        said = "; ".join(wrong[:_SHOWN])
        raise Broken(f"{len(wrong)} of {len(trials)} rules: {said}{more}")


def _wrong(entries: Entries, trials: list[Trial], at: int) -> list[str]:
    """What is not as declared among some of the trials, made in one request."""
    batch, portion = Batch(), trials[at : at + AT_ONCE]
    looks = [(t, entries.unbroken(t, batch), entries.broken(t, batch)) for t in portion]
    entries.runner.run(batch)
    lines = []
    for trial, unbroken, broken in looks:
        before = unbroken()
        if not before.entered:
            lines.append(f"{trial.rule}: the valid state {trial.mode!r} is not entered: {before}")
        elif (seen := broken()) != trial.expected:
            lines.append(f"{trial.rule}: {seen}, must be {trial.expected}")
    return lines
