"""Trace KVM's events now, in a tracing instance of our own that is removed at the end."""

from __future__ import annotations

import contextlib
import os
import selectors
import time
from collections.abc import Iterator

from undervisor.errors import BadInput
from undervisor.host.exits.trace import TRACEPOINTS

TRACEFS = ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")


def tracefs() -> str:
    """Where tracefs is mounted; BadInput where it is not, or not for this user."""
    for folder in TRACEFS:
        if os.path.isdir(f"{folder}/events/kvm"):
            return folder
    if os.geteuid():
        raise BadInput("tracing needs root", hint="sudo undervisor exits; or give a recorded trace")
    raise BadInput(
        "this kernel shows no KVM tracepoints",
        hint="mount -t tracefs nodev /sys/kernel/tracing; the kernel needs CONFIG_FTRACE and KVM",
    )


@contextlib.contextmanager
def instance(folder: str) -> Iterator[str]:
    """A tracing instance with KVM's events switched on; others' tracing is not disturbed."""
    place = f"{folder}/instances/undervisor-{os.getpid()}"
    try:
        os.mkdir(place)
    except OSError as error:
        raise BadInput(f"cannot trace in {folder}: {error.strerror}", hint="run as root") from error
    try:
        for name in TRACEPOINTS:
            switch = f"{place}/events/kvm/{name}/enable"
            if os.path.exists(switch):
                with open(switch, "w") as file:
                    file.write("1")
        yield place
    finally:
        with contextlib.suppress(OSError):
            os.rmdir(place)


def lines(place: str, seconds: float) -> Iterator[list[str]]:
    """What trace_pipe says within `seconds`, in batches of whole lines."""
    deadline = time.monotonic() + seconds
    number = os.open(f"{place}/trace_pipe", os.O_RDONLY | os.O_NONBLOCK)
    rest = ""
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(number, selectors.EVENT_READ)
            while (left := deadline - time.monotonic()) > 0:
                if not selector.select(min(left, 0.5)):
                    yield []
                    continue
                with contextlib.suppress(BlockingIOError):
                    text = rest + os.read(number, 1 << 18).decode("utf-8", "replace")
                    *whole, rest = text.split("\n")
                    yield whole
    finally:
        os.close(number)
