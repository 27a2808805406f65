"""Bring a small program to a machine through nothing but commands, and take it away again."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from typing import Final

from undervisor.errors import BadInput
from undervisor.host.access.protocol import Host, Output
from undervisor.host.fact import Denied, Known, Unknown

SECONDS: Final = 60.0
_PIECE: Final = 700
"""Bytes of a command: with four characters for each, a terminal's line takes it."""
# /var/tmp is on a disk where /tmp may be memory.
_FOLDER: Final = "mktemp -d /var/tmp/undervisor.XXXXXX 2>/dev/null || mktemp -d"


@contextlib.contextmanager
def folder_on(host: Host) -> Iterator[str]:
    """A new folder there, removed at the end with what is in it.  BadInput says what refuses."""
    path = shell(host, _FOLDER).stdout.strip()
    if not path.startswith("/"):
        raise BadInput(f"{host.name}: no temporary folder can be made")
    try:
        yield path
    finally:
        host.run(["rm", "-rf", path], SECONDS)


def put_program(host: Host, program: bytes, path: str) -> None:
    """Write a program there, byte by byte as `printf` of any shell can.  BadInput as above."""
    word = shlex.quote(path)
    for start in range(0, len(program), _PIECE):
        octal = "".join(f"\\{byte:03o}" for byte in program[start : start + _PIECE])
        shell(host, f"printf '{octal}' >>{word}")
    shell(host, f"chmod 700 {word}")


def shell(host: Host, script: str, timeout: float = SECONDS) -> Output:
    """A script that must succeed there; BadInput says how it failed."""
    return must(host, ["sh", "-c", script], timeout)


def must(host: Host, argv: list[str], timeout: float) -> Output:
    """A command that must succeed there; BadInput says how it failed."""
    fact = host.run(argv, timeout)
    if isinstance(fact, Known) and not fact.value.status:
        return fact.value
    if isinstance(fact, Known):
        lines = fact.value.stderr.strip().splitlines()[-1:] or [f"status {fact.value.status}"]
        raise BadInput(f"{host.name}: {argv[0]} failed: {lines[0][:200]}")
    why = fact.why if isinstance(fact, Unknown) else str(fact)
    hint = "a folder whose programs may run: TMPDIR there" if isinstance(fact, Denied) else ""
    raise BadInput(f"{host.name}: {argv[0]} can't be run: {why}", hint=hint)
