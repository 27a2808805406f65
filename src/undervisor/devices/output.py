"""Bytes on their way to the host, gathered so that one byte costs an append."""

from __future__ import annotations

from collections.abc import Callable

FLUSH_AT = 4096
NEWLINE = 0x0A


class Output:
    """A buffer before `sink`, flushed at a newline, when full, and when asked."""

    __slots__ = ("_buffer", "_sink")

    def __init__(self, sink: Callable[[bytes], None]) -> None:
        self._sink = sink
        self._buffer = bytearray()

    def put(self, byte: int) -> None:
        """Take one byte."""
        self._buffer.append(byte)
        if byte == NEWLINE or len(self._buffer) >= FLUSH_AT:
            self.flush()

    def put_all(self, data: bytes) -> None:
        """Take many bytes."""
        self._buffer += data
        if NEWLINE in data or len(self._buffer) >= FLUSH_AT:
            self.flush()

    def flush(self) -> None:
        """Hand over what is buffered; nothing happens when nothing is."""
        if self._buffer:
            data = bytes(self._buffer)
            self._buffer.clear()
            self._sink(data)
