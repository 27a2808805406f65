"""Where the labs of this user are: a folder for each, with its sockets, its logs and its lock.

A lab runs as long as its keeper holds the lock; the system lets go of it however the keeper ends,
so a lab is never taken for running because of a number that another process has got since.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from undervisor.errors import BadInput

DEFAULT: Final = "lab"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")
_RECORD, _LOCK, PLAN, LOG = "lab.json", "lock", "plan.json", "qemu.log"


def labs_folder() -> Path:
    """Short, because the path of a socket has at most 107 bytes; only this user may enter it."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    folder = Path(runtime) / "undervisor" if runtime else Path(f"/tmp/undervisor-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise BadInput(f"cannot make {folder}: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise BadInput(f"{folder} is open to others", hint="remove it, or set XDG_RUNTIME_DIR")
    return folder


@dataclass(frozen=True, slots=True)
class Place:
    """A lab's folder."""

    folder: Path

    @classmethod
    def named(cls, name: str) -> Place:
        """Of the lab of that name; BadInput where it can't be one."""
        if not _NAME.fullmatch(name):
            raise BadInput(f"{name!r} can't be a lab's name", hint="letters, digits, `-._`")
        return cls(labs_folder() / name)

    @property
    def name(self) -> str:
        """The lab's name."""
        return self.folder.name

    def socket(self, stream: str) -> Path:
        """Where a stream of the lab is to be had."""
        return self.folder / f"{stream}.sock"

    def log(self, stream: str) -> Path:
        """Where what came from a stream is kept."""
        return self.folder / f"{stream}.log"

    def hold(self) -> int:
        """Take the lock; its file descriptor, or BadInput where the lab runs."""
        number = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(number)
            raise BadInput(
                f"the lab {self.name} runs already", hint=f"undervisor lab down {self.name}"
            ) from None
        return number

    def runs(self) -> bool:
        """Whether its keeper lives."""
        try:
            number = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(number)
        return False

    def write(self, record: dict[str, Any]) -> None:
        """Keep what is to be known of the lab; whole or not at all."""
        half = self.folder / f"{_RECORD}.new"
        half.write_text(json.dumps(record))
        half.rename(self.folder / _RECORD)

    def record(self) -> dict[str, Any]:
        """What `write` kept; empty where there is nothing."""
        try:
            data = json.loads((self.folder / _RECORD).read_text())
        except (OSError, ValueError):
            return {}
        return data if isinstance(data, dict) else {}

    def keeper(self) -> int | None:
        """The process that keeps the lab, if it is still the one that was recorded."""
        record = self.record()
        pid = record.get("pid")
        same = isinstance(pid, int) and started(pid) == record.get("started")
        return pid if same and isinstance(pid, int) else None

    def remove(self) -> None:
        """Remove what is left of a lab that does not run."""
        shutil.rmtree(self.folder, ignore_errors=True)


def all_places() -> list[Place]:
    """Every lab's folder, running or not."""
    folders = sorted(path for path in labs_folder().iterdir() if path.is_dir())
    return [Place(path) for path in folders]


def started(pid: int) -> int | None:
    """When a process was started, in ticks since boot: with its number, it names a process."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        # proc(5): the name in brackets may hold anything; `starttime` is field 22, 20th after it.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return None
