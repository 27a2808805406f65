"""A line to an agent: frames over a stream, and the first question, what the KVM there can do."""

from __future__ import annotations

import json
import threading
import time
from typing import Final, Protocol

from undervisor.errors import BadInput
from undervisor.guest.probe.protocol import Decoder, Frame
from undervisor.targets.kvm.device import Facts
from undervisor.targets.kvm.words import VERSION, Word, answered, say

OPEN_TIME: Final = 30.0
"""Seconds in which the agent must say what its KVM can do; it may be starting itself."""
LOOK_TIME: Final = 0.5
"""Seconds of one wait; what another thread has seen meanwhile is looked at after it."""


class Stream(Protocol):
    """A line to an agent."""

    def send(self, data: bytes) -> None:
        """All of `data`; EOFError where the other end is gone."""

    def receive(self, timeout: float) -> bytes:
        """Some bytes, or none after `timeout` seconds; EOFError where the other end is gone."""


class Link:
    """Frames over a stream."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._decoder = Decoder()
        self.alive = True
        self._sending, self._taking = threading.Lock(), threading.Lock()

    def send(self, data: bytes) -> None:
        """Whole frames; EOFError where the agent is gone."""
        try:
            with self._sending:
                self._stream.send(data)
        except (EOFError, OSError) as error:
            raise self._gone(error) from None

    def take(self, timeout: float) -> list[Frame]:
        """The frames that are complete after one short wait; EOFError as above.

        None of them while another thread looks: who stops a machine need not be who talks to it.
        """
        wait = max(0.0, min(timeout, LOOK_TIME))
        if not self._taking.acquire(timeout=wait):
            return []
        try:
            return self._decoder.feed(self._stream.receive(wait))
        except (EOFError, OSError) as error:
            raise self._gone(error) from None
        finally:
            self._taking.release()

    def _gone(self, error: Exception) -> EOFError:
        self.alive = False
        return EOFError(str(error) or "its line is closed")

    def open(self) -> Facts:
        """What the KVM there can do; BadInput where there is none, or no agent of ours."""
        try:
            self.send(say(Word.OPEN, 0))
            payload = self._await_facts()
        except EOFError as error:
            raise BadInput(f"the agent is gone: {error}") from None
        data = json.loads(answered(payload))
        if data["version"] != VERSION:
            raise BadInput(
                f"the agent speaks version {data['version']}, not {VERSION}",
                hint="it is another build's: make its file again",
            )
        return Facts.of_json(data["facts"])

    def _await_facts(self) -> bytes:
        deadline = time.monotonic() + OPEN_TIME
        while (left := deadline - time.monotonic()) > 0:
            for frame in self.take(left):
                if frame.kind == Word.FACTS:
                    return frame.payload
        heard = self._decoder.heard()[-200:].decode("ascii", "replace").split()
        last = f"; last heard: {' '.join(heard)}" if heard else ""
        raise BadInput(f"no agent answers within {OPEN_TIME:g} s{last}")
