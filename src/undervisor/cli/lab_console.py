"""A level's console on this terminal."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import tty
from collections.abc import Iterator
from typing import Final

from undervisor.cli.terminal import STDIN, put
from undervisor.errors import BadInput
from undervisor.lab.host import connect
from undervisor.lab.places import Place
from undervisor.lab.ports import CONSOLE, port

LEAVE: Final = b"\x1d"
"""Ctrl-], as in telnet and virsh."""
_PIECE: Final = 1 << 16
_LAST_WORDS: Final = 1.0
"""Seconds that a console is read on after the end of the input."""


def attach(place: Place, level: int) -> None:
    """Keys to the console and its output to us, until Ctrl-] or the end of either side."""
    try:
        line = connect(place, port(CONSOLE, level))
    except OSError as error:
        raise BadInput(f"no console of L{level}: {error.strerror}") from None
    if sys.stdin.isatty():
        print(f"the console of L{level}; Ctrl-] leaves it", file=sys.stderr)
    with line, _raw():
        listening = True
        while True:
            numbers = [line.fileno(), STDIN] if listening else [line.fileno()]
            ready, _, _ = select.select(numbers, [], [], None if listening else _LAST_WORDS)
            if not ready:
                return
            if line.fileno() in ready:
                data = line.recv(_PIECE)
                if not data:
                    return
                put(data)
            if STDIN in ready:
                keys = os.read(STDIN, _PIECE)
                before, leave, _ = keys.partition(LEAVE)
                line.sendall(before)
                if leave:
                    return
                listening = bool(keys)


@contextlib.contextmanager
def _raw() -> Iterator[None]:
    """Every key is the console's, Ctrl-C too."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(STDIN)
    try:
        tty.setraw(STDIN, termios.TCSADRAIN)  # keys that were typed ahead are not lost
        yield
    finally:
        termios.tcsetattr(STDIN, termios.TCSADRAIN, before)
        print(file=sys.stderr)
