"""The byte streams between us and the levels of a lab, by name.

Each level has a console (its first serial port), a shell that reads requests, a control line that
ends a shell's command, and a line for an agent.  A level carries the streams of the levels inside
it: for L1 they are ports of a virtio serial device, and the VMM of L2 opens those as its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

CONSOLE: Final = "console"
SHELL: Final = "shell"
CONTROL: Final = "control"
AGENT: Final = "agent"
GREETING: Final = b"\n"
"""What the user of a shell gets when it is its turn."""
_OWN: Final = (SHELL, CONTROL, AGENT)


def port(kind: str, level: int) -> str:
    """The name of a level's stream: `shell.l2`."""
    return f"{kind}.l{level}"


def own(level: int) -> Iterator[str]:
    """The virtio ports that a level serves itself."""
    return (port(kind, level) for kind in _OWN)


def carried(level: int, depth: int) -> Iterator[str]:
    """The virtio ports of a level: its own, and all of the levels inside it."""
    yield from own(level)
    for inner in range(level + 1, depth + 1):
        yield port(CONSOLE, inner)
        yield from own(inner)


def of_lab(depth: int) -> Iterator[str]:
    """Every stream of a lab, as the host sees them."""
    yield port(CONSOLE, 1)
    yield from carried(1, depth)
