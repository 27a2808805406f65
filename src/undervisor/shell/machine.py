"""The machine under the prompt: started, asked, found dead, started anew."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

from undervisor.errors import (
    BadInput,
    ExitCode,
    GuestDied,
    SiliconDied,
    TimedOut,
    UndervisorError,
)
from undervisor.guest.image import Image
from undervisor.guest.probe.answers import Faulted
from undervisor.guest.probe.batch import BatchCore
from undervisor.guest.probe.client import Probe, ProbeDied, ProbeSilent
from undervisor.guest.probe.l1 import Runner
from undervisor.guest.probe.program import program
from undervisor.targets import End, How, Job, Running, Target

MEMORY: Final = 64 << 20
BOOT_SECONDS: Final = 60.0
LAST_WORDS: Final = 5.0
ANEW: Final = "reboot() starts anew"


class Refused(UndervisorError):
    """The processor did not do what the user told it to."""

    exit_code = ExitCode.NEGATIVE


class Machine:
    """A target with the probe on it.

    `seconds` is how long an answer may take, which an L2 that never exits does not give.
    """

    def __init__(self, target: Target, cpus: int, seconds: float) -> None:
        self.target, self.cpus, self.seconds = target, cpus, seconds
        self.end: End | None = None
        """How the machine ended, once it has."""
        self._stack = contextlib.ExitStack()
        self._started = 1
        self._probe = self._start()

    def _start(self) -> Probe:
        job = Job(Image.parse(program().elf, "the probe"), cpus=self.cpus, memory=MEMORY)
        self._running: Running = self._stack.enter_context(self.target.start(job))
        probe = Probe(self._running, self.seconds)
        self.end, self._started = None, 1
        with self.told():
            probe.wait_for_hello(BOOT_SECONDS)
        return probe

    def reboot(self) -> None:
        """Start the machine anew; nothing of the old one is left."""
        self._stack.close()
        self._probe = self._start()

    def close(self) -> None:
        """End the machine."""
        self._stack.close()

    def run(self, batch: BatchCore, processor: int = 0) -> None:
        """Run a batch on a processor that has been started."""
        if self.end is not None:
            raise self._dead(self.end)
        with self.told():
            self._probe.on(processor).run(batch)

    def on(self, processor: int) -> Runner:
        """A processor as something that runs batches, started if it has not been.

        Processors are started in their order, so that the probe's numbers are the APIC IDs.
        """
        if not 0 <= processor < self.cpus:
            raise BadInput(
                f"no processor {processor}: there are {self.cpus}",
                hint="undervisor shell --cpus N gives more, up to 8",
            )
        while self._started <= processor:
            with self.told():
                running = self._probe.start_aps([self._started])
            if running <= self._started:
                raise Refused(f"processor {self._started} did not start")
            self._started += 1
        return _OnProcessor(self, processor)

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Say what became of a machine that gives no answer."""
        try:
            yield
        except ProbeDied as death:
            self.end = self._how_it_ended(death)
            raise self._dead(self.end) from None
        except ProbeSilent as silence:
            raise TimedOut(
                f"{silence.message}; the machine still runs, perhaps an L2 that does not exit",
                hint=ANEW,
            ) from None
        except Faulted as fault:
            raise Refused(fault.message) from None

    def _how_it_ended(self, death: ProbeDied) -> End:
        try:
            return self._running.wait(LAST_WORDS)
        except (TimedOut, EOFError):
            return End(How.GUEST_DIED, death.message)

    def _dead(self, end: End) -> UndervisorError:
        kind = SiliconDied if end.how is How.TARGET_DIED else GuestDied
        return kind(f"the machine is dead: {end.text}", hint=ANEW)


class _OnProcessor:
    """Runs batches on one processor, and says what became of the machine."""

    def __init__(self, machine: Machine, number: int) -> None:
        self._machine, self._number = machine, number

    def run(self, batch: BatchCore, timeout: float | None = None) -> None:
        """Run `batch` and fill in its answers."""
        self._machine.run(batch, self._number)
