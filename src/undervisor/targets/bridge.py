"""A KVM at the other end of a byte stream: machines run there, tests run here.

    target = BridgeTarget(stream)      # send(data) and receive(timeout), as the probe's streams
    with target.start(job) as running:
        probe = Probe(running)

At the other end runs the agent, `undervisor.targets.kvm.agent`: in a child of ours (`kvm.target`),
in a Linux L1 whose KVM is to be tested, or on another machine.  One machine runs at a time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Final

from undervisor.arch.x86.cpuid import features_in
from undervisor.errors import BadInput, TimedOut
from undervisor.guest.probe.protocol import Frame
from undervisor.targets import Abilities, End, How, Job
from undervisor.targets.kvm.device import Facts
from undervisor.targets.kvm.link import Link, Stream
from undervisor.targets.kvm.words import (
    Described,
    Question,
    Word,
    answered,
    ask,
    ended,
    say,
    say_data,
    say_pieces,
)
from undervisor.targets.process import cause

ANSWER_TIME: Final = 30.0
STOP_TIME: Final = 10.0


class BridgeRunning:
    """A machine at the other end."""

    def __init__(self, link: Link, number: int) -> None:
        self._link, self._number = link, number
        self._data = bytearray()
        self._answers: list[bytes] = []
        self._end: End | None = None

    # -- the serial line -----------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """All of `data` to the guest's serial port; EOFError where the run has ended."""
        if self._end is not None:
            raise EOFError(self._end.text)
        for frame in say_data(self._number, data):
            self._link.send(frame)

    def receive(self, timeout: float) -> bytes:
        """Some bytes, or none after `timeout` seconds; EOFError where the run has ended."""
        for _ in self._until(timeout):
            if self._data or self._end is not None:
                break
        if self._end is not None and not self._data:
            raise EOFError(self._end.text)
        data = bytes(self._data)
        self._data.clear()
        return data

    def wait(self, timeout: float | None = None) -> End:
        """How the run ended; TimedOut where it has not after `timeout` seconds."""
        for _ in self._until(timeout):
            if self._end is not None:
                return self._end
        raise TimedOut(f"the machine still runs after {timeout} seconds")

    def stop(self) -> None:
        """End it now."""
        if self._end is None:
            try:
                self._link.send(say(Word.STOP, self._number))
                self.wait(STOP_TIME)
            except (EOFError, TimedOut):
                self._link.alive = False
                self._gone("its agent does not answer")

    # -- what only this target can be asked ------------------------------------------------------

    def nested_state(self, cpu: int = 0) -> bytes:
        """KVM_GET_NESTED_STATE of a processor: a blob for `undervisor state`."""
        return self._ask(Question.NESTED_STATE, cpu)

    def set_nested_state(self, blob: bytes, cpu: int = 0) -> None:
        """KVM_SET_NESTED_STATE; BadInput where KVM refuses the blob."""
        self._ask(Question.SET_NESTED_STATE, cpu, blob)

    def registers(self, cpu: int = 0) -> tuple[bool, dict[str, int]]:
        """Whether the state is L2's, and the general-purpose registers, RIP and RFLAGS."""
        data = json.loads(self._ask(Question.REGISTERS, cpu))
        return data["l2"], data["registers"]

    def set_registers(self, changed: Mapping[str, int], cpu: int = 0) -> None:
        """Write L1's registers; BadInput while the processor is in L2."""
        self._ask(Question.SET_REGISTERS, cpu, json.dumps(dict(changed)).encode())

    def _ask(self, question: Question, cpu: int, data: bytes = b"") -> bytes:
        if self._end is not None:
            raise BadInput(f"the machine has ended: {self._end.text}")
        self._link.send(say(Word.ASK, self._number, ask(question, cpu, data)))
        for _ in self._until(ANSWER_TIME):
            if self._answers:
                return answered(self._answers.pop(0))
            if self._end is not None:
                raise BadInput(f"the machine has ended: {self._end.text}")
        raise TimedOut(f"the agent gave no answer in {ANSWER_TIME:g} s")

    # -- frames --------------------------------------------------------------------------------

    def _until(self, timeout: float | None) -> Iterator[None]:
        """Look, and look again after each piece that comes, until `timeout` seconds are over."""
        deadline = None if timeout is None else time.monotonic() + timeout
        yield
        while True:
            left = 1.0 if deadline is None else deadline - time.monotonic()
            try:
                frames = self._link.take(left)
            except EOFError as error:
                self._gone(f"its agent: {error}")
                frames = []
            for frame in frames:
                if frame.sequence == self._number:
                    self._take(frame)
            yield
            if left <= 0 and not frames:
                return

    def _take(self, frame: Frame) -> None:
        if frame.kind == Word.DATA:
            self._data += frame.payload
        elif frame.kind == Word.ANSWER:
            self._answers.append(frame.payload)
        elif frame.kind == Word.ENDED and self._end is None:
            self._end, status = ended(frame.payload)
            if status is not None:
                text = f"the machine's process {cause(status)}"
                self._end = End(How.TARGET_DIED, text)

    def _gone(self, why: str) -> None:
        self._end = self._end or End(How.TARGET_DIED, f"the machine is out of reach: {why}")

    def __enter__(self) -> BridgeRunning:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def check_cpus(job: Job, facts: Facts) -> None:
    """BadInput where a KVM cannot have as many processors."""
    if not 1 <= job.cpus <= facts.most_cpus:
        raise BadInput(f"{job.cpus} processors: this KVM can have 1 to {facts.most_cpus}")


def begin(link: Link, number: int, job: Job, interrupt_every: float = 0.0) -> BridgeRunning:
    """Start `job` as the agent's job `number`; BadInput where it does not fit, or none is there."""
    placement = job.place()
    described = Described(job.cpus, job.memory, placement.boot, interrupt_every)
    frames: list[bytes] = [say(Word.START, number, described.encode())]
    frames += say_pieces(number, placement.pieces)
    try:
        link.send(b"".join([*frames, say(Word.RUN, number)]))
    except EOFError as error:
        raise BadInput(f"the agent is gone: {error}") from None
    return BridgeRunning(link, number)


def abilities(facts: Facts, at_once: int, patience: float = 1.0) -> Abilities:
    """What a target on such a KVM can do."""
    names = {
        feature.name
        for leaf, subleaf, _, *answer in facts.leaves
        for feature in features_in(leaf, subleaf, answer)
    }
    return Abilities(
        frozenset(facts.vendors),
        facts.most_cpus,
        frozenset(names),
        at_once=at_once,
        patience=patience,
    )


class BridgeTarget:
    """The KVM behind a stream.

    `interrupt_every`: seconds after which each processor is interrupted from outside, again and
    again; 0: never.  `patience`: how much slower it is than a machine of its own.
    """

    def __init__(
        self,
        stream: Stream,
        name: str = "bridge",
        interrupt_every: float = 0.0,
        patience: float = 1.0,
    ) -> None:
        self.name = name
        self.interrupt_every = interrupt_every
        self.patience = patience
        self._link = Link(stream)
        self._number = 0
        self._facts: Facts | None = None
        self._running: BridgeRunning | None = None

    @property
    def alive(self) -> bool:
        """Whether the agent's line has not ended, as far as was seen."""
        return self._link.alive

    @property
    def facts(self) -> Facts:
        """What the KVM there says of itself; BadInput where nothing answers."""
        if self._facts is None:
            self._facts = self._link.open()
        return self._facts

    @property
    def abilities(self) -> Abilities:
        """What it can do."""
        return abilities(self.facts, 1, self.patience)

    def start(self, job: Job) -> BridgeRunning:
        """Start an image there; the machine before it is ended where it still runs."""
        check_cpus(job, self.facts)
        if self._running is not None:
            self._running.stop()
        self._number += 1
        self._running = begin(self._link, self._number % (1 << 16), job, self.interrupt_every)
        return self._running
