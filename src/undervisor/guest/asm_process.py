"""The assembler's process, seen from ours: started at the first use, again after a bad source."""

from __future__ import annotations

import atexit
import os
import select
import struct
import subprocess
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from undervisor.errors import BadInput

WORKER = Path(__file__).with_name("asm_worker.py")
TIME_LIMIT = 20.0
"""Seconds for one source; a source that repeats itself for ever ends here."""


class AssemblerFailed(Exception):
    """The assembler ended instead of answering; the text is what it said."""


class Assembler:
    """A process that turns sources into ELF objects, one at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._complaints: IO[bytes] | None = None
        self._owner = 0
        atexit.register(self.close)

    def run(self, source: str) -> bytes:
        """The ELF object of `source`; AssemblerFailed with LLVM's words where there is none."""
        with self._lock:
            process = self._started()
            try:
                data = source.encode()
                process.stdin.write(struct.pack("<I", len(data)) + data)  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
                deadline = time.monotonic() + TIME_LIMIT
                (size,) = struct.unpack("<I", self._read(4, deadline))
                return self._read(size, deadline)
            except (EOFError, BrokenPipeError):
                raise AssemblerFailed(self._stopped()) from None

    def close(self) -> None:
        """End the process; the next source starts another."""
        if self._process is not None and self._owner == os.getpid():
            self._stopped()
        self._process = None

    def _started(self) -> subprocess.Popen[bytes]:
        # A forked child must not share its parent's pipe.
        if self._process is None or self._owner != os.getpid():
            _require_llvm()
            self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 (lives as the process does)
            # -P: the modules beside the worker must not hide the standard library's.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
            )
            self._owner = os.getpid()
        return self._process

    def _read(self, size: int, deadline: float) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        pipe, data = self._process.stdout.fileno(), b""
        while len(data) < size:
            ready, _, _ = select.select([pipe], [], [], max(0, deadline - time.monotonic()))
            if not ready:
                self._process.kill()
                raise AssemblerFailed(self._stopped() or f"no end after {TIME_LIMIT:g} s")
            piece = os.read(pipe, size - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def _stopped(self) -> str:
        """Wait for the process's end and give what it said."""
        process, complaints = self._process, self._complaints
        assert process is not None
        assert complaints is not None
        self._process = None
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue
        process.wait()
        complaints.seek(0)
        words = complaints.read(1 << 16).decode(errors="replace")
        complaints.close()
        return words or (f"it died of signal {-process.returncode}" if process.returncode else "")


def _require_llvm() -> None:
    """BadInput where the package was put on a machine without all that it requires: a lab's L1."""
    if find_spec("llvmlite") is None:
        raise BadInput(
            "nothing can be assembled here: llvmlite is not installed",
            hint="pip install llvmlite; or ask from a machine that has it, with --host "
            "(a lab's L1: --host lab:l1): what must run there is sent along",
        )
