"""Run guest tests on a target: a machine for each test, and a verdict whatever happens to it."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from typing import Final

from undervisor.conformance.expect import Broken, Lacking
from undervisor.conformance.lab import Lab
from undervisor.conformance.places import MEMORY
from undervisor.conformance.prelude import Earlier, TestsProbe, lab_of
from undervisor.conformance.suite import GuestTest
from undervisor.errors import BadInput, TimedOut, UndervisorError
from undervisor.guest.image import Image
from undervisor.guest.probe.answers import Faulted
from undervisor.guest.probe.client import ProbeDied, ProbeSilent
from undervisor.guest.probe.program import program
from undervisor.targets import Abilities, End, How, Job, Running, Target

END_TIME: Final = 2.0
"""Seconds to learn how a machine ended that has closed its line."""


class Verdict(Enum):
    """What became of a test; the value is how it is written."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    GUEST_DIED = "guest died"
    TARGET_DIED = "target died"
    TIMED_OUT = "timed out"
    ERROR = "error"

    @property
    def good(self) -> bool:
        """Whether nothing is wrong with the target."""
        return self in (Verdict.PASSED, Verdict.SKIPPED)


@dataclass(frozen=True, slots=True)
class Result:
    """A test's verdict on a target: `message` is one line, `details` all that is known beyond."""

    test: GuestTest
    target: str
    verdict: Verdict
    message: str = ""
    details: str = ""
    seconds: float = 0.0


def run_test(test: GuestTest, target: Target, earlier: Earlier | None = None) -> Result:
    """Boot the probe on `target`, run `test` in its lab, and say what became of it.

    `earlier` has what tests before it on the same target have found out, and gets what it finds.
    """
    begin = time.monotonic()
    result = _missing(test, target) or _run(test, target, earlier or Earlier())
    return replace(result, seconds=time.monotonic() - begin)


def run_all(
    tests: Iterable[GuestTest],
    target: Target,
    *,
    jobs: int = 0,
    seen: Callable[[Result], None] = lambda result: None,
    to_the_first: bool = False,
) -> list[Result]:
    """The results of `tests`, in their order; `seen` is told each as it comes.

    `jobs` machines run at a time; 0: one for each processor of the host.  The target's own limit
    holds in any case.  `to_the_first`: end at the first verdict that is not good, with the
    results that there are.
    """
    most = min(jobs or os.cpu_count() or 1, target.abilities.at_once)
    watched, earlier = _Watched(target), Earlier()
    with ThreadPoolExecutor(max_workers=max(1, most)) as pool:
        futures = [pool.submit(run_test, test, watched, earlier) for test in tests]
        try:
            for future in as_completed(futures):
                seen(future.result())
                if to_the_first and not future.result().verdict.good:
                    pool.shutdown(wait=False, cancel_futures=True)
                    done = [f.result() for f in futures if f.done() and not f.cancelled()]
                    watched.stop()
                    return done
        except BaseException:  # Ctrl-C above all: nothing is left running
            pool.shutdown(wait=False, cancel_futures=True)
            watched.stop()
            raise
    return [future.result() for future in futures]


class _Watched:
    """A target that remembers its machines, to stop them all."""

    def __init__(self, target: Target) -> None:
        self.name = target.name
        self._target = target
        self._machines: list[Running] = []
        self._stopped = False

    @property
    def abilities(self) -> Abilities:
        """The target's."""
        return self._target.abilities

    def start(self, job: Job) -> Running:
        """Start a machine; EOFError where all have been stopped."""
        if self._stopped:
            raise EOFError("the run was stopped")
        running = self._target.start(job)
        self._machines.append(running)
        if self._stopped:  # between the question and the start
            running.stop()
        return running

    def stop(self) -> None:
        """End every machine, and start no more."""
        self._stopped = True
        for running in self._machines:
            running.stop()


@contextmanager
def lab_on(target: Target, vendor: str, cpus: int = 1, seconds: float = 20.0) -> Iterator[Lab]:
    """A lab in VMX operation or with SVM enabled, on a machine of its own."""
    with target.start(_job(cpus)) as running:
        probe = TestsProbe(running, time.monotonic() + seconds)
        probe.wait_for_hello()
        yield lab_of(vendor, probe, Earlier(), copies=False)


@lru_cache(maxsize=1)
def _image() -> Image:
    return Image.parse(program().elf, "probe")


def _job(cpus: int, prelude: bytes = b"") -> Job:
    return Job(_image(), cpus=cpus, memory=MEMORY, prompt=True, prelude=prelude)


def _missing(test: GuestTest, target: Target) -> Result | None:
    """A skip where the target itself says that it cannot."""
    abilities = target.abilities
    if test.vendor not in abilities.vendors:
        return Result(test, target.name, Verdict.SKIPPED, f"the target has no {test.vendor}")
    if test.cpus > abilities.most_cpus:
        reason = f"needs {test.cpus} processors, the target has at most {abilities.most_cpus}"
        return Result(test, target.name, Verdict.SKIPPED, reason)
    return None


def _run(test: GuestTest, target: Target, earlier: Earlier) -> Result:
    limit = test.seconds * target.abilities.patience
    copies = target.abilities.copies
    prelude = earlier.preludes.get(test.vendor, b"") if copies else b""
    try:
        running = target.start(_job(test.cpus, prelude))
    except UndervisorError as error:
        return Result(test, target.name, Verdict.TARGET_DIED, error.message, error.hint)
    with running:
        try:
            probe = TestsProbe(running, time.monotonic() + limit, prelude)
            probe.wait_for_hello()
            lab = lab_of(test.vendor, probe, earlier, copies=copies)
            for need in test.needs:
                if not need.present(lab):
                    raise Lacking(f"the processor has not {need.name}")
            test.run(lab)
        except BadInput:
            raise
        except Exception as error:  # every way to fail becomes a verdict
            return _judge(test, target, running, error, limit)
    return Result(test, target.name, Verdict.PASSED)


def _judge(
    test: GuestTest, target: Target, running: Running, error: Exception, limit: float
) -> Result:
    match error:
        case Lacking():
            return Result(test, target.name, Verdict.SKIPPED, str(error))
        case Broken():
            return Result(test, target.name, Verdict.FAILED, str(error))
        case Faulted():
            return Result(test, target.name, Verdict.FAILED, error.message)
        case ProbeSilent():
            message = f"{error.message} (limit {limit:g} s)"
            return Result(test, target.name, Verdict.TIMED_OUT, message)
        case ProbeDied() | EOFError():
            end = _end(running)
            dead = end.how is How.TARGET_DIED
            verdict = Verdict.TARGET_DIED if dead else Verdict.GUEST_DIED
            said = error.message if isinstance(error, ProbeDied) else str(error)
            message = f"{said}: {end.text}" if end.text else said
            return Result(test, target.name, verdict, message, end.report)
        case _:
            details = "".join(traceback.format_exception(error))
            message = f"the test itself: {type(error).__name__}: {error}"
            return Result(test, target.name, Verdict.ERROR, message, details)


def _end(running: Running) -> End:
    """How the machine ended; that it still runs where it speaks and makes no sense."""
    try:
        return running.wait(END_TIME)
    except TimedOut:
        return End(How.STOPPED, "")
