"""Run one command: no shell, bounded time, bounded output, no orphan left behind."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence

from undervisor.host.access.protocol import OUTPUT_LIMIT, Output
from undervisor.host.fact import Fact, Known, Unknown, from_errno

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def environment() -> dict[str, str]:
    """The caller's environment with messages in English and the folders of system tools."""
    path = os.environ.get("PATH", "")
    return {**os.environ, "LC_ALL": "C", "PATH": f"{path}:{_PATH}" if path else _PATH}


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that was started in its own session, and all its children."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_bounded(
    argv: Sequence[str], timeout: float, limit: int = OUTPUT_LIMIT, stdin: bytes | None = None
) -> Fact[Output]:
    """Run `argv`; unknown where it takes too long or says too much, absent where it is not there.

    `stdin` (at most a pipe's worth, 4 KiB) is given to the command, else it reads nothing.
    """
    source = " ".join(argv)
    try:
        process = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
            start_new_session=True,
        )
    except OSError as error:
        return from_errno(error.errno or 0, source)
    except ValueError as error:
        return Unknown(source, str(error))
    try:
        if stdin is not None and process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(stdin)
                process.stdin.close()
        return _collect(process, source, timeout, limit)
    finally:
        kill_group(process)
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def _collect(
    process: subprocess.Popen[bytes], source: str, timeout: float, limit: int
) -> Fact[Output]:
    """Read both pipes until they end, the time is over or the limit is passed."""
    assert process.stdout is not None
    assert process.stderr is not None
    said = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    deadline = time.monotonic() + timeout
    with selectors.DefaultSelector() as selector:
        for number in said:
            selector.register(number, selectors.EVENT_READ)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                return Unknown(source, f"no answer within {timeout:g} s", code="ETIMEDOUT")
            for key, _ in selector.select(left):
                piece = os.read(key.fd, 1 << 16)
                if not piece:
                    selector.unregister(key.fd)
                said[key.fd] += piece
                if len(said[key.fd]) > limit:
                    return Unknown(source, f"more than {limit} bytes of output", code="EFBIG")
    try:
        status = process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return Unknown(source, f"did not end within {timeout:g} s", code="ETIMEDOUT")
    out, err = (bytes(text).decode("utf-8", "replace") for text in said.values())
    return Known(Output(status, out, err), source)
