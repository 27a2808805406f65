"""Programs behind targets: each in a group and a folder of its own, and nothing is left of either.

A guard, a shell that waits for the end of its input, leads the group.  Its input ends with this
process, however that ends, and then it removes the folder and kills the group.  As long as it is
not waited for, its number cannot belong to anybody else, so that killing the group is safe.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from socket import socket
from typing import IO, Final

from undervisor.errors import BadInput

_GUARD: Final = 'read -r _; rm -rf -- "$1"; kill -KILL 0'


def find(program: str, package: str) -> str:
    """The path of an installed program; BadInput that names its Debian package where it is not."""
    path = shutil.which(program)
    if path is None:
        raise BadInput(
            f"{program} is not installed, or is not in PATH",
            hint=f"on Debian and Ubuntu: apt install {package}",
        )
    return os.path.abspath(path)


def cause(status: int) -> str:
    """How a program ended, from its status in the convention of `Popen`."""
    if status >= 0:
        return f"ended with status {status}"
    with contextlib.suppress(ValueError):
        return f"died of {signal.Signals(-status).name}"
    return f"died of signal {-status}"


class Program:
    """A started program in a private folder with the given files."""

    def __init__(
        self,
        command: Sequence[str],
        files: Mapping[str, bytes],
        hand_over: Iterable[socket] = (),
    ) -> None:
        """`command` runs in the folder; it keeps the numbers of the sockets in `hand_over`."""
        self.folder = Path(tempfile.mkdtemp(prefix="undervisor-"))
        self._group: subprocess.Popen[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        try:
            for name, data in files.items():
                (self.folder / name).write_bytes(data)
            self._group = subprocess.Popen(
                ["/bin/sh", "-c", _GUARD, "guard", str(self.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                process_group=0,
            )
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[end.fileno() for end in hand_over],
                process_group=self._group.pid,
                env=os.environ | {"LC_ALL": "C"},
            )
            self.pid = self._process.pid
            self.ended = os.pidfd_open(self.pid)
        except BaseException:
            self._tidy()
            raise

    pid: int
    """The program's process."""
    ended: int
    """A file descriptor that is readable when the program has ended."""

    @property
    def output(self) -> IO[bytes]:
        """What it prints."""
        assert self._process is not None
        assert self._process.stdout is not None
        return self._process.stdout

    def status(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def kill(self) -> None:
        """End the program; what it printed can still be read."""
        assert self._process is not None
        self._process.kill()

    def close(self) -> None:
        """End everything and remove the folder."""
        self._tidy()
        self.output.close()
        os.close(self.ended)

    def _tidy(self) -> None:
        if self._group is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._group.pid, signal.SIGKILL)
            if self._process is not None:
                self._process.wait()
            self._group.wait()
            assert self._group.stdin is not None
            self._group.stdin.close()
        shutil.rmtree(self.folder, ignore_errors=True)
