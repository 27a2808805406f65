"""Which format an input has, and the dumps in it.

The input may be anything.  At most `SCAN_LIMIT` bytes are looked through and `KEEP` around the
last sign of a dump are kept, so that time and memory are bounded however long a log is.
"""

from __future__ import annotations

import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from undervisor.errors import BadInput
from undervisor.explain.dump import Dump
from undervisor.explain.formats import (
    bochs,
    haxm,
    nested_state,
    pairs,
    qemu,
    virtualbox,
    vmcb_raw,
    vmcb_text,
    vmcs_text,
)

CHUNK = 1 << 20
WHOLE = 2 << 20
"""Inputs up to this size are taken whole."""
KEEP_BEFORE, KEEP_AFTER = 128 << 10, 768 << 10
"""Of a longer one: bytes kept before and after the last sign of a dump."""
SCAN_LIMIT = 1 << 30
LINE_LIMIT = 2000
"""Characters of a line; what is behind them is cut off."""
LINES_LIMIT = 40_000
DUMPS_LIMIT = 64
"""Dumps of one text that are looked at."""
BINARY_SHARE = 0.10
"""With more control bytes than this a text is no text."""

MARKERS: tuple[bytes, ...] = tuple(
    marker
    for module in (vmcs_text, vmcb_text, haxm, qemu, bochs, virtualbox)
    for marker in module.MARKERS
)

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_QUOTE = re.compile(r"^(?:\s*[>|]\s?)+")

Reader = Callable[[list[str]], list[Dump]]


@dataclass(frozen=True, slots=True)
class TextFormat:
    """A format of text, read only where one of its signs is in the text."""

    read: Reader
    markers: tuple[str, ...]

    @classmethod
    def of(cls, read: Reader, markers: tuple[bytes, ...]) -> TextFormat:
        """The format of a module."""
        return cls(read, tuple(marker.decode() for marker in markers))


STATES: tuple[TextFormat, ...] = (
    TextFormat.of(vmcs_text.read, vmcs_text.MARKERS),
    TextFormat.of(vmcb_text.read, vmcb_text.MARKERS),
    TextFormat.of(haxm.read, haxm.MARKERS),
)
"""Formats of whole states; the first that finds one counts."""
LOGS: tuple[TextFormat, ...] = (
    TextFormat.of(qemu.read, qemu.MARKERS),
    TextFormat.of(virtualbox.read, virtualbox.MARKERS),
    TextFormat.of(bochs.read, bochs.MARKERS),
)
"""Formats of logs that go with a state or stand alone."""


def read_file(path: str) -> list[Dump]:
    """The dumps in a file; "-" is standard input.  BadInput where there is none."""
    if path == "-":
        return read(_bounded(iter(lambda: sys.stdin.buffer.read(CHUNK), b"")))
    where = Path(path)
    try:
        if where.is_dir():
            raise BadInput(f"{path} is a folder", hint="name the file with the dump")
        with where.open("rb") as file:
            return read(_bounded(_chunks(file)))
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from None
    except ValueError as error:  # a path with a NUL
        raise BadInput(f"{path!r}: {error}") from None


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    return iter(lambda: file.read(CHUNK), b"")


def _bounded(chunks: Iterable[bytes]) -> bytes:
    """The input, or of a long one the part around the last sign of a dump."""
    before: deque[bytes] = deque()
    size, total, start, window, rest = 0, 0, b"", b"", 0
    for chunk in chunks:
        total += len(chunk)
        if total > SCAN_LIMIT:
            raise BadInput(f"more than {SCAN_LIMIT >> 30} GiB of input", hint="cut the dump out")
        if total <= WHOLE + CHUNK:
            start += chunk
        if rest > 0:
            window += chunk[:rest]
            rest -= len(chunk)
        joined = (before[-1][-64:] if before else b"") + chunk
        if rest <= 0 and (first := _first_sign(joined)) >= 0:
            window = (b"".join(before) + chunk)[-len(chunk) - KEEP_BEFORE :]
            cut = max(0, len(window) - len(joined) + first - KEEP_BEFORE)
            window = window[cut:]
            rest = KEEP_AFTER
        before.append(chunk)
        size += len(chunk)
        while size - len(before[0]) > KEEP_BEFORE:
            size -= len(before.popleft())
    if total <= WHOLE:
        return start
    return window or start[:WHOLE]


def _first_sign(text: bytes) -> int:
    """Where the first marker is, -1 where none is."""
    places = (found for marker in MARKERS if (found := text.find(marker)) >= 0)
    return min(places, default=-1)


def read(raw: bytes) -> list[Dump]:
    """The dumps in `raw`, each with all that its input says; BadInput where there is none."""
    if not raw.strip():
        raise BadInput("the input is empty", hint="give the dump's text, or a file with it")
    binary = _binary(raw)
    if binary:
        return binary
    if _is_binary(raw) and not any(marker in raw for marker in MARKERS):
        raise BadInput(
            f"{len(raw)} bytes of binary data that are neither a VMCB nor a nested state",
            hint="a VMCB has 4096 bytes; a nested state 128, 4224 or 8320",
        )
    text = raw.decode("utf-8", "replace")
    if text.lstrip("\ufeff \t\r\n")[:1] in "{[":
        found = pairs.read_json(text.strip("\ufeff \t\r\n"))
        if found:
            return found
    return _texts(clean(text))


def _binary(raw: bytes) -> list[Dump]:
    if nested_state.looks_like(raw):
        return nested_state.read(raw)
    if vmcb_raw.looks_like(raw) and _is_binary(raw):
        return vmcb_raw.read(raw)
    return []


def _is_binary(raw: bytes) -> bool:
    sample = raw[: 1 << 16]
    odd = sum(byte < 9 or (13 < byte < 32 and byte != 27) for byte in sample)
    return odd > BINARY_SHARE * len(sample)


def clean(text: str) -> list[str]:
    """Lines without colours, control characters and quote marks."""
    filled = (line for line in _ANSI.sub("", text).splitlines() if line and not line.isspace())
    return [
        _QUOTE.sub("", _CONTROL.sub("", line[:LINE_LIMIT])).rstrip()
        for line in islice(filled, LINES_LIMIT)
    ]


def _texts(lines: list[str]) -> list[Dump]:
    text = "\n".join(lines)
    logs = [dump for form in LOGS for dump in _by(form, lines, text) if not dump.is_empty]
    for form in STATES:
        dumps = _by(form, lines, text)
        if dumps:
            for dump in dumps:
                _merge(dump, logs)
            return dumps
    if logs:
        for other in logs[1:]:
            _merge(logs[0], [other])
        return logs[:1]
    found = pairs.read(lines)
    if found:
        return found
    raise BadInput(
        "no dump of a kind that is known here",
        hint="known: KVM, Xen and HAXM dumps, QEMU's, Bochs's and VirtualBox's logs, nested-state "
        "blobs, raw VMCBs, JSON and `field = value` text",
    )


def _by(form: TextFormat, lines: list[str], text: str) -> list[Dump]:
    """What a format's reader finds, if any of its signs is there."""
    if not any(marker in text for marker in form.markers):
        return []
    return form.read(lines)[:DUMPS_LIMIT]


def _merge(dump: Dump, logs: list[Dump]) -> None:
    """Add to a state what the log around it says."""
    for log in logs:
        if log.vendor and log.vendor != dump.vendor:
            continue
        dump.observations += log.observations
        dump.named += log.named
        dump.failure = dump.failure or log.failure
        for field, value in log.state.items():
            dump.state.setdefault(field, value)
