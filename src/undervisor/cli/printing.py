"""A console for people: colours and wrapping on a terminal, plain whole lines elsewhere."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

WIDE = 10_000
"""Columns of a console that is no terminal: nothing is wrapped or cut there."""


def console() -> Console:
    """Standard output."""
    if sys.stdout.isatty():
        return Console(highlight=False)
    return Console(highlight=False, width=WIDE, no_color=True, color_system=None)


def put(out: Console, text: str, *, indent: int = 0, style: str = "") -> None:
    """One paragraph; the text is not markup."""
    if sys.stdout.isatty():
        out.print(Padding(escape(text), (0, 0, 0, indent)), style=style or None)
    else:
        out.print(" " * indent + text, markup=False, soft_wrap=True)


def table(*columns: str) -> Table:
    """A table without lines between its rows."""
    made = Table(box=None, pad_edge=False, show_edge=False)
    for name in columns:
        made.add_column(name, overflow="fold")
    return made


def put_json(data: Any) -> None:
    """JSON on standard output."""
    json.dump(data, sys.stdout, indent=2)
    print()
