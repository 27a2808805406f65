"""QEMU with media of its own, for what its target does not start from."""

import contextlib
import shutil
import socket
import time

import pytest

from undervisor.targets.bochs import BIOS
from undervisor.targets.emulator import EmulatorRunning
from undervisor.targets.process import Program
from undervisor.targets.qemu import judge

needs_qemu = pytest.mark.skipif(
    not shutil.which("qemu-system-x86_64"), reason="no qemu-system-x86_64"
)
needs_bochs = pytest.mark.skipif(
    not (shutil.which("bochs-bin") and BIOS.exists()), reason="no bochs or no BIOS for it"
)


@contextlib.contextmanager
def qemu(options, files, cpu="EPYC,+svm", memory=32):
    """QEMU's TCG with these options and the files that they name."""
    ours, theirs = socket.socketpair()
    command = ["qemu-system-x86_64", "-accel", "tcg", "-cpu", cpu, "-m", str(memory)]
    command += ["-nodefaults", "-no-reboot", "-display", "none", *options]
    command += ["-chardev", f"socket,id=line,fd={theirs.fileno()}", "-serial", "chardev:line"]
    with theirs:
        program = Program(command, files, [theirs])
    with EmulatorRunning(program, ours, judge) as running:
        yield running


def read_all(running, timeout=20):
    """Everything that the guest sends until its end."""
    data, deadline = b"", time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            data += running.receive(1)
        except EOFError:
            return data
    raise AssertionError(f"still running, after {data[-200:]!r}")
