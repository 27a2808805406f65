"""`undervisor bench --levels`: the same measurements at every level, as ratios."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from undervisor.cli.lab import drawn_progress
from undervisor.cli.printing import console, put, put_json, table
from undervisor.errors import BadInput, ExitCode
from undervisor.host.access.live import LiveHost
from undervisor.host.access.opening import open_host

if TYPE_CHECKING:
    from undervisor.host.access.protocol import Host
    from undervisor.lab.levels.comparison import Comparison
    from undervisor.lab.levels.session import Subject
    from undervisor.lab.progress import Progress

HERE: Final = "here"
_GUEST: Final = "guest:"
_DEPTH: Final = 2
_NUMBERED: Final = re.compile(r"(?:l(\d)=)?(.+)")
_KINDS: Final = (".svg", ".html")


def measure_levels(
    hosts: Sequence[str], *, quick: bool, as_json: bool, pictures: Sequence[Path]
) -> int:
    """Measure, say, draw; the exit code.  Raises what opening the levels raises."""
    from undervisor.lab.levels.comparison import compare
    from undervisor.lab.levels.session import FULL, QUICK, measure

    for path in pictures:  # before minutes are spent
        if path.suffix not in _KINDS:
            raise BadInput(f"{path}: no picture of that kind", hint="a name in .svg or .html")
        if not path.parent.is_dir():
            raise BadInput(f"cannot write {path}: there is no such folder")
    effort = QUICK if quick else FULL
    with drawn_progress() as progress, _subjects(hosts, not quick, progress) as subjects:
        found = measure(subjects, effort, with_tools=not quick, progress=progress)
    made = compare(found, effort)
    for path in pictures:
        _draw(made, path)
    if as_json:
        put_json(made.as_json())
    else:
        _print(made)
    return ExitCode.NEGATIVE if made.over else ExitCode.OK


@contextlib.contextmanager
def _subjects(
    hosts: Sequence[str], with_tools: bool, progress: Progress
) -> Iterator[list[Subject]]:
    """The levels named, the outermost first, or those of a new lab."""
    from undervisor.lab.levels.stack import levels_of_a_lab

    with contextlib.ExitStack() as stack:
        if not hosts:
            lab = levels_of_a_lab(_DEPTH, with_tools=with_tools, progress=progress)
            yield stack.enter_context(lab)
            return
        yield _opened(stack, hosts)


def _opened(stack: contextlib.ExitStack, hosts: Sequence[str]) -> list[Subject]:
    """Levels of `here`, `user@name`, `lab:l1`, `guest:NAME`; `l1=` before one gives its number."""
    from undervisor.lab.levels.session import Subject

    subjects: list[Subject] = []
    for place, text in enumerate(hosts):
        match = _NUMBERED.fullmatch(text)
        number = int(match[1]) if match and match[1] else place
        if subjects and number <= subjects[-1].number:
            raise BadInput(f"{text!r}: L{number} is not inside L{subjects[-1].number}",
                           hint="name the outermost level first")  # fmt: skip
        host = _open(match[2] if match else text)
        stack.callback(host.close)
        subjects.append(Subject(number, host))
    if len(subjects) < 2:
        raise BadInput("one level is compared with nothing", hint="here user@l1 user@l2")
    return subjects


def _open(name: str) -> Host:
    if name == HERE:
        return LiveHost()
    if name.startswith(_GUEST):
        return open_host(guest=name.removeprefix(_GUEST))
    return open_host(name)


def _draw(made: Comparison, path: Path) -> None:
    from undervisor.report.levels.page import page
    from undervisor.report.levels.picture import picture

    text = picture(made) if path.suffix == ".svg" else page(made)
    try:
        path.write_text(text)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}") from None


def _print(made: Comparison) -> None:
    from undervisor.report.levels.words import cells, head, missing

    out = console()
    for name, machine in made.levels.items():
        put(out, f"{name}: {machine}; below it, by CPUID: {made.below[name] or 'nothing'}")
    rows = table(*head(made))
    for column in rows.columns[1:]:
        column.justify = "right"
    for row in made.rows:
        rows.add_row(*cells(made, row))
    out.print(rows)
    for note in (*made.notes, *missing(made)):
        put(out, note)
