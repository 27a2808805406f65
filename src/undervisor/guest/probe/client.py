"""The probe from Python's side: a stream to it, batches, and clear words when it is silent.

with-less example:
    probe = Probe(stream)
    probe.wait_for_hello()
    batch = Batch()
    value = batch.rdmsr(0xC0000080)
    probe.run(batch)
    print(value.outcome)
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from undervisor.errors import GuestDied, TimedOut
from undervisor.guest.multiboot import BOOT_MAGIC
from undervisor.guest.probe.batch import NOT_FINISHED, BatchCore, Request, resolve
from undervisor.guest.probe.l1 import Runner
from undervisor.guest.probe.program import program
from undervisor.guest.probe.protocol import (
    MOST_REQUEST,
    MOST_RESPONSE,
    Decoder,
    Frame,
    Kind,
    request_bytes,
)
from undervisor.guest.probe.svm import SvmOps
from undervisor.guest.probe.vmx import VmxOps

ANSWER_TIME = 60.0
"""Seconds for the answer to one request."""
TRIES = 4
"""How often a request is sent that arrives damaged."""
MOST_NOISE = 1 << 20
"""Bytes that are no frame, after which the line is called rubbish."""
PIECE = 0x4000
POLLS = 100_000
"""How long the first processor looks at another's mailbox before it says that it is not done."""
INNER = 0x100
"""What a batch inside another one has less of."""


class Stream(Protocol):
    """A serial line to a machine."""

    def send(self, data: bytes) -> None:
        """All of `data` to the machine; EOFError where it is gone."""

    def receive(self, timeout: float) -> bytes:
        """Some bytes, or none after `timeout` seconds; EOFError where the machine is gone."""


class ProbeDied(GuestDied):
    """The machine ended, the probe faulted outside a request, or speaks rubbish."""


class ProbeSilent(TimedOut):
    """No answer in time."""


class Batch(SvmOps, VmxOps):
    """Operations for one request: see `batch`, `svm` and `vmx`."""


class Probe:
    """A running probe behind a stream."""

    def __init__(self, stream: Stream, answer_time: float = ANSWER_TIME) -> None:
        self.stream = stream
        self.answer_time = answer_time
        self.booted_by_multiboot = False
        self._decoder = Decoder()
        self._frames: list[Frame] = []
        self._sequence = 0

    def wait_for_hello(self, timeout: float | None = None) -> None:
        """Until the probe has started; ProbeDied where it is another build than ours."""
        frame = self._await(Kind.HELLO, self.answer_time if timeout is None else timeout)
        build, magic = struct.unpack("<2I", frame.payload)
        self.booted_by_multiboot = magic == BOOT_MAGIC
        if build != program().build:
            raise ProbeDied(
                f"the probe that answers is build {build:#x}, not {program().build:#x}",
                hint="it was made by another version; start the image of this one",
            )

    def run(self, batch: BatchCore, timeout: float | None = None) -> None:
        """Run a batch and fill in its answers; more than one request only where it is large."""
        limit = self.answer_time if timeout is None else timeout
        for requests in _portions(batch.requests):
            answer = self._ask(b"".join(request.data for request in requests), limit)
            resolve(requests, answer)

    def load(self, gpa: int, data: bytes) -> None:
        """Any number of bytes to `gpa`."""
        batch = Batch()
        answers = [
            batch.write(gpa + at, data[at : at + PIECE]) for at in range(0, len(data), PIECE)
        ]
        self.run(batch)
        for answer in answers:
            _ = answer.value

    def start_aps(self, apic_ids: Iterable[int]) -> int:
        """Start these processors, one after the other; how many run then, this one included."""
        batch = Batch()
        counts = [batch.start_ap(apic_id) for apic_id in apic_ids]
        self.run(batch)
        return max((count.value for count in counts), default=1)

    def together(self, batches: Mapping[int, BatchCore], timeout: float | None = None) -> None:
        """Run batches at the same time, each on the processor with its number; 0 is ours.

        ProbeSilent where one has not finished in time, ProbeDied where one cannot run its batch.
        Each batch must fit in one request.
        """
        limit = self.answer_time if timeout is None else timeout
        deadline = time.monotonic() + limit
        others = {number: batch for number, batch in batches.items() if number}
        first = Batch()
        posts = [first.post(number, batch) for number, batch in others.items()]
        self.run(first, limit)
        for post in posts:
            _ = post.value
        if 0 in batches:
            self.run(batches[0], limit)
        while others:
            self._collect(others, deadline - time.monotonic(), limit)

    def _collect(self, others: dict[int, BatchCore], left: float, limit: float) -> None:
        """Take from `others` the processors that have finished."""
        if left <= 0:
            names = ", ".join(str(number) for number in others)
            raise ProbeSilent(f"processor {names} has not finished its batch in {limit:g} s")
        round_ = Batch()
        answers = {n: round_.collect(n, batch, POLLS) for n, batch in others.items()}
        self.run(round_)
        for number, answer in answers.items():
            outcome = answer.outcome
            if outcome is None:
                del others[number]
            elif outcome != NOT_FINISHED:
                raise ProbeDied(f"processor {number}: {outcome}")

    def on(self, processor: int) -> Runner:
        """A started processor as something that runs batches, like the probe itself."""
        return _OnProcessor(self, processor) if processor else self

    def _ask(self, payload: bytes, timeout: float) -> bytes:
        self._sequence = (self._sequence + 1) % (1 << 16)
        data = request_bytes(self._sequence, payload)
        for _ in range(TRIES):
            self._send(data)
            frame = self._await(Kind.RESPONSE, timeout)
            if frame.kind == Kind.RESPONSE:
                return frame.payload
        raise ProbeDied(f"{TRIES} requests in a row reached the probe damaged")

    def _send(self, data: bytes) -> None:
        try:
            self.stream.send(data)
        except (EOFError, OSError) as end:
            raise ProbeDied(f"the machine is gone: {end or 'its serial line is closed'}") from None

    def _await(self, kind: Kind, timeout: float) -> Frame:
        """The next frame of `kind`, or a NAK where an answer is awaited."""
        deadline = time.monotonic() + timeout
        while True:
            while self._frames:
                frame = self._frames.pop(0)
                if frame.kind == Kind.PANIC:
                    raise ProbeDied(_panic(frame.payload))
                if frame.kind == kind == Kind.RESPONSE and frame.sequence != self._sequence:
                    continue
                if frame.kind == kind or (frame.kind, kind) == (Kind.NAK, Kind.RESPONSE):
                    return frame
                if frame.kind == Kind.HELLO:
                    raise ProbeDied("the machine started again")
            self._receive(deadline, timeout)

    def _receive(self, deadline: float, timeout: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise ProbeSilent(f"the probe gave no answer in {timeout:g} s{self._heard()}")
        try:
            data = self.stream.receive(left)
        except (EOFError, OSError):
            raise ProbeDied(f"the machine ended without an answer{self._heard()}") from None
        self._frames += self._decoder.feed(data)
        if self._decoder.noise_size > MOST_NOISE:
            raise ProbeDied(f"the machine speaks rubbish{self._heard()}")

    def _heard(self) -> str:
        """What else was on the line: a BIOS or a dying machine often says why."""
        words = self._decoder.heard()[-200:].decode("ascii", errors="replace").split()
        return f"; last heard: {' '.join(words)}" if words else ""


@dataclass(frozen=True, slots=True)
class _OnProcessor:
    probe: Probe
    number: int

    def run(self, batch: BatchCore, timeout: float | None = None) -> None:
        """Run `batch` on this processor; the first one waits."""
        for requests in _portions(batch.requests, INNER):
            portion = BatchCore()
            portion.requests = requests
            self.probe.together({self.number: portion}, timeout)


def _portions(requests: list[Request], less: int = 0) -> Iterator[list[Request]]:
    """As many requests at a time as fit in a frame, and their answers in another."""
    most_request, most_response = MOST_REQUEST - less, MOST_RESPONSE - 256 - less
    portion: list[Request] = []
    size = most = 0
    for request in requests:
        if portion and (
            size + len(request.data) > most_request or most + request.most > most_response
        ):
            yield portion
            portion, size, most = [], 0, 0
        portion.append(request)
        size, most = size + len(request.data), most + request.most
    if portion:
        yield portion


def _panic(payload: bytes) -> str:
    vector, error, rip, _, rsp, cr2 = struct.unpack("<6Q", payload)
    return (
        f"the probe itself faulted: exception {vector}, error code {error:#x}, RIP {rip:#x}, "
        f"RSP {rsp:#x}, CR2 {cr2:#x}"
    )
