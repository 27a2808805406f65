"""`undervisor run` on a terminal: keys go to the guest at once, and the terminal is given back."""

import os
import pty
import select
import signal
import subprocess
import termios
import time

import pytest
from guests import ECHO, SPIN, command, image


class Terminal:
    """A pseudo-terminal with a program in its foreground."""

    def __init__(self, path):
        self.ours, theirs = pty.openpty()
        self.before = termios.tcgetattr(theirs)
        self.process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", *command("run", path, "--no-summary")],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        self.theirs = theirs
        self.seen = b""

    def wait_for(self, text, seconds=30):
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.ours], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"no {text!r} in {self.seen!r}"
            self.seen += os.read(self.ours, 4096)

    def keys(self, data):
        os.write(self.ours, data)

    def close(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        os.close(self.ours)
        os.close(self.theirs)


@pytest.fixture
def terminal(tmp_path):
    opened = []

    def start(body):
        path = tmp_path / "guest.elf"
        path.write_bytes(image("mov $0x3f8, %dx; mov $10, %al; out %al, %dx;" + body))
        opened.append(Terminal(path))
        opened[-1].wait_for(b"\n")
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_a_key_reaches_the_guest_without_a_return_and_without_an_echo(terminal):
    found = terminal(ECHO)
    found.seen = b""
    found.keys(b"q")
    found.wait_for(b"q")
    time.sleep(0.2)
    found.keys(b".")
    assert found.process.wait(30) == 1
    assert found.seen.count(b"q") == 1


def test_the_terminal_is_as_it_was_after_the_run(terminal):
    found = terminal(ECHO)
    assert termios.tcgetattr(found.theirs) != found.before
    found.keys(b".")
    assert found.process.wait(30) == 1
    assert termios.tcgetattr(found.theirs) == found.before


def test_control_c_ends_the_run_and_gives_the_terminal_back(terminal):
    found = terminal(SPIN)
    found.keys(b"\x03")
    assert found.process.wait(30) == 130
    assert termios.tcgetattr(found.theirs) == found.before
