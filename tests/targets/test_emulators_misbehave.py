"""Emulators that hang, die, flood or lie: each is told as what it is, in time, and leaves nothing.

The emulators are programs that are started like QEMU.
"""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from target_guests import becomes, is_running, probe_job, read_all, stand_in

from undervisor.errors import BadInput, TimedOut
from undervisor.guest.probe.client import Batch, Probe, ProbeDied, ProbeSilent
from undervisor.guest.probe.program import program
from undervisor.guest.probe.protocol import Frame, Kind
from undervisor.targets import How
from undervisor.targets.process import Program
from undervisor.targets.qemu import QemuTarget

LIMIT = 1.0
HELLO = Frame(Kind.HELLO, 0, program().build.to_bytes(4, "little") + bytes(4)).encode()
SOME = Frame(Kind.RESPONSE, 1, bytes(64)).encode()


@pytest.fixture
def started(tmp_path):
    """Starts a stand-in; at the end of the test nothing of it is left."""
    runs = []

    def start(body):
        running = QemuTarget(binary=stand_in(tmp_path, body)).start(probe_job())
        runs.append(running)
        return running

    yield start
    for running in runs:
        folder = running._program.folder
        assert folder.exists()
        with running:
            pass
        assert not is_running(running.pid)
        assert not folder.exists()


def ask(running):
    """What a caller does: wait for the probe and ask it something."""
    probe = Probe(running, LIMIT)
    probe.wait_for_hello()
    batch = Batch()
    batch.cpuid(0)
    probe.run(batch)


SILENT = {
    "says nothing": "time.sleep(60)",
    "stops after the hello": f"line.sendall({HELLO!r}); time.sleep(60)",
    "closes the line and stays": "line.close(); time.sleep(60)",
    "sends half an answer": f"line.sendall({HELLO + SOME[:40]!r}); time.sleep(60)",
    "answers what was not asked": f"line.sendall({HELLO + 9 * SOME.replace(b'1', b'2')!r});"
    "time.sleep(60)",
    "stops itself": "os.kill(os.getpid(), 19)",
}
RUBBISH = {
    "floods": "while 1: line.sendall(bytes(1 << 16))",
    "speaks rubbish": "while 1: line.sendall(os.urandom(1 << 14))",
    "starts again and again": f"while 1: line.sendall({HELLO!r}); time.sleep(0.05)",
    "is another build": f"line.sendall({Frame(Kind.HELLO, 0, bytes(8)).encode()!r}); "
    "time.sleep(60)",
}
DEAD = {
    "dies at once": "os._exit(3)",
    "dies of a signal": "os.kill(os.getpid(), 11)",
    "dies in the middle of an answer": f"line.sendall({HELLO + SOME[:40]!r}); os._exit(3)",
}


@pytest.mark.parametrize("name", SILENT)
def test_one_that_is_silent_is_silent_in_time(started, name):
    running = started(SILENT[name])
    begin = time.monotonic()
    with pytest.raises(ProbeSilent):
        ask(running)
    assert time.monotonic() - begin < 4 * LIMIT + 5


@pytest.mark.parametrize("name", RUBBISH)
def test_one_that_talks_nonsense_is_no_probe(started, name):
    with pytest.raises(ProbeDied):
        ask(started(RUBBISH[name]))


@pytest.mark.parametrize("name", DEAD)
def test_one_that_dies_is_dead(started, name):
    running = started(DEAD[name])
    with pytest.raises(ProbeDied, match=r"machine (ended|is gone)"):
        ask(running)
    end = running.wait(20)
    assert end.how is How.TARGET_DIED
    assert "SIGSEGV" in end.text if "signal" in name else "status 3" in end.text


def test_its_last_words_are_the_reason(started):
    running = started("print('early'); print('qemu: no such thing', flush=True); os._exit(1)")
    end = running.wait(20)
    assert end.how is How.TARGET_DIED
    assert "no such thing" in end.text
    assert "early" in end.report


def test_words_without_end_are_read_and_their_end_is_kept(started):
    running = started(
        """
        for n in range(40000): print("word", n)
        sys.stdout.flush()
        os._exit(2)
        """
    )
    end = running.wait(30)
    assert "word 39999" in end.text
    assert len(end.report) <= 1 << 14


def test_a_status_before_the_guest_has_started_is_no_guests(started):
    assert started("os._exit(9)").wait(20).how is How.TARGET_DIED


def test_an_error_of_kvm_ends_the_run(started):
    running = started(
        """
        fd = next(int(a.rsplit("=", 1)[1]) for a in sys.argv if a.startswith("socket,id=monitor"))
        monitor = socket.socket(fileno=fd)
        print("KVM internal error. Suberror: 1", flush=True)
        monitor.sendall(b'{"event": "RESUME"}\\\\n{"event": "STOP"}\\\\n')
        time.sleep(60)
        """
    )
    end = running.wait(20)
    assert end.how is How.TARGET_DIED
    assert "Suberror: 1" in end.text


def test_what_came_before_the_end_can_be_received(started):
    running = started("line.sendall(b'x' * 100000); os._exit(5)")
    assert becomes(lambda: not is_running(running.pid))
    assert read_all(running) == b"x" * 100000


def test_sending_to_one_that_does_not_read_blocks_nobody(started):
    running = started("time.sleep(60)")
    begin = time.monotonic()
    running.send(bytes(4 << 20))
    assert running.receive(0.2) == b""
    assert time.monotonic() - begin < 5


def test_all_that_was_sent_arrives(started):
    running = started(
        """
        got = 0
        while got < 4 << 20: got += len(line.recv(1 << 16))
        line.sendall(str(got).encode())
        """
    )
    running.send(bytes(4 << 20))
    assert running.receive(20) == str(4 << 20).encode()


def test_sending_to_the_dead_is_the_end_of_the_stream(started):
    running = started("os._exit(5)")
    running.wait(20)
    with pytest.raises(EOFError):
        running.send(b"x")


def test_waiting_has_a_limit_and_the_machine_runs_on(started):
    running = started("while 1: line.sendall(bytes(1 << 16))")
    with pytest.raises(TimedOut):
        running.wait(0.3)
    running.stop()
    assert running.wait(20).how is How.STOPPED


def test_another_thread_can_stop_it(started):
    running = started("time.sleep(60)")
    threading.Timer(0.2, running.stop).start()
    assert running.wait(20).how is How.STOPPED


def test_what_it_started_itself_is_ended_too(tmp_path):
    binary = stand_in(tmp_path, "if os.fork() == 0: print(os.getpid(), flush=True)\ntime.sleep(60)")
    with QemuTarget(binary=binary).start(probe_job()) as running:
        deadline = time.monotonic() + 20
        while not running._words and time.monotonic() < deadline:
            running.receive(0.1)
        child = int(running._words)
        assert is_running(child)
    assert becomes(lambda: not is_running(child))


def test_an_exception_in_the_caller_ends_it(tmp_path):
    target = QemuTarget(binary=stand_in(tmp_path, "time.sleep(60)"))
    with pytest.raises(KeyboardInterrupt), target.start(probe_job()) as running:
        raise KeyboardInterrupt
    assert not is_running(running.pid)


PARENT = """
    import sys, time
    sys.path[:0] = {path!r}
    from target_guests import probe_job
    from undervisor.targets.qemu import QemuTarget
    running = QemuTarget(binary={binary!r}).start(probe_job())
    print(running.pid, running._program.folder, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_death_of_the_caller_ends_it_and_removes_its_folder(tmp_path, number):
    binary = stand_in(tmp_path, "time.sleep(60)")
    source = textwrap.dedent(PARENT).format(path=sys.path, binary=binary)
    with subprocess.Popen(
        [sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as caller:
        pid, folder = caller.stdout.readline().split()
        assert is_running(int(pid))
        caller.send_signal(number)
        caller.wait(20)
    assert becomes(lambda: not is_running(int(pid)) and not Path(folder).exists())


def test_a_program_that_cannot_start_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(OSError, match="nothing-here"):
        Program([str(tmp_path / "nothing-here")], {"file": b"x"})
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_is_not_installed_is_told_with_its_package(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BadInput, match="qemu-system-x86_64 is not installed") as caught:
        QemuTarget()
    assert "apt install qemu-system-x86" in caught.value.hint


def test_its_files_are_private(started):
    folder = started("time.sleep(60)")._program.folder
    assert os.stat(folder).st_mode & 0o777 == 0o700
