"""A child's life: a machine is described, runs, takes input, is asked, ends.

It ends with its machine, or when the agent does: nothing outlives its line.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import time
import traceback
from collections.abc import Callable
from typing import Final

from undervisor.errors import BadInput, TimedOut, UndervisorError
from undervisor.guest.probe.protocol import Decoder, Frame
from undervisor.targets import End, How
from undervisor.targets.kvm.device import Calls
from undervisor.targets.kvm.machine import Machine
from undervisor.targets.kvm.vcpu import KICK, Vcpu
from undervisor.targets.kvm.words import (
    Described,
    Question,
    Word,
    answer,
    asked,
    end_words,
    piece,
    refusal,
    say,
    say_data,
)

TICK: Final = 0.05
"""Seconds between two looks at output that the guest does not ask to be handed over."""
QUIET: Final = 1.0
"""Seconds without an exit after which the processors are asked whether they wait for ever."""
_READ: Final = 1 << 16


class Session:
    """One job, from its START frame on."""

    def __init__(self, line: socket.socket, calls: Calls) -> None:
        self._line, self._calls, self._decoder = line, calls, Decoder()
        self._job = 0
        self._described: Described | None = None
        self._pieces: list[tuple[int, bytes]] = []
        self._machine: Machine | None = None
        self._woken, self._wake = os.pipe()
        self._exits, self._changed, self._patience = 0, time.monotonic(), QUIET
        self._takes: dict[int, Callable[[Frame], None]] = {
            Word.START: self._start,
            Word.PIECE: lambda frame: self._pieces.append(piece(frame.payload)),
            Word.RUN: self._run,
            Word.DATA: self._feed,
            Word.ASK: self._ask,
            Word.STOP: self._stop,
        }

    def live(self) -> None:
        """Until the machine has ended or the line is closed."""
        try:
            while self._step():
                pass
        except UndervisorError as error:
            self._say(Word.ENDED, end_words(End(How.TARGET_DIED, error.message, report=error.hint)))
        except OSError as error:
            text = f"KVM refuses the machine: {error.strerror}"
            self._say(Word.ENDED, end_words(End(How.TARGET_DIED, text)))
        except Exception:  # our own mistake, told where the caller sees it
            text, report = "the machine's process failed", traceback.format_exc()
            self._say(Word.ENDED, end_words(End(How.TARGET_DIED, text, report=report)))

    def _step(self) -> bool:
        interval = self._described.interrupt_every if self._described else 0.0
        pause = min(TICK, interval or TICK) if self._machine else None
        ready, _, _ = select.select([self._line.fileno(), self._woken], [], [], pause)
        if self._line.fileno() in ready:
            data = self._line.recv(_READ)
            if not data:
                return False
            for frame in self._decoder.feed(data):
                self._takes[frame.kind](frame)
        return self._machine is None or self._tend(self._machine, bool(interval))

    def _tend(self, machine: Machine, interrupting: bool) -> bool:
        machine.board.tend()
        if machine.end is not None:
            self._say(Word.ENDED, end_words(machine.end))
            return False
        if interrupting:
            machine.interrupt()
        elif machine.exits != self._exits:
            self._exits, self._changed, self._patience = machine.exits, time.monotonic(), QUIET
        elif time.monotonic() - self._changed > self._patience:
            machine.look_for_life()
            self._exits, self._changed = machine.exits, time.monotonic()
            self._patience *= 2
        return True

    # -- frames --------------------------------------------------------------------------------

    def _start(self, frame: Frame) -> None:
        self._job = frame.sequence
        self._described = Described.decode(frame.payload)

    def _run(self, frame: Frame) -> None:
        assert self._described is not None
        self._machine = Machine(
            self._calls, self._described, self._pieces, self._output, self._ended
        )
        self._pieces = []
        self._machine.start()

    def _feed(self, frame: Frame) -> None:
        if self._machine:
            self._machine.board.feed(frame.payload)

    def _stop(self, frame: Frame) -> None:
        end = End(How.STOPPED, "stopped by the caller")
        if self._machine:
            self._machine.finish(end)
        else:
            self._say(Word.ENDED, end_words(end))

    def _ask(self, frame: Frame) -> None:
        try:
            if self._machine is None:
                raise BadInput("the machine does not run yet")
            question, cpu, data = asked(frame.payload)
            words = answer(self._machine.ask(cpu, lambda vcpu: _QUESTIONS[question](vcpu, data)))
        except BadInput as error:
            words = refusal(error)
        except TimedOut as error:
            words = refusal(BadInput(error.message, hint=error.hint))
        self._say(Word.ANSWER, words)

    # -- what goes out -------------------------------------------------------------------------

    def _output(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            for frame in say_data(self._job, data):
                self._line.sendall(frame)

    def _ended(self) -> None:
        os.write(self._wake, b"\0")

    def _say(self, word: Word, payload: bytes) -> None:
        frame = say(word, self._job, payload)
        with contextlib.suppress(OSError):
            if self._machine is None:
                self._line.sendall(frame)
                return
            with self._machine.board.lock:  # never in the middle of the guest's output
                self._line.sendall(frame)


def _registers(vcpu: Vcpu, data: bytes) -> bytes:
    return json.dumps({"l2": vcpu.in_l2, "registers": vcpu.general()}).encode()


def _set_registers(vcpu: Vcpu, data: bytes) -> bytes:
    vcpu.set_general(json.loads(data))
    return b""


def _set_nested_state(vcpu: Vcpu, data: bytes) -> bytes:
    vcpu.set_nested_state(data)
    return b""


_QUESTIONS: Final[dict[Question, Callable[[Vcpu, bytes], bytes]]] = {
    Question.NESTED_STATE: lambda vcpu, data: vcpu.nested_state(),
    Question.SET_NESTED_STATE: _set_nested_state,
    Question.REGISTERS: _registers,
    Question.SET_REGISTERS: _set_registers,
}


def serve(line: socket.socket, calls: Calls) -> None:
    """The whole life of the process that a machine runs in."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller decides
    signal.signal(KICK, lambda number, frame: None)  # it only has to interrupt KVM_RUN
    Session(line, calls).live()
