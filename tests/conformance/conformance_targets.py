"""Targets that misbehave, and one that answers as the probe does."""

import contextlib
import socket
import struct
import threading
import time

from undervisor.errors import TimedOut
from undervisor.guest.probe.program import program
from undervisor.guest.probe.protocol import SYNC, Frame, Kind
from undervisor.targets import Abilities, End, How

QUIET = End(How.STOPPED, "")
HELLO = Frame(Kind.HELLO, 0, struct.pack("<2I", program().build, 0)).encode()


class Machine:
    """A machine whose serial line is driven by a script in a thread."""

    def __init__(self, script, end):
        self.ours, self.theirs = socket.socketpair()
        self.end, self.stopped = end, threading.Event()
        self.thread = threading.Thread(target=self._live, args=(script,), daemon=True)
        self.thread.start()

    def _live(self, script):
        with self.theirs, contextlib.suppress(OSError):
            script(self)

    def send(self, data):
        try:
            self.ours.sendall(data)
        except OSError as error:
            raise EOFError(str(error)) from None

    def receive(self, timeout):
        self.ours.settimeout(max(timeout, 0.001))
        try:
            data = self.ours.recv(1 << 16)
        except TimeoutError:
            return b""
        if not data:
            raise EOFError("it has ended")
        return data

    def wait(self, timeout=None):
        self.thread.join(timeout)
        if self.thread.is_alive():
            raise TimedOut("it still runs")
        return self.end

    def stop(self):
        self.stopped.set()
        with contextlib.suppress(OSError):
            self.ours.shutdown(socket.SHUT_RDWR)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()
        self.ours.close()
        self.thread.join(5)
        assert not self.thread.is_alive(), "the machine was left running"


class Misbehaving:
    """A target of machines that do what `script` says."""

    name = "misbehaving"

    def __init__(self, script, end=QUIET, **abilities):
        self.script, self.end = script, end
        self.abilities = Abilities(frozenset({"vmx", "svm"}), 8, **abilities)
        self.started = []

    def start(self, job):
        machine = Machine(self.script, self.end)
        self.started.append(machine)
        return machine


def is_silent(machine):
    machine.stopped.wait(30)


def says_hello_and_hangs(machine):
    machine.theirs.sendall(HELLO)
    machine.stopped.wait(30)


def dies_at_once(machine):
    pass


def dies_at_the_first_request(machine):
    machine.theirs.sendall(HELLO)
    machine.theirs.recv(64)


def floods(machine):
    while not machine.stopped.is_set():
        machine.theirs.sendall(b"z" * 65536)


def speaks_rubbish(machine):
    machine.theirs.sendall(HELLO)
    machine.theirs.recv(64)
    machine.theirs.sendall(SYNC.to_bytes(4, "little") * 100_000)
    machine.theirs.sendall(b"SeaBIOS: no bootable device\r\n" * 60_000)
    machine.stopped.wait(30)


def sends_half_a_message(machine):
    machine.theirs.sendall(HELLO)
    data = machine.theirs.recv(1 << 16)
    word = struct.unpack_from("<I", data, 4)[0]
    answer = Frame(Kind.RESPONSE, word & 0xFFFF, bytes(100)).encode()
    machine.theirs.sendall(answer[:50])
    machine.stopped.wait(30)


def starts_again(machine):
    machine.theirs.sendall(HELLO)
    machine.theirs.recv(64)
    machine.theirs.sendall(HELLO)
    machine.stopped.wait(30)


def trickles(machine):
    while not machine.stopped.is_set():
        machine.theirs.sendall(b".")
        time.sleep(0.01)
