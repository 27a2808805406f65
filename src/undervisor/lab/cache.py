"""Files that were costly to make, kept under their inputs' names; a name is whole or not there.

What is being made lies in a folder of its own, is flushed, and takes its name in one rename.  A
maker that is killed leaves that folder behind, and the next maker removes it: makers hold a lock,
which the system lets go of when its holder dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from undervisor.errors import BadInput

_HALF: Final = ".half-"
_DAYS: Final = 14


def default_folder() -> Path:
    """`undervisor` below XDG_CACHE_HOME, or below ~/.cache."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    return Path(named if named.startswith("/") else Path.home() / ".cache") / "undervisor"


class Cache:
    """Entries, files or folders, in one folder."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or default_folder()

    def entry(self, name: str, make: Callable[[Path], None]) -> Path:
        """The path of the entry; where it is not there, `make` is given the path to write to.

        `make` writes a file or makes a folder there; what it raises passes, and no entry is left.
        """
        path = self.folder / name
        if path.exists():
            os.utime(path)
            return path
        with self._making() as place:
            if not path.exists():  # another maker may have come first
                half = place / "entry"
                make(half)
                _flush(half)
                half.rename(path)
        return path

    @contextlib.contextmanager
    def _making(self) -> Iterator[Path]:
        """A folder to make something in, while nobody else makes anything."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise BadInput(
                f"cannot write to the cache {self.folder}: {error.strerror}",
                hint="XDG_CACHE_HOME may name another place",
            ) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in self.folder.glob(f"{_HALF}*"):
                shutil.rmtree(left, ignore_errors=True)
            self._forget()
            with tempfile.TemporaryDirectory(prefix=_HALF, dir=self.folder) as place:
                yield Path(place)
        finally:
            os.close(lock)

    def _forget(self) -> None:
        """Remove what nobody has asked for in a long time: images follow every change of inputs."""
        oldest = time.time() - _DAYS * 86400
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):
                if not path.name.startswith(".") and path.stat().st_mtime < oldest:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _flush(path: Path) -> None:
    """A file's bytes reach the disk before its name does, whatever happens to the machine."""
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())
