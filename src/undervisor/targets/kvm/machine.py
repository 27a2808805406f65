"""A machine that runs: a thread for each processor, what their exits mean, how it ends."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from typing import Final, TypeVar

from undervisor.arch.kvm import (
    EXIT_AT,
    EXIT_FAIL_ENTRY,
    EXIT_INTERNAL_ERROR,
    SUBERRORS,
    Exit,
)
from undervisor.devices.ends import EndOfRun
from undervisor.errors import BadInput, TimedOut
from undervisor.targets import End, How
from undervisor.targets.kvm.board import Board
from undervisor.targets.kvm.device import Calls
from undervisor.targets.kvm.vcpu import Vcpu
from undervisor.targets.kvm.vm import Vm
from undervisor.targets.kvm.words import Described

T = TypeVar("T")

ANSWER_TIME: Final = 10.0
"""Seconds in which a processor must come back after a kick."""


class Machine:
    """One machine; `send` takes its serial output, `on_end` is told once that it has ended."""

    def __init__(
        self,
        calls: Calls,
        described: Described,
        pieces: list[tuple[int, bytes]],
        send: Callable[[bytes], None],
        on_end: Callable[[], None],
    ) -> None:
        self.vm = Vm(calls, described.cpus, described.memory)
        for gpa, data in pieces:
            self.vm.write(gpa, data)
        for vcpu in self.vm.vcpus:
            first = vcpu.index == 0
            vcpu.set_up(self.vm.cpuid(vcpu.index), described.boot if first else None)
        self.board = Board(self.vm, send, self._guest_ends)
        self.end: End | None = None
        self._on_end = on_end
        self._tasks: dict[int, list[Callable[[], None]]] = {v.index: [] for v in self.vm.vcpus}
        self._threads = [
            threading.Thread(target=self._live, args=(vcpu,), daemon=True) for vcpu in self.vm.vcpus
        ]

    def start(self) -> None:
        """Let the processors run."""
        for thread in self._threads:
            thread.start()

    def finish(self, end: End) -> None:
        """The run has ended; the first word about that counts."""
        with self.board.lock:
            if self.end is not None:
                return
            self.end = End(end.how, end.text, end.status, _lines(end.report, self._about_l2()))
        self._on_end()

    @property
    def exits(self) -> int:
        """How often a processor came back, so far."""
        return sum(vcpu.exits for vcpu in self.vm.vcpus)

    def interrupt(self) -> None:
        """Interrupt each processor, whatever it does."""
        for vcpu in self.vm.vcpus:
            vcpu.poke()

    def ask(self, cpu: int, question: Callable[[Vcpu], T]) -> T:
        """What `question` gives on the thread of processor `cpu`, between two runs.

        BadInput where there is no such processor or the question refuses, TimedOut where the
        processor does not come back.
        """
        if not 0 <= cpu < len(self.vm.vcpus):
            raise BadInput(f"there is no vCPU {cpu}", hint=f"there are {len(self.vm.vcpus)}")
        vcpu, done = self.vm.vcpus[cpu], threading.Event()
        answers: list[T] = []
        refusals: list[BadInput] = []

        def task() -> None:
            try:
                answers.append(question(vcpu))
            except BadInput as refusal:
                refusals.append(refusal)
            finally:
                done.set()

        self._tasks[cpu].append(task)
        vcpu.kick()
        if not done.wait(ANSWER_TIME):
            raise TimedOut(f"vCPU {cpu} does not come back from KVM in {ANSWER_TIME:g} s")
        if refusals:
            raise refusals[0]
        return answers[0]

    def look_for_life(self) -> None:
        """End the run where every processor waits for what only another one could do."""
        if all(self.ask(vcpu.index, lambda one: one.waits_for_ever) for vcpu in self.vm.vcpus):
            self.finish(End(How.IDLE, How.IDLE.value))

    # -- a processor's thread ------------------------------------------------------------------

    def _live(self, vcpu: Vcpu) -> None:
        vcpu.runs_here()
        try:
            while self.end is None:
                reason = vcpu.run()
                while self._tasks[vcpu.index]:
                    self._tasks[vcpu.index].pop(0)()
                if reason is not None:
                    self._on_exit(vcpu, reason)
        except OSError as error:
            text = f"vCPU {vcpu.index}: KVM_RUN failed: {error.strerror}"
            self.finish(End(How.TARGET_DIED, text))
        except Exception:  # our own mistake: it must not look like a guest that hangs
            text = f"the thread of vCPU {vcpu.index} died"
            self.finish(End(How.TARGET_DIED, text, report=traceback.format_exc()))

    def _on_exit(self, vcpu: Vcpu, reason: int) -> None:
        with self.board.lock:
            self.board.drain()
            if reason == Exit.IO:
                self.board.io(vcpu)
            elif reason == Exit.MMIO:
                self.board.mmio(vcpu)
            else:
                how, text, first = _ENDINGS.get(reason, _unknown)(vcpu, reason)
                self.finish(End(how, text, report=_lines(first, vcpu.in_words())))

    def _guest_ends(self, end: EndOfRun) -> None:
        self.finish(End(How.FINISHED, end.reason.value, end.status))

    def _about_l2(self) -> str:
        in_l2 = sum(vcpu.exits_in_l2 for vcpu in self.vm.vcpus)
        if not in_l2:
            return ""
        return f"{in_l2} of {self.exits} exits carried L2's state, and no register was written"


def _lines(*texts: str) -> str:
    return "\n".join(text for text in texts if text)


# -- how a run ends by an exit: the kind, a sentence, a line that `undervisor explain` reads ----

_Ending = tuple[How, str, str]


def _shutdown(vcpu: Vcpu, reason: int) -> _Ending:
    return How.GUEST_DIED, f"triple fault on vCPU {vcpu.index}", ""


def _halted(vcpu: Vcpu, reason: int) -> _Ending:
    return How.IDLE, How.IDLE.value, ""


def _fail_entry(vcpu: Vcpu, reason: int) -> _Ending:
    hardware, _ = EXIT_FAIL_ENTRY.unpack_from(vcpu.page, EXIT_AT)
    text = f"KVM could not enter the guest on vCPU {vcpu.index}: the hardware says {hardware:#x}"
    return How.TARGET_DIED, text, f"KVM: entry failed, hardware error {hardware:#x}"


def _internal_error(vcpu: Vcpu, reason: int) -> _Ending:
    number, count, *words = EXIT_INTERNAL_ERROR.unpack_from(vcpu.page, EXIT_AT)
    known = SUBERRORS.get(number)
    meaning = f": {known.name}, {known.meaning}" if known else ""
    extra = [f"extra data[{at}]: 0x{word:016x}" for at, word in enumerate(words[:count])]
    first = _lines(f"KVM internal error. Suberror: {number}", *extra)
    return How.TARGET_DIED, f"KVM internal error, suberror {number}{meaning}", first


def _unknown(vcpu: Vcpu, reason: int) -> _Ending:
    return How.TARGET_DIED, f"KVM came back with exit reason {reason}, which is not expected", ""


_ENDINGS: Final[dict[int, Callable[[Vcpu, int], _Ending]]] = {
    Exit.SHUTDOWN: _shutdown,
    Exit.HLT: _halted,
    Exit.FAIL_ENTRY: _fail_entry,
    Exit.INTERNAL_ERROR: _internal_error,
}
