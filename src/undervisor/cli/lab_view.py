"""A lab for people: the tree of its levels, the claims, the times; and the progress of building."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed
from rich.tree import Tree

from undervisor.cli.printing import put, table

_LOOK_EVERY: Final = 0.2
_L0: Final = {"kvm": "this host's KVM", "tcg": "QEMU's TCG, which emulates SVM"}


def show(out: Console, said: dict[str, Any]) -> None:
    """The tree with versions and times, the claims with their evidence, the verdict."""
    seconds = said["seconds"]
    out.print(_tree(said))
    rows = table("", "claim", "evidence")
    for claim in said["claims"]:
        mark, style = ("yes", "green") if claim["holds"] else ("NO", "red")
        text = f"L{claim['level']}: {claim['name']}"
        rows.add_row(mark, text, escape(claim["evidence"]), style=style)
    out.print(rows)
    times = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    put(out, f"{times}; together {sum(seconds.values()):.1f} s")
    deepest = len(said["levels"])
    verdict = " -> ".join(f"KVM of L{n}" for n in range(1, deepest))
    if said["proven"]:
        put(out, f"proven: L{deepest} runs under the {verdict}", style="bold green")
    else:
        put(out, f"not proven that L{deepest} runs under the {verdict}", style="bold red")


def _tree(said: dict[str, Any]) -> Tree:
    tree = Tree(f"L0  {_L0[said['accelerator']]}")
    branch = tree
    for level in said["levels"]:
        number = level["number"]
        nested = f", nested {level['nested']}" if level["nested"] else ""
        device = f"/dev/kvm{nested}" if level["kvm_device"] else "no /dev/kvm"
        branch = branch.add(
            f"L{number}  Linux {escape(level['kernel'])}: CPUs {level['cpus']}, "
            f"below it {escape(level['testimony']['signature'] or 'nothing')}, {device}, "
            f"up in {said['seconds'][f'L{number}']:.1f} s"
        )
    return tree


class Drawn:
    """Progress on stderr; a download grows as its file does."""

    def __init__(self) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), Elapsed())
        bar = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
        self._steps = Progress(*columns, console=Console(stderr=True), transient=True)
        self._downloads = Progress(*bar, console=Console(stderr=True), transient=True)

    @contextlib.contextmanager
    def working(self, text: str) -> Iterator[None]:
        """A spinner with the time that the step has taken."""
        with self._steps:
            task = self._steps.add_task(text, total=None)
            try:
                yield
            finally:
                self._steps.remove_task(task)

    @contextlib.contextmanager
    def growing(self, text: str, size: int, folder: Path) -> Iterator[None]:
        """A bar that follows the size of the files in `folder`."""
        done = threading.Event()
        with self._downloads:
            task = self._downloads.add_task(text, total=size)

            def follow() -> None:
                while not done.wait(_LOOK_EVERY):
                    self._downloads.update(task, completed=_size(folder))

            watcher = threading.Thread(target=follow, daemon=True)
            watcher.start()
            try:
                yield
            finally:
                done.set()
                watcher.join()
                self._downloads.remove_task(task)

    def __enter__(self) -> Drawn:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._steps.stop()
        self._downloads.stop()


def _size(folder: Path) -> int:
    """Bytes of the files there; one that moves away meanwhile counts nothing."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total
