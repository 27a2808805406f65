"""The probe's frames: what goes over the serial line, both ways.

A frame is a header of four 32-bit words (sync; sequence and kind; payload's size; a check of the
two), the payload and its Adler-32.  Whatever else is on the line is skipped.  A request that
arrives damaged is answered with NAK and sent again; a request that is repeated is not executed
again, its answer is repeated.

A request is filled up with zeros to a multiple of what a 16550A tells to be there at once: so much
costs the probe two accesses of ports, as does a single byte.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum

SYNC = 0x7E56AB31
HEADER = struct.Struct("<4I")
BURST = 14
"""The highest trigger level of a 16550A's receiver."""
MOST_REQUEST = 0x7FE0
"""Bytes of a payload: with its check and what fills it up it stays below 32 KiB."""
MOST_RESPONSE = 0x10000
_SYNC_BYTES = SYNC.to_bytes(4, "little")


class Kind(IntEnum):
    """What a frame is."""

    REQUEST = 1
    RESPONSE = 2
    HELLO = 3
    NAK = 4
    PANIC = 5


class Status(IntEnum):
    """How an operation ended."""

    OK = 0
    FAULT = 1
    UNKNOWN = 2
    NO_ROOM = 3
    TIMEOUT = 4
    NO_PROCESSOR = 5


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame whose checks were right."""

    kind: int
    sequence: int
    payload: bytes

    def encode(self) -> bytes:
        """The frame's bytes."""
        word, size = self.sequence | self.kind << 16, len(self.payload)
        header = HEADER.pack(SYNC, word, size, _check(word, size))
        return header + self.payload + struct.pack("<I", zlib.adler32(self.payload))


def request_bytes(sequence: int, payload: bytes) -> bytes:
    """The bytes of a request as the probe takes them."""
    data = Frame(Kind.REQUEST, sequence, payload).encode()
    return data.ljust(max(2, -(-len(data) // BURST)) * BURST, b"\0")


def _check(word: int, size: int) -> int:
    turned = (size << 7 | size >> 25) & 0xFFFFFFFF
    return (word ^ turned) ^ 0xFFFFFFFF


class Decoder:
    """Finds frames in a stream of bytes; keeps count and the last of what is none."""

    NOISE_KEPT = 4096

    def __init__(self) -> None:
        self._data = bytearray()
        self.noise = bytearray()
        self.noise_size = 0

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that are complete with `data`."""
        self._data += data
        frames = []
        while (frame := self._next()) is not None:
            frames.append(frame)
        return frames

    def heard(self) -> bytes:
        """The last bytes that belong to no frame, and what may be the beginning of one."""
        return bytes(self.noise + self._data[: self.NOISE_KEPT])

    def _next(self) -> Frame | None:
        while True:
            at = self._data.find(_SYNC_BYTES)
            if at < 0:
                # The last three bytes may be the beginning of a sync.
                self._skip(max(0, len(self._data) - 3))
                return None
            self._skip(at)
            if len(self._data) < HEADER.size:
                return None
            _, word, size, check = HEADER.unpack_from(self._data)
            if check != _check(word, size) or size > MOST_RESPONSE:
                self._skip(1)
                continue
            end = HEADER.size + size + 4
            if len(self._data) < end:
                return None
            payload = bytes(self._data[HEADER.size : end - 4])
            if zlib.adler32(payload) != int.from_bytes(self._data[end - 4 : end], "little"):
                self._skip(1)
                continue
            del self._data[:end]
            return Frame(word >> 16, word & 0xFFFF, payload)

    def _skip(self, size: int) -> None:
        if size:
            self.noise += self._data[:size]
            self.noise_size += size
            del self.noise[: -self.NOISE_KEPT]
            del self._data[:size]
