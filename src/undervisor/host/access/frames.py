"""One request to a plain `sh` at the end of a byte stream, and its framed answer.

Answers are framed by random words, so banners and start-up noise do no harm; a machine that hangs
or floods costs a bounded time and a bounded memory, and what it did not say is unknown.
"""

from __future__ import annotations

import os
import secrets
import selectors
import time
from collections.abc import Callable, Generator, Iterator

from undervisor.host.fact import Fact, Known, Unknown

PREPARE = "LC_ALL=C; export LC_ALL; PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin; exec 3>&1\n"
"""What a shell is told once, before the first request."""

Answer = tuple[int, bytes, bytes]
"""Status, standard output and standard error of a script."""


def exchange(
    number: int,
    write: Callable[[bytes], None],
    script: str,
    timeout: float,
    limit: int,
    source: str,
) -> Fact[Answer]:
    """Send `script` and read its answer from the file descriptor `number`.

    OSError where the stream breaks.  An Unknown with code ETIMEDOUT or EFBIG leaves the shell busy:
    the caller has to end it.
    """
    word = secrets.token_hex(16)
    write(_request(script, word))
    begin, end, done = (f"\n{tag} {word}".encode() for tag in ("BEGIN", "END", "DONE"))
    said = bytearray()
    deadline = time.monotonic() + timeout
    seen = 0
    with selectors.DefaultSelector() as selector:
        selector.register(number, selectors.EVENT_READ)
        while said.find(done, max(0, seen - len(done))) < 0:
            seen = len(said)
            left = deadline - time.monotonic()
            if left <= 0:
                return Unknown(source, "no answer in time", code="ETIMEDOUT")
            if len(said) > 2 * limit + (1 << 20):
                return Unknown(source, "it says far too much", code="EFBIG")
            if not selector.select(left):
                continue
            piece = os.read(number, 1 << 16)
            if not piece:
                raise OSError("the connection closed")
            said += piece
    return _parse(bytes(said), begin, end, done, source)


def follow(
    number: int, write: Callable[[bytes], None], script: str, timeout: float
) -> Iterator[bytes]:
    """Send `script` and give its standard output as it comes, until it ends.

    OSError where the stream breaks, TimeoutError where it has not ended after `timeout` seconds:
    the shell is busy then, as it is where nobody reads to the end.
    """
    word = secrets.token_hex(16)
    write(_request(script, word))
    begin, end, done = (f"\n{tag} {word}".encode() for tag in ("BEGIN", "END", "DONE"))
    pieces = _pieces(number, time.monotonic() + timeout)
    rest = yield from _until(pieces, begin + b"\n", b"", shown=False)
    rest = yield from _until(pieces, end, rest, shown=True)
    yield from _until(pieces, done, rest, shown=False)


def _until(
    pieces: Iterator[bytes], mark: bytes, said: bytes, *, shown: bool
) -> Generator[bytes, None, bytes]:
    """Read up to `mark`, give what is before it where it is to be shown, return what is behind."""
    while (at := said.find(mark)) < 0:
        safe = said.rfind(mark[:1], max(0, len(said) - len(mark)))  # may be where the mark begins
        safe = len(said) if safe < 0 else safe
        if shown and safe:
            yield said[:safe]
        said = said[safe:] + next(pieces)
    if shown and at:
        yield said[:at]
    return said[at + len(mark) :]


def _pieces(number: int, deadline: float) -> Iterator[bytes]:
    """What comes; TimeoutError at the deadline, OSError at the end of the stream."""
    with selectors.DefaultSelector() as selector:
        selector.register(number, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError("no answer in time")
            piece = os.read(number, 1 << 16)
            if not piece:
                raise OSError("the connection closed")
            yield piece


def _request(script: str, word: str) -> bytes:
    """`script` with its stdout, status and stderr framed; the word is sent in two halves, so that
    an echo of the request is not an answer; all in one line, so that an echo comes before it."""
    halves = f"{word[:16]} {word[16:]}"
    text = f"printf '\\nBEGIN %s%s\\n' {halves}; "
    text += f"e=$( {{ {script}; }} 2>&1 1>&3 3>&- </dev/null ); s=$?; "
    text += f'printf \'\\nEND %s%s %s\\n%s\\nDONE %s%s\\n\' {halves} "$s" "$e" {halves}\n'
    return text.encode("utf-8", "surrogateescape")


def _parse(said: bytes, begin: bytes, end: bytes, done: bytes, source: str) -> Fact[Answer]:
    start, stop = said.find(begin), said.rfind(end)
    if start < 0 or stop < start:
        return Unknown(source, "its answer is not framed")
    out = said[start + len(begin) + 1 : stop]
    rest = said[stop + len(end) : said.rfind(done)]
    head, _, err = rest.partition(b"\n")
    if not head.strip().isdigit():
        return Unknown(source, "its answer is not framed")
    return Known((int(head), out, err), source)
