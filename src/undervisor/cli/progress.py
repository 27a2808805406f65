"""A counted piece of work on standard error: a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rich.console import Console

_LONGEST: Final = 60


def errors_console() -> Console:
    """Standard error."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


@contextmanager
def counted_work(
    out: Console, what: str, total: int, *, begun: bool = False
) -> Iterator[Callable[[str], None]]:
    """While inside, a bar for `total` steps; call what is given with the name of each one done.

    `begun`: the names are told when their work begins, so that the one before is then done.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[last]}"),
    )
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as bar:
        task = bar.add_task(what, total=total, last="", completed=-1 if begun else 0)
        yield lambda name: bar.update(task, advance=1, last=name[:_LONGEST])
