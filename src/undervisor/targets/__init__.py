"""Where an image runs: one protocol, a module per target.

    with target.start(job) as running:
        running.send(b"...")
        data = running.receive(timeout=1.0)
        end = running.wait(timeout=10.0)

A target starts an image, gives a byte stream, and says how the run ended, "the target itself died"
included.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from undervisor.arch.x86.boot import MemoryMap

if TYPE_CHECKING:  # the agent of the `kvm` target needs the words below and no loader
    from undervisor.guest.image import Image, Module, Placement

DEFAULT_MEMORY = 256 << 20


@dataclass(frozen=True, slots=True)
class Job:
    """What to start: an image, its command line and modules, and the machine's size.

    `prompt`: the image is known to say something and to wait for an answer soon; a target may
    start its machines there.  `prelude`: what such an image has been sent when its machine starts,
    all its answers to that waiting on the line; only where the target's machines are copies.
    """

    image: Image
    cpus: int = 1
    memory: int = DEFAULT_MEMORY
    append: str = ""
    modules: tuple[Module, ...] = ()
    prompt: bool = False
    prelude: bytes = b""

    def place(self, rsdp: int = 0) -> Placement:
        """Where everything goes; BadInput where it does not fit. `rsdp`: the ACPI root pointer."""
        return self.image.place(MemoryMap.pc(self.memory), self.append, self.modules, rsdp)


class How(Enum):
    """How a run ended."""

    FINISHED = "the guest ended it"
    GUEST_DIED = "the guest died"
    IDLE = "every processor waits for an event that cannot come"
    TIMED_OUT = "the time limit has passed"
    STOPPED = "it was stopped"
    TARGET_DIED = "the target died"


@dataclass(frozen=True, slots=True)
class End:
    """The end of a run: `text` says it to a person, `status` is the guest's own exit status.

    `report` has what is known beyond a sentence: registers, the target's last words.
    """

    how: How
    text: str
    status: int = 0
    report: str = ""


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a target can do; a test that needs more is skipped and says why.

    `at_once`: machines that may run at the same time.  `patience`: how many times longer than the
    built-in L0 it may take.  `copies`: its machines are copies of one that has come as far as the
    job says, so that a prelude costs nothing.
    """

    vendors: frozenset[str] = frozenset()
    most_cpus: int = 1
    features: frozenset[str] = field(default_factory=frozenset)
    at_once: int = 64
    patience: float = 1.0
    copies: bool = False


class Running(Protocol):
    """A started image."""

    def send(self, data: bytes) -> None:
        """All of `data` to the guest's serial port; EOFError where the run has ended."""

    def receive(self, timeout: float) -> bytes:
        """Some bytes, or none after `timeout` seconds; EOFError where the run has ended."""

    def wait(self, timeout: float | None = None) -> End:
        """How the run ended; TimedOut where it has not after `timeout` seconds."""

    def stop(self) -> None:
        """End it now."""

    def __enter__(self) -> Running: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Target(Protocol):
    """A machine, real or not, that images run on."""

    name: str

    @property
    def abilities(self) -> Abilities:
        """What it can do."""

    def start(self, job: Job) -> Running:
        """Start an image; BadInput where it does not fit this target."""
