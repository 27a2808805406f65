"""The agent: the end of a byte stream that runs machines on the KVM beside it.

    python3 agent.pyz /dev/vport0p1     a character device, a terminal line as well
    python3 agent.pyz                   standard input and output

It needs Python and nothing else of the machine it is on (`archive` makes the file).  Each machine
runs in a child, which can be killed at any moment; a child that dies is how its run ended.  With
the stream the agent ends, and with the agent its child.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from typing import Final

from undervisor.errors import BadInput
from undervisor.guest.probe.protocol import Decoder, Frame
from undervisor.targets import End, How
from undervisor.targets.kvm.device import Calls, Kernel, facts
from undervisor.targets.kvm.session import serve
from undervisor.targets.kvm.words import VERSION, Word, answer, end_words, refusal, say

READY: Final = b"agent\n"
"""What a terminal line brings when the agent listens to it."""
GRACE: Final = 2.0
"""Seconds in which a machine that is stopped must say its last words."""
_READ: Final = 1 << 16
_HELD: Final = 1 << 20
"""Bytes for the caller that are kept before the machine has to wait."""


class Peer:
    """One end of a line, never waited for: frames that have come, bytes that are still to go."""

    def __init__(self, reading: int, writing: int) -> None:
        self.reading, self.writing = reading, writing
        self.pending = bytearray()
        self._decoder = Decoder()
        for number in {reading, writing}:
            os.set_blocking(number, False)

    def take(self) -> list[Frame] | None:
        """The frames that are complete now; None where the other side is gone."""
        try:
            data = os.read(self.reading, _READ)
        except BlockingIOError:
            return []
        except OSError:
            return None
        return self._decoder.feed(data) if data else None

    def flush(self) -> None:
        """Write what can be written; what is for nobody is dropped."""
        try:
            del self.pending[: os.write(self.writing, self.pending)]
        except BlockingIOError:
            pass
        except OSError:
            self.pending.clear()


class Agent:
    """The caller on one side, a machine's process on the other."""

    def __init__(self, caller: Peer, calls: Calls) -> None:
        self._caller, self._calls = caller, calls
        self._job = 0
        self._child: tuple[int, socket.socket, Peer] | None = None
        self._deadline: float | None = None

    def run(self) -> None:
        """Until the caller is gone."""
        while self._step():
            pass
        self._end_child()

    def _step(self) -> bool:
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._end_child()
            self._tell(Word.ENDED, end_words(End(How.STOPPED, "killed: it did not stop by itself")))
        child = self._child[2] if self._child else None
        reading = [self._caller.reading]
        writing = [self._caller.writing] if self._caller.pending else []
        if child:
            reading += [child.reading] if len(self._caller.pending) < _HELD else []
            writing += [child.writing] if child.pending else []
        left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        readable, writable, _ = select.select(reading, writing, [], left)
        for peer in (self._caller, child):
            if peer and peer.writing in writable:
                peer.flush()
        if child and child.reading in readable:
            self._from_child(child)
        if self._caller.reading not in readable:
            return True
        frames = self._caller.take()
        for frame in frames or []:
            self._from_caller(frame)
        return frames is not None

    # -- the caller ----------------------------------------------------------------------------

    def _from_caller(self, frame: Frame) -> None:
        if frame.kind == Word.OPEN:
            self._tell(Word.FACTS, self._facts(), frame.sequence)
        elif frame.kind == Word.START:
            self._end_child()
            self._job = frame.sequence
            self._start_child()
            self._hand_down(frame)
        elif frame.sequence == self._job and self._child:
            if frame.kind == Word.STOP:
                self._deadline = time.monotonic() + GRACE
            self._hand_down(frame)

    def _facts(self) -> bytes:
        try:
            said = facts(self._calls).as_json()
        except BadInput as error:
            return refusal(error)
        return answer(json.dumps({"version": VERSION, "facts": said}).encode())

    def _tell(self, word: Word, payload: bytes, job: int | None = None) -> None:
        self._caller.pending += say(word, self._job if job is None else job, payload)

    # -- the child -----------------------------------------------------------------------------

    def _start_child(self) -> None:
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            _be_child(ours, theirs, self._caller, self._calls)
        theirs.close()
        self._child = pid, ours, Peer(ours.fileno(), ours.fileno())

    def _hand_down(self, frame: Frame) -> None:
        assert self._child is not None
        self._child[2].pending += frame.encode()

    def _from_child(self, child: Peer) -> None:
        frames = child.take()
        for frame in frames or []:
            self._caller.pending += frame.encode()
            if frame.kind == Word.ENDED:
                self._end_child()
                return
        if frames is None:
            status = self._end_child()
            words = end_words(End(How.TARGET_DIED, "the machine's process died"), status)
            self._tell(Word.ENDED, words)

    def _end_child(self) -> int:
        """Kill it where it still lives; its status as `Popen` has it."""
        if self._child is None:
            return 0
        pid, line, _ = self._child
        self._child = self._deadline = None
        line.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _be_child(ours: socket.socket, theirs: socket.socket, caller: Peer, calls: Calls) -> None:
    """The rest of the child's life; it does not return."""
    try:
        ours.close()
        os.close(caller.reading)
        if caller.writing != caller.reading:
            os.close(caller.writing)
        serve(theirs, calls)
    finally:
        os._exit(0)  # nothing here needs tidying that the system does not tidy


def streams(path: str) -> Peer:
    """The caller's side: a device, or standard input and output."""
    if not path:
        return Peer(sys.stdin.fileno(), sys.stdout.fileno())
    number = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    if os.isatty(number):
        import tty

        tty.setraw(number)
        os.write(number, READY)  # what came before the line was raw is lost
    return Peer(number, number)


def main(arguments: list[str], calls: Calls | None = None) -> None:
    """`arguments`: the device to speak on, or none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Agent(streams(arguments[0] if arguments else ""), calls or Kernel()).run()


if __name__ == "__main__":
    main(sys.argv[1:])
