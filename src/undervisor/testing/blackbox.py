"""What a machine leaves behind when its process dies: its last transitions and all it printed.

The child writes, the parent reads, through files of one folder.  Every record is with the system
before the guest goes on, so that a crash of the processor library takes nothing with it but the
serial output that the machine had not yet passed on.
"""

from __future__ import annotations

import os
import pickle
import struct
from collections import deque
from pathlib import Path
from typing import Any, Final

from undervisor.hypervisor.trace import Transition
from undervisor.testing.history import FAILURES_KEPT, KEPT

TRANSITIONS, FAILURES, SERIAL = "transitions", "failures", "serial"
_SIZE: Final = struct.Struct("<I")
_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_APPEND


class Records:
    """The writing side of the last `kept` records of one kind, in two files that take turns."""

    def __init__(self, path: Path, kept: int) -> None:
        self._path = path
        self._old = path.with_suffix(".old")
        self._half = max(1, kept)
        self._written = 0
        self._file = os.open(path, _FLAGS)

    def add(self, record: Any) -> None:
        """One more; the oldest ones go."""
        if self._written == self._half:
            os.close(self._file)
            self._path.replace(self._old)
            self._file, self._written = os.open(self._path, _FLAGS), 0
        data = pickle.dumps(record, pickle.HIGHEST_PROTOCOL)
        os.write(self._file, _SIZE.pack(len(data)) + data)
        self._written += 1


class Writer:
    """The child's side."""

    def __init__(self, folder: Path) -> None:
        self._transitions = Records(folder / TRANSITIONS, KEPT)
        self._failures = Records(folder / FAILURES, FAILURES_KEPT)
        self._serial = os.open(folder / SERIAL, _FLAGS)

    def transition(self, transition: Transition) -> None:
        """One more transition."""
        self._transitions.add(transition)

    def failure(self, words: str) -> None:
        """One more VM entry that failed."""
        self._failures.add(words)

    def printed(self, data: bytes) -> None:
        """More serial output."""
        os.write(self._serial, data)


class Reader:
    """The parent's side; at any time, whether the child lives or not."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def transitions(self) -> list[Transition]:
        """The last transitions."""
        return list(deque(self._records(TRANSITIONS), KEPT))

    def failures(self) -> list[str]:
        """The last VM entries that failed, in words."""
        return list(deque(self._records(FAILURES), FAILURES_KEPT))

    def printed(self) -> bytes:
        """All serial output."""
        return _content(self._folder / SERIAL)

    def _records(self, name: str) -> list[Any]:
        path = self._folder / name
        return [*_parse(_content(path.with_suffix(".old"))), *_parse(_content(path))]


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _parse(data: bytes) -> list[Any]:
    """The whole records; a crash may have cut the last one."""
    records, at = [], 0
    while at + _SIZE.size <= len(data):
        (size,) = _SIZE.unpack_from(data, at)
        at += _SIZE.size
        if at + size > len(data):
            break
        records.append(pickle.loads(data[at : at + size]))
        at += size
    return records
