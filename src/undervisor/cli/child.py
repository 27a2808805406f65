"""A piece of work in a child process, so that a crash of the processor library is only an outcome.

The child is forked before anything heavy is imported, shares the standard streams, and dies with
its parent.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Final, NoReturn

from undervisor import errors
from undervisor.errors import ExitCode, SiliconDied, TimedOut, UndervisorError
from undervisor.orphans import die_with

INTERRUPTED: Final = 130
"""The exit code after Ctrl-C, as shells have it: 128 + SIGINT."""
BROKEN_PIPE: Final = 141
"""The exit code when nobody reads the output any more: 128 + SIGPIPE."""

_GRACE: Final = 3.0
_MOST_WORDS: Final = 1 << 20


def run_in_child(work: Callable[[], int], timeout: float | None = None) -> int:
    """The exit code that `work` returns in a child; what it raises of ours is raised here.

    SiliconDied where the child dies of a signal.  A child that does not keep the time limit
    itself is killed a little later: TimedOut.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    parent, pid = os.getpid(), os.fork()
    if pid == 0:
        os.close(reading)
        _live(work, writing, parent)
    os.close(writing)
    limit = None if timeout is None else timeout + _GRACE
    try:
        words, status = _await(pid, reading, limit)
    finally:
        os.close(reading)
    if words:
        _raise(json.loads(words))
    if os.WIFSIGNALED(status):
        raise _death(os.WTERMSIG(status))
    return os.WEXITSTATUS(status)


def _death(number: int) -> SiliconDied:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if number == signal.SIGKILL:
        hint = "something killed it, perhaps for lack of memory"
    else:
        hint = "a guest can bring the processor library down; the machine is lost, nothing else"
    return SiliconDied(f"the machine's process died of {name}", hint=hint)


# -- the child ---------------------------------------------------------------------------------


def _live(work: Callable[[], int], writing: int, parent: int) -> NoReturn:
    code: int = ExitCode.INTERNAL_ERROR
    try:
        die_with(parent)
        code = work()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        code = BROKEN_PIPE
    except UndervisorError as error:
        _tell(writing, type(error).__name__, error.message, error.hint)
    except BaseException as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        _tell(writing, "", f"{type(error).__name__}: {error}", "")
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _tell(writing: int, kind: str, message: str, hint: str) -> None:
    with contextlib.suppress(OSError):
        os.write(writing, json.dumps([kind, message, hint]).encode()[:_MOST_WORDS])


def _raise(told: list[str]) -> NoReturn:
    kind, message, hint = told
    known = getattr(errors, kind, None) if kind else None
    if known is not None and issubclass(known, UndervisorError):
        raise known(message, hint=hint)
    raise RuntimeError(message)


# -- the parent --------------------------------------------------------------------------------


def _await(pid: int, reading: int, limit: float | None) -> tuple[bytes, int]:
    """What the child told, and its wait status; Ctrl-C is passed on, and then not waited for."""
    words, deadline = b"", None if limit is None else time.monotonic() + limit
    handle = os.pidfd_open(pid)
    try:
        while True:
            try:
                words += _until_exit(handle, reading, deadline)
                return words, os.waitpid(pid, 0)[1]
            except KeyboardInterrupt:
                os.kill(pid, signal.SIGINT)
                deadline = time.monotonic() + _GRACE
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                if limit is None:
                    raise KeyboardInterrupt from None
                raise TimedOut(
                    "the time limit has passed, and the machine did not stop by itself"
                ) from None
    finally:
        os.close(handle)


def _until_exit(handle: int, reading: int, deadline: float | None) -> bytes:
    """What the child tells until it has exited; TimeoutError at the deadline."""
    words, open_ends = b"", [handle, reading]
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select(open_ends, [], [], left)
        if not ready:
            raise TimeoutError
        if reading in ready:
            piece = os.read(reading, 1 << 16)
            words += piece
            if not piece:
                open_ends = [handle]
        elif handle in ready:
            return words
