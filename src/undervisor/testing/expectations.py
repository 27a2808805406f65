"""What a test says about a machine, and the words in which it is told that it was wrong.

`Expectations` is the base of `undervisor.api.Vm` and of the machines of the pytest plugin.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

from undervisor.errors import GuestDied, SiliconDied, TimedOut
from undervisor.hypervisor.trace import Transition
from undervisor.hypervisor.verdict import Ending, Outcome
from undervisor.testing.events import Event, What

LIMIT: Final = 60.0
"""Seconds of host time that a run to an event takes unless it is told otherwise."""
_QUOTED: Final = 400
_IDLE_HINT: Final = "it halted with interrupts that nothing will raise; did it mean to end the run?"


class ExpectationFailed(AssertionError):
    """A machine did not do what the test expected of it."""


class Expectations(ABC):
    """Runs, looks and assertions that need no more than what is abstract here."""

    @abstractmethod
    def run_until(
        self, *, serial: bytes | str | None = None, timeout: float = LIMIT, check: bool = False
    ) -> Event:
        """Run to some serial output."""

    @abstractmethod
    def printed(self) -> bytes:
        """Everything that the guest has sent to its serial port."""

    @abstractmethod
    def exits(
        self,
        level: int | None = None,
        to: int | None = None,
        vcpu: int | None = None,
        reason: str | None = None,
    ) -> list[Transition]:
        """The kept transitions of which all that is given holds; `reason` is a part of it."""

    @abstractmethod
    def counts(self) -> Mapping[tuple[int, int, int, str], int]:
        """How many transitions there were, by (vCPU, level that left, level that went on, reason).

        These are exact, however long the run was.
        """

    @abstractmethod
    def failures(self) -> list[str]:
        """The VM entries that failed, each with its broken rules, in words."""

    # -- serial output -------------------------------------------------------------------------

    def expect(self, text: bytes | str, timeout: float = LIMIT) -> None:
        """Run until the guest prints `text`, not counting what was expected before.

        ExpectationFailed where the run ends, or `timeout` seconds pass, without it.
        """
        __tracebackhide__ = True
        event = self.run_until(serial=text, timeout=timeout, check=False)
        if event.what is What.SERIAL:
            return
        assert event.outcome is not None
        raise ExpectationFailed(
            f"{text!r} was not printed: {_how(event.outcome, timeout)}\n"
            f"the last that the guest printed: {self._last_words()}"
        )

    def _last_words(self) -> str:
        printed = self.printed()
        words = printed[-_QUOTED:].decode("utf-8", "backslashreplace")
        more = "... " if len(printed) > _QUOTED else ""
        return f"{more}{words!r}" if words else "nothing at all"

    # -- transitions ---------------------------------------------------------------------------

    def count(
        self,
        level: int | None = None,
        to: int | None = None,
        vcpu: int | None = None,
        reason: str | None = None,
    ) -> int:
        """How many transitions there were of which all that is given holds."""
        part = None if reason is None else reason.lower()
        return sum(
            number
            for (index, left, went_on, why), number in self.counts().items()
            if vcpu in (None, index)
            and level in (None, left)
            and to in (None, went_on)
            and (part is None or part in why.lower())
        )

    def assert_no_failed_entries(self) -> None:
        """No VMLAUNCH, VMRESUME or VMRUN has failed; the broken rules are told otherwise."""
        __tracebackhide__ = True
        failures = self.failures()
        if failures:
            many = "a VM entry" if len(failures) == 1 else f"{len(failures)} VM entries"
            raise ExpectationFailed(f"{many} failed\n" + "\n".join(failures))

    def assert_entered_l2(self, vcpus: Iterable[int] = (0,)) -> None:
        """Each of these processors has entered an L2."""
        __tracebackhide__ = True
        missing = [vcpu for vcpu in vcpus if not self.count(1, 2, vcpu)]
        if missing:
            names = ", ".join(map(str, missing))
            failures = self.failures()
            why = "".join(f"\n{failure}" for failure in failures[-1:])
            raise ExpectationFailed(f"no L2 was entered on vCPU {names}{why}")

    def assert_exits(
        self,
        level: int | None = 2,
        to: int | None = None,
        vcpu: int | None = None,
        reason: str | None = None,
        at_least: int = 1,
        at_most: int | None = None,
    ) -> None:
        """There were so many transitions of which all that is given holds."""
        __tracebackhide__ = True
        number = self.count(level, to, vcpu, reason)
        if number >= at_least and (at_most is None or number <= at_most):
            return
        wanted = f"at least {at_least}" if at_most is None else f"{at_least} to {at_most}"
        raise ExpectationFailed(
            f"{number} exits with {_asked(level, to, vcpu, reason)}, not {wanted}; "
            f"there were {self._there_were(level)}"
        )

    def _there_were(self, level: int | None) -> str:
        """The reasons that there were, the most frequent first."""
        sums: Counter[str] = Counter()
        for (_, left, went_on, why), number in self.counts().items():
            if level in (None, left):
                sums[f"{why} L{left}->L{went_on}"] += number
        words = [f"{name} ({number})" for name, number in sums.most_common(10)]
        return ", ".join(words) or "none"


def _asked(level: int | None, to: int | None, vcpu: int | None, reason: str | None) -> str:
    parts = {"level": level, "to": to, "vcpu": vcpu, "reason": reason}
    return ", ".join(f"{name}={value}" for name, value in parts.items() if value is not None)


def _how(outcome: Outcome, timeout: float | None) -> str:
    """How a run ended, in a sentence."""
    if outcome.ending is Ending.TIMEOUT and timeout is not None:
        return f"{timeout:g} s have passed, and the guest still runs"
    return outcome.text.partition("\n")[0]


def check_outcome(outcome: Outcome, timeout: float | None) -> Outcome:
    """The outcome of a run that the guest itself ended, or that was stopped; raises otherwise.

    GuestDied after a triple fault, a VMX abort, or where everything waits for ever; TimedOut;
    SiliconDied where L0 met what it cannot handle.
    """
    __tracebackhide__ = True
    text = _how(outcome, timeout)
    match outcome.ending:
        case Ending.GUEST | Ending.STOPPED:
            return outcome
        case Ending.TIMEOUT:
            raise TimedOut(text)
        case Ending.UNKNOWN_EXIT:
            raise SiliconDied(text)
        case Ending.IDLE:
            raise GuestDied(text, hint=_IDLE_HINT)
        case Ending.TRIPLE_FAULT | Ending.VMX_ABORT:
            raise GuestDied(text)


def check_event(event: Event, wanted: str, timeout: float) -> Event:
    """The event, if it is the one that was asked for; `wanted` says which."""
    __tracebackhide__ = True
    if event.what is not What.END:
        return event
    assert event.outcome is not None
    check_outcome(event.outcome, timeout)
    raise ExpectationFailed(f"{wanted} did not come: {_how(event.outcome, timeout)}")


def wanted_words(
    level: int | None,
    to: int | None,
    vcpu: int | None,
    reason: str | None,
    serial: bytes | str | None,
) -> str:
    """What `run_until` was asked for."""
    parts = [_asked(level, to, vcpu, reason)]
    if serial is not None:
        parts.append(f"serial output {serial!r}")
    return "a transition with " + parts[0] if parts[0] else parts[-1] or "the transition"
