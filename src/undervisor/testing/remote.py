"""A machine in a process of its own, as a test sees it: `undervisor.api.Vm` at arm's length.

A guest that crashes the processor library takes its process with it, and the test fails in words.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from undervisor.errors import SiliconDied, TimedOut
from undervisor.hypervisor.trace import Transition
from undervisor.hypervisor.verdict import Ending, Outcome
from undervisor.testing.blackbox import Reader
from undervisor.testing.boot import (
    ABANDONED,
    ANSWER,
    ERROR,
    EXCEPTION,
    VALUE,
    WHEN,
    Boot,
    context,
    live,
)
from undervisor.testing.events import Event
from undervisor.testing.expectations import (
    LIMIT,
    Expectations,
    check_event,
    check_outcome,
    wanted_words,
)
from undervisor.testing.history import select
from undervisor.testing.worlds import RemoteWorld

if TYPE_CHECKING:
    from undervisor.api import Decision, L2Exception

GRACE: Final = 5.0
"""Seconds after its time limit that a machine has to stop by itself."""
BOOT_SECONDS: Final = 60.0
"""Seconds that a machine may take to be made, which is not the guest's time."""
_HINT: Final = "more with @pytest.mark.undervisor(timeout=SECONDS) or --undervisor-timeout"


class TimeLimit:
    """The time that the machines of a test may run, together; a debugger's pauses do not count."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.left = seconds
        self._depth = 0

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count what happens inside, once."""
        started, self._depth = time.monotonic(), self._depth + 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self.left -= time.monotonic() - started


class BootedVm(Expectations):
    """A machine with an image, ready to run."""

    def __init__(self, boot: Boot, limit: TimeLimit, folder: Path, trace: Path | None) -> None:
        self.boot = boot
        self.end: str = ""
        """How the run ended, or what its process died of; empty while it can go on."""
        self._limit, self._folder = limit, folder
        self._box = Reader(folder)
        self._callbacks: dict[str, Callable[[Any], Any]] = {}
        self._raised: BaseException | None = None
        self._line, theirs = context().Pipe()
        self._process = context().Process(
            target=live, args=(theirs, boot, folder, trace), daemon=True
        )
        with theirs:
            self._process.start()
        try:
            self._reply(BOOT_SECONDS)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"<machine: {self.boot}>"

    # -- running -------------------------------------------------------------------------------

    def run(self, timeout: float | None = None, *, check: bool = True) -> Outcome:
        """Run until the guest ends the run; its exit status is `status`.

        GuestDied after a triple fault, a VMX abort or where everything waits for ever, TimedOut,
        SiliconDied where the processor library crashed.  Without `check` the first three are an
        outcome like any other, but for the time limit of the test, which is always an error.
        """
        __tracebackhide__ = True
        outcome: Outcome = self._run("run", timeout)
        return check_outcome(outcome, timeout) if check else outcome

    def run_until(
        self,
        when: Callable[[Transition], bool] | None = None,
        *,
        level: int | None = None,
        to: int | None = None,
        vcpu: int | None = None,
        reason: str | None = None,
        serial: bytes | str | None = None,
        timeout: float = LIMIT,
        check: bool = True,
    ) -> Event:
        """Run to a transition of which everything that is given holds, or to serial output.

        As `undervisor.api.Vm.run_until`; an end before the event is an error unless `check` is
        false.
        """
        __tracebackhide__ = True
        if when is not None:
            self._callbacks[WHEN] = when
        options = {"level": level, "to": to, "vcpu": vcpu, "reason": reason, "serial": serial}
        event: Event = self._run("run_until", timeout, when is not None, options)
        wanted = wanted_words(level, to, vcpu, reason, serial)
        return check_event(event, wanted, timeout) if check else event

    def send(self, data: bytes | str) -> None:
        """Input for the guest's serial port."""
        self._call("send", data.encode() if isinstance(data, str) else data)

    def _run(self, method: str, timeout: float | None, *arguments: Any) -> Any:
        """A run that the test's time limit ends if nothing else does."""
        __tracebackhide__ = True
        limit = max(0.0, self._limit.left)
        own = limit if timeout is None else min(timeout, limit)
        if method == "run":
            found = self._call("run", own, limit=own + GRACE)
        else:
            has_when, options = arguments
            found = self._call(method, has_when, {**options, "timeout": own}, limit=own + GRACE)
        raised, self._raised = self._raised, None
        if raised is not None:
            raise raised
        outcome = found.outcome if isinstance(found, Event) else found
        if outcome is not None and outcome.ending is not Ending.STOPPED:
            if outcome.ending is Ending.TIMEOUT and own == limit:
                raise self._too_long()
            self.end = outcome.text.partition("\n")[0]
        return found

    # -- what has happened ---------------------------------------------------------------------

    @property
    def serial(self) -> bytes:
        """Everything that the guest has sent to its serial port."""
        return self.printed()

    def printed(self) -> bytes:
        """Everything that the guest has sent to its serial port."""
        return self._box.printed()

    def exits(
        self,
        level: int | None = None,
        to: int | None = None,
        vcpu: int | None = None,
        reason: str | None = None,
    ) -> list[Transition]:
        """The last 20,000 transitions, as far as all that is given holds of them."""
        return select(self._box.transitions(), level, to, vcpu, reason)

    def counts(self) -> Mapping[tuple[int, int, int, str], int]:
        """How many transitions there were, by (vCPU, level that left, level that went on, reason).

        These are exact, however long the run was.
        """
        found: dict[tuple[int, int, int, str], int] = self._call("counts")
        return found

    def failures(self) -> list[str]:
        """The last hundred VM entries that failed, each with its broken rules, in words."""
        return self._box.failures()

    # -- looking -------------------------------------------------------------------------------

    @property
    def current(self) -> int:
        """The vCPU that the machine stopped on."""
        return int(self._call("current"))

    @property
    def now(self) -> int:
        """The machine's virtual time in nanoseconds."""
        return int(self._call("now"))

    def world(self, level: int, vcpu: int | None = None) -> RemoteWorld:
        """Level 1 or 2 on a vCPU, by default the one that the machine stopped on."""
        index = self.current if vcpu is None else vcpu
        return RemoteWorld(self._call, level, index)

    def l1(self, vcpu: int | None = None) -> RemoteWorld:
        """L1's registers and memory."""
        return self.world(1, vcpu)

    def l2(self, vcpu: int | None = None) -> RemoteWorld:
        """L2's registers and memory."""
        return self.world(2, vcpu)

    def read_hpa(self, hpa: int, size: int) -> bytes:
        """Host-physical memory; L1's guest-physical addresses are the same."""
        data: bytes = self._call("read_hpa", hpa, size)
        return data

    def write_hpa(self, hpa: int, data: bytes) -> None:
        """Write host-physical memory; code is seen to have changed."""
        self._call("write_hpa", hpa, data)

    def registers(self) -> str:
        """The registers of both levels in words, where the machine can still be asked."""
        text: str = self._call("registers", limit=GRACE)
        return text

    # -- holding -------------------------------------------------------------------------------

    def intercept(
        self, vectors: Iterable[int], on_exception: Callable[[L2Exception], Decision]
    ) -> None:
        """Let `on_exception` decide about these exceptions of L2, before L1 sees them."""
        from undervisor.api import L2Exception

        def decide(parts: tuple[int, int, int | None, int | None]) -> str:
            vcpu, vector, error_code, address = parts
            world: Any = RemoteWorld(self._call, 2, vcpu)
            return on_exception(L2Exception(vcpu, vector, error_code, address, world)).name

        self._callbacks[EXCEPTION] = decide
        self._call("intercept", [int(vector) for vector in vectors])

    # -- the line to the machine's process -----------------------------------------------------

    def _call(
        self, method: str, *arguments: Any, limit: float | None = None, **options: Any
    ) -> Any:
        """Have it done over there; SiliconDied where the process is gone."""
        __tracebackhide__ = True
        if self._line.closed:
            raise SiliconDied(f"the machine is gone: {self.end or 'it was closed'}")
        with self._limit.counting():
            try:
                self._line.send((method, arguments, options))
            except OSError:
                raise self._died() from None
            return self._reply(GRACE + self._limit.seconds if limit is None else limit)

    def _reply(self, limit: float) -> Any:
        __tracebackhide__ = True
        deadline = time.monotonic() + limit
        while True:
            kind, value = self._receive(deadline)
            if kind == VALUE:
                return value
            if kind == ERROR:
                raise value
            callback, argument = value
            self._line.send((ANSWER, self._answer(callback, argument), {}))

    def _receive(self, deadline: float) -> Any:
        __tracebackhide__ = True
        try:
            if self._line.poll(max(0.0, deadline - time.monotonic())):
                return self._line.recv()
        except (EOFError, OSError):
            raise self._died() from None
        raise self._too_long()

    def _answer(self, callback: str, argument: Any) -> Any:
        """What a callback of the test says; what it raises is raised when the run has stopped."""
        try:
            return self._callbacks[callback](argument)
        except BaseException as error:
            self._raised = error
            return ABANDONED

    def _too_long(self) -> TimedOut:
        self.end = self.end or f"stopped: the test's {self._limit.seconds:g} s are over"
        return TimedOut(
            f"the time limit of the test, {self._limit.seconds:g} s, has passed and the machine "
            "still runs",
            hint=_HINT,
        )

    def _died(self) -> SiliconDied:
        self._process.join(GRACE)
        status = self._process.exitcode or 0
        self.end = (
            f"the machine's process died: {_signal(-status)}"
            if status < 0
            else (f"the machine's process ended by itself, with status {status}")
        )
        self._line.close()
        return SiliconDied(
            self.end, hint="a guest can bring the processor library down; nothing else is lost"
        )

    @property
    def pid(self) -> int | None:
        """The process that the machine runs in."""
        return self._process.pid

    def close(self) -> None:
        """End it now, and throw its black box away."""
        self._process.kill()
        self._process.join(GRACE)
        self._line.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
