"""The suite tested: what must fail does, by its own test and for the right reason.

A *catch* is a test that a wrong L0 must fail and the words that its message must then hold.  A
*mutant* is any wrong L0: it is killed by whatever test fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from undervisor.conformance.runner import Result, Verdict, run_all, run_test
from undervisor.conformance.suite import GuestTest, all_tests
from undervisor.targets import Abilities, Job, Running, Target

PATIENCE: Final = 0.25
"""Wrong L0s hang: what passes takes a fraction of its time, and need not wait for all of it."""

# Which aspects are likeliest to find what is wrong in a module: tried first, then all the others.
_LIKELY: Final[dict[str, tuple[str, ...]]] = {
    "apic": ("apic",),
    "virtual_interrupts": ("apic", "events"),
    "controls": ("exits", "controls"),
    "entry": ("entry_resume", "entry_modes", "state", "events", "entry"),
    "events": ("events", "timers"),
    "exit": ("state", "exits", "events"),
    "functions": ("instructions_l2", "instructions", "controls"),
    "guest": ("control_registers", "instructions", "exits"),
    "information": ("instructions", "exits"),
    "instructions": ("instructions", "tlb"),
    "msr_lists": ("msr",),
    "paging": ("paging", "tlb"),
    "permissions": ("exits_io", "exits_msr", "exits"),
    "reflect": ("exits", "control_registers"),
    "rule": ("entry", "controls"),
    "state": ("instructions", "state"),
    "timers": ("timers",),
    "usual": ("instructions",),
}


@dataclass(frozen=True, slots=True)
class Catch:
    """A test that must fail under a quirk, and the words that its message must hold."""

    test: str
    words: str


@dataclass(frozen=True, slots=True)
class Caught:
    """What a catch came to: `result` is the test's under the quirk, None where there is none."""

    catch: Catch
    result: Result | None

    @property
    def good(self) -> bool:
        """Whether the test failed, and for the right reason."""
        if self.result is None or self.result.verdict.good:
            return False
        return self.catch.words in self.result.message


class Impatient:
    """A target whose tests have less time."""

    def __init__(self, target: Target, patience: float = PATIENCE) -> None:
        self.name = target.name
        self._target, self._patience = target, patience

    @property
    def abilities(self) -> Abilities:
        """The target's, with less patience."""
        return replace(self._target.abilities, patience=self._patience)

    def start(self, job: Job) -> Running:
        """Start a machine."""
        return self._target.start(job)


def catch(target: Target, catches: Iterable[Catch], jobs: int = 0) -> list[Caught]:
    """Run on a wrong target the tests that must fail there."""
    wanted = list(catches)
    known = {test.id: test for test in all_tests()}
    tests = [known[c.test] for c in wanted if c.test in known]
    found = {r.test.id: r for r in run_all(tests, Impatient(target), jobs=jobs)}
    return [Caught(c, found.get(c.test)) for c in wanted]


def kill(
    target: Target,
    vendor: str,
    where: str = "",
    jobs: int = 0,
    seen: Callable[[Result], None] = lambda result: None,
) -> Result | None:
    """The first bad result of the vendor's tests on a wrong target; None where all are good.

    A test that timed out counts if it is bad again, alone and with all of its time: a machine that
    is busy with other things is no proof.
    """
    tests = in_likely_order([t for t in all_tests() if t.vendor == vendor], where)
    while tests:
        results = run_all(tests, Impatient(target), jobs=jobs, to_the_first=True, seen=seen)
        bad = [r for r in results if not r.verdict.good]
        sure = [r for r in bad if r.verdict is not Verdict.TIMED_OUT]
        doubtful = (run_test(r.test, target) for r in bad if r not in sure)
        found = next(iter(sure), None) or next((r for r in doubtful if not r.verdict.good), None)
        if found is not None:
            return found
        done = {r.test.id for r in results}
        tests = [test for test in tests if test.id not in done]
    return None


def in_likely_order(tests: Sequence[GuestTest], where: str) -> list[GuestTest]:
    """The tests whose aspect goes with the module named in `where` first; of these, quick ones."""
    module = where.split(":")[0].split(" ")[0].split(".")[-1]
    likely = _LIKELY.get(module, ())

    def rank(test: GuestTest) -> tuple[int, int]:
        ranks = [n for n, aspect in enumerate(likely) if test.aspect.startswith(aspect)]
        return min(ranks, default=len(likely)), test.cpus

    return sorted(tests, key=rank)
