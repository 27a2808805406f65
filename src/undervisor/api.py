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

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from undervisor.arch.x86.boot import BootMode
from undervisor.arch.x86.events import Vector
from undervisor.errors import BadInput
from undervisor.guest.image import Image, Module
from undervisor.hypervisor import models
from undervisor.hypervisor.control import Decision, L2Exception, OnException, WatchedMachine
from undervisor.hypervisor.inspect import NotThere, World
from undervisor.hypervisor.recorder import Recorder
from undervisor.hypervisor.trace import Transition
from undervisor.hypervisor.verdict import Ending, Outcome
from undervisor.targets import DEFAULT_MEMORY, Job
from undervisor.targets.builtin import build

__all__ = [
    "Decision",
    "Event",
    "L2Exception",
    "NotThere",
    "Outcome",
    "Transition",
    "Vm",
    "What",
    "World",
]

LIMIT: Final = 60.0
"""Seconds of host time that `run_until` waits unless it is told otherwise."""


class What(Enum):
    """What ended a run."""

    TRANSITION = "a transition that was asked for"
    SERIAL = "serial output that was asked for"
    END = "the run is over"


@dataclass(frozen=True, slots=True)
class Event:
    """Why `run_until` came back; `transition` and `outcome` are set where there is one.

    After a transition it has been carried out: level `transition.to` is the one that runs.
    """

    what: What
    transition: Transition | None = None
    outcome: Outcome | None = None


Predicate = Callable[[Transition], bool]


class Vm:
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
        data, name = _content(image)
        job = Job(_parse(data, name, raw), cpus, memory, append, tuple(modules))
        self.serial = bytearray()
        """Everything that the guest has sent."""
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

    def run(self, timeout: float | None = None) -> Outcome:
        """Run to the end, or for `timeout` seconds of host time."""
        self._predicate, self._text, self._hit = None, None, None
        return self.machine.run(timeout)

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
    ) -> Event:
        """Run to a transition of which everything that is given holds, or to some serial output.

        `level` left, `to` goes on; `reason` is a part of the reason, in any case; `when` is asked
        last.  `serial` may be a text that has come since the last call, and counts on its own.
        """
        self._predicate = _predicate(when, level, to, vcpu, reason, alone=serial is None)
        self._text = serial.encode() if isinstance(serial, str) else serial
        self._hit = None
        outcome = self.machine.run(timeout)
        self._predicate, self._text = None, None
        if outcome.ending is Ending.STOPPED and self._hit is not None:
            return self._hit
        return Event(What.END, outcome=outcome)

    def send(self, data: bytes) -> None:
        """Input for the guest's serial port."""
        self.machine.platform.feed_serial(data)

    def _transition(self, transition: Transition) -> None:
        if transition.level == 2 and transition.to == 1:
            self._keep(transition.vcpu)
        if self._predicate is not None and self._predicate(transition):
            self._stop(Event(What.TRANSITION, transition=transition))

    def _keep(self, vcpu: int) -> None:
        """L2's general registers at its exit: L1 will use them for itself."""
        q = self.machine.vcpus[vcpu].state.q
        self._kept[vcpu] = {number: q[number] for number in range(16)}

    def _received(self, data: bytes) -> None:
        self.serial += data
        if self._text is None:
            return
        at = self.serial.find(self._text, self._seen_from)
        if at >= 0:
            self._seen_from = at + len(self._text)
            self._stop(Event(What.SERIAL))

    def _stop(self, event: Event) -> None:
        if self._hit is None:
            self._hit = event
            self.machine.request_stop()

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
    try:
        return Path(image).read_bytes(), str(image)
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
        return (
            level in (None, transition.level)
            and to in (None, transition.to)
            and vcpu in (None, transition.vcpu)
            and (part is None or part in transition.reason.lower())
            and (when is None or when(transition))
        )

    return holds
