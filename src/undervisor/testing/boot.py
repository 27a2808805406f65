"""What a test boots, and the words in which it speaks with the machine's process.

Nothing heavy is imported here or in `remote`: the test's process never loads the processor.
"""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from undervisor.guest.image import Module

VALUE, ERROR, ASK, ANSWER = "value", "error", "ask", "answer"
WHEN, EXCEPTION = "when", "exception"
ABANDONED: Final = "abandoned"
"""The answer of a callback that raised: the run stops, and the test raises it."""
DEFAULT_MEMORY: Final = 256 << 20


@dataclass(frozen=True, slots=True)
class Boot:
    """What to boot; `image` is an absolute path or the bytes."""

    image: str | bytes
    cpu: str = "intel"
    cpus: int = 1
    memory: int = DEFAULT_MEMORY
    append: str = ""
    modules: tuple[Module, ...] = ()
    raw: int | None = None
    quirks: tuple[str, ...] = ()

    def options(self) -> dict[str, Any]:
        """The arguments of `undervisor.api.Vm`."""
        return {name: getattr(self, name) for name in self.__slots__}

    def __str__(self) -> str:
        name = Path(self.image).name if isinstance(self.image, str) else "an image"
        cpus = "1 cpu" if self.cpus == 1 else f"{self.cpus} cpus"
        return f"{name} on {self.cpu}, {cpus}"


def live(line: Connection, boot: Boot, folder: Path, trace: Path | None) -> None:
    """The life of a machine's process."""
    from undervisor.testing.child import serve  # in the child only: this is the heavy part

    serve(line, boot, folder, trace)


def context() -> ForkServerContext:
    """Where children come from: a process that has imported everything and holds no threads."""
    found = multiprocessing.get_context("forkserver")
    # The test runner's own script is imported there once, not again in each child.
    found.set_forkserver_preload(["__main__", "undervisor.testing.child"])
    return found
