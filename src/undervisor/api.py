"""The L0 as a library: build a machine, run it to an event, look into L1 and L2, hold exceptions.

    from undervisor.api import Vm

    vm = Vm("hypervisor.elf", cpu="amd", cpus=2)
    vm.run_until(to=2)                      # the first entry of L2
    l2 = vm.l2()
    print(hex(l2["rip"]), l2.read_gva(l2["rip"], 16).hex())
    event = vm.run_until(level=2, reason="cpuid")

The machine runs in this process, one at a time and deterministically; a guest that brings the
processor library down takes the process with it (`undervisor.targets.builtin` runs machines in
children).  `docs/api.md` has a worked example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from undervisor.arch.x86.boot import BootMode
from undervisor.arch.x86.events import Vector
from undervisor.errors import BadInput
from undervisor.guest.image import Image, Module
from undervisor.hypervisor import models
from undervisor.hypervisor.control import Decision, L2Exception, OnException, WatchedMachine
from undervisor.hypervisor.inspect import NotThere, World
from undervisor.hypervisor.machine import MAX_CPUS
from undervisor.hypervisor.recorder import Recorder
from undervisor.hypervisor.trace import Transition
from undervisor.hypervisor.verdict import Ending, Outcome
from undervisor.targets import DEFAULT_MEMORY, Job
from undervisor.targets.builtin import build
from undervisor.testing.entries import FailedEntry, failed_entry
from undervisor.testing.events import Event, What
from undervisor.testing.expectations import (
    LIMIT,
    ExpectationFailed,
    Expectations,
    check_event,
    check_outcome,
    wanted_words,
)
from undervisor.testing.history import History, matching

__all__ = [
    "Decision",
    "Event",
    "ExpectationFailed",
    "FailedEntry",
    "L2Exception",
    "NotThere",
    "Outcome",
    "Transition",
    "Vm",
    "What",
    "World",
]

Predicate = Callable[[Transition], bool]


class Vm(Expectations):
    """A machine with an image, in this process."""

    def __init__(
        self,
        image: str | Path | bytes,
        *,
        cpu: str = "intel",
        cpus: int = 1,
        memory: int = DEFAULT_MEMORY,
        append: str = "",
        modules: Sequence[Module] = (),
        raw: int | None = None,
        quirks: Iterable[str] = (),
    ) -> None:
        """`image`: a path or the bytes; `raw`: the address of a flat binary, real mode below 1 MiB.

        BadInput where the image, the model or the size cannot be used.
        """
        if not 1 <= cpus <= MAX_CPUS:
            raise BadInput(f"{cpus} processors", hint=f"1 to {MAX_CPUS} are possible")
        data, name = _content(image)
        job = Job(_parse(data, name, raw), cpus, memory, append, tuple(modules))
        self.serial = bytearray()
        """Everything that the guest has sent."""
        self.history = History()
        """The last transitions, how many there were, and the VM entries that failed."""
        self._predicate: Predicate | None = None
        self._text: bytes | None = None
        self._seen_from = 0
        self._hit: Event | None = None
        self._kept: dict[int, dict[int, int]] = {}
        machine = build(
            job,
            models.named(cpu),
            serial=self._received,
            tracer=Recorder(self._transition),
            quirks=quirks,
            kind=WatchedMachine,
        )
        assert isinstance(machine, WatchedMachine)
        self.machine = machine
        """The machine itself, for what is not here."""

    # -- running -------------------------------------------------------------------------------

    def run(self, timeout: float | None = None, *, check: bool = False) -> Outcome:
        """Run to the end, or for `timeout` seconds of host time.

        With `check`, GuestDied, TimedOut or SiliconDied where the guest did not end the run.
        """
        self._predicate, self._text, self._hit = None, None, None
        outcome = self.machine.run(timeout)
        return check_outcome(outcome, timeout) if check else outcome

    def run_until(
        self,
        when: Predicate | None = None,
        *,
        level: int | None = None,
        to: int | None = None,
        vcpu: int | None = None,
        reason: str | None = None,
        serial: bytes | str | None = None,
        timeout: float = LIMIT,
        check: bool = False,
    ) -> Event:
        """Run to a transition of which everything that is given holds, or to some serial output.

        `level` left, `to` goes on; `reason` is a part of the reason, in any case; `when` is asked
        last.  `serial` may be a text that has come since the last call, and counts on its own.
        With `check`, an end before the event is an error: as of `run`, else ExpectationFailed.
        """
        self._predicate = _predicate(when, level, to, vcpu, reason, alone=serial is None)
        self._text = serial.encode() if isinstance(serial, str) else serial
        event = self._run_to_event(timeout)
        if not check:
            return event
        return check_event(event, wanted_words(level, to, vcpu, reason, serial), timeout)

    def _run_to_event(self, timeout: float) -> Event:
        self._hit = Event(What.SERIAL) if self._text_has_come() else None
        if self._hit is None:
            outcome = self.machine.run(timeout)
            if outcome.ending is not Ending.STOPPED or self._hit is None:
                self._hit = Event(What.END, outcome=outcome)
        self._predicate, self._text = None, None
        return self._hit

    def send(self, data: bytes) -> None:
        """Input for the guest's serial port."""
        self.machine.platform.feed_serial(data)

    def _transition(self, transition: Transition) -> None:
        if transition.level == 2 and transition.to == 1:
            self._keep(transition.vcpu)
        self._remember(transition, failed_entry(self.machine.vcpus[transition.vcpu], transition))
        if self._text is not None:
            self.machine.platform.flush()  # a prompt ends without a newline
        if self._predicate is not None and self._predicate(transition):
            self._stop(Event(What.TRANSITION, transition=transition))

    def _remember(self, transition: Transition, failed: FailedEntry | None) -> None:
        self.history.add(transition, failed)

    def _keep(self, vcpu: int) -> None:
        """L2's general registers at its exit: L1 will use them for itself."""
        q = self.machine.vcpus[vcpu].state.q
        self._kept[vcpu] = {number: q[number] for number in range(16)}

    def _received(self, data: bytes) -> None:
        self.serial += data
        if self._text_has_come():
            self._stop(Event(What.SERIAL))

    def _text_has_come(self) -> bool:
        """Whether the text that is waited for is there; it is not found again."""
        at = -1 if self._text is None else self.serial.find(self._text, self._seen_from)
        if self._text is None or at < 0:
            return False
        self._seen_from = at + len(self._text)
        return True

    def _stop(self, event: Event) -> None:
        if self._hit is None:
            self._hit = event
            self.machine.request_stop()

    # -- what has happened ---------------------------------------------------------------------

    def printed(self) -> bytes:
        """Everything that the guest has sent to its serial port."""
        return bytes(self.serial)

    def exits(
        self,
        level: int | None = None,
        to: int | None = None,
        vcpu: int | None = None,
        reason: str | None = None,
    ) -> list[Transition]:
        """The last 20,000 transitions, as far as all that is given holds of them."""
        return self.history.exits(level, to, vcpu, reason)

    def counts(self) -> Mapping[tuple[int, int, int, str], int]:
        """How many transitions there were, by (vCPU, level that left, level that went on, reason).

        These are exact, however long the run was.
        """
        return self.history.counts

    def failures(self) -> list[str]:
        """The last hundred VM entries that failed, each with its broken rules, in words."""
        return [str(failed) for failed in self.history.failed]

    # -- looking -------------------------------------------------------------------------------

    @property
    def current(self) -> int:
        """The vCPU that the machine stopped on."""
        return self.machine.current.index

    def world(self, level: int, vcpu: int | None = None) -> World:
        """Level 1 or 2 on a vCPU, by default the one that the machine stopped on."""
        index = self.current if vcpu is None else vcpu
        kept = self._kept.get(index) if level == 2 else None
        return World(self.machine.vcpus[index], level, kept)

    def l1(self, vcpu: int | None = None) -> World:
        """L1's registers and memory."""
        return self.world(1, vcpu)

    def l2(self, vcpu: int | None = None) -> World:
        """L2's registers and memory."""
        return self.world(2, vcpu)

    def read_hpa(self, hpa: int, size: int) -> bytes:
        """Host-physical memory; L1's guest-physical addresses are the same."""
        return self.machine.memory.read(hpa, size)

    def write_hpa(self, hpa: int, data: bytes) -> None:
        """Write host-physical memory; code is seen to have changed."""
        self.machine.memory.write(hpa, data)

    # -- holding -------------------------------------------------------------------------------

    def intercept(self, vectors: Iterable[Vector | int], on_exception: OnException) -> None:
        """Let `on_exception` decide about these exceptions of L2, before L1 sees them."""
        self.machine.watch_exceptions(frozenset(int(v) for v in vectors), on_exception)


def _content(image: str | Path | bytes) -> tuple[bytes, str]:
    if isinstance(image, bytes):
        return image, "the image"
    path = Path(image)
    try:
        # The guest is told the name, and a run is to be the same wherever the file lies.
        return path.read_bytes(), path.name
    except OSError as error:
        raise BadInput(f"cannot read {image}: {error.strerror}") from None


def _parse(data: bytes, name: str, raw: int | None) -> Image:
    if raw is None:
        return Image.parse(data, name)
    mode = BootMode.REAL if raw < 0x100000 else BootMode.PROTECTED32
    return Image.raw(data, name, raw, mode)


def _predicate(
    when: Predicate | None,
    level: int | None,
    to: int | None,
    vcpu: int | None,
    reason: str | None,
    *,
    alone: bool,
) -> Predicate | None:
    """All that was asked for, together; None where nothing was and something else ends the run."""
    given = (when, level, to, vcpu, reason)
    if all(part is None for part in given):
        if alone:
            raise ValueError("run_until needs to be told until what")
        return None
    part = None if reason is None else reason.lower()

    def holds(transition: Transition) -> bool:
        return matching(transition, level, to, vcpu, part) and (when is None or when(transition))

    return holds
