"""What a long step tells a person; the command line draws it, everybody else stays silent."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol


class Progress(Protocol):
    """Listens to the steps of building and starting a lab."""

    def working(self, text: str) -> contextlib.AbstractContextManager[None]:
        """A step of unknown length."""

    def growing(
        self, text: str, size: int, folder: Path
    ) -> contextlib.AbstractContextManager[None]:
        """A step that ends when the files in `folder` hold `size` bytes."""


class Silent:
    """Tells nobody."""

    @contextlib.contextmanager
    def working(self, text: str) -> Iterator[None]:
        """Nothing is shown."""
        yield

    @contextlib.contextmanager
    def growing(self, text: str, size: int, folder: Path) -> Iterator[None]:
        """Nothing is shown."""
        yield


SILENT = Silent()
