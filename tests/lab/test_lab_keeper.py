"""The keeper: streams are handed on, and nothing outlives the one that wanted the lab."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from undervisor.errors import BadInput
from undervisor.host.fact import Known, Unknown
from undervisor.lab import places
from undervisor.lab.host import LabHost, connect, open_level, running
from undervisor.lab.keeper import READY, STAY
from undervisor.lab.places import PLAN, Place
from undervisor.lab.stack import Lab, end

STREAMS = ["console.l1", "shell.l1", "control.l1", "agent.l1"]

# In QEMU's place: listens where QEMU would.  The console repeats a line, a real `sh` is behind the
# shell, `off` on the control line ends it, another word there kills what the shell does.
STAND_IN = """
import os, select, signal, socket, subprocess, sys
lines = {}
for name in sys.argv[1:]:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(name + ".qemu")
    listener.listen()
    lines[name] = listener
lines = {name: listener.accept()[0] for name, listener in lines.items()}
def shell():
    return subprocess.Popen(["sh"], stdin=lines["shell.l1"], stdout=lines["shell.l1"],
                            stderr=subprocess.DEVNULL, start_new_session=True)
child = shell()
lines["console.l1"].sendall(b"booted\\n")
while True:
    heard = [lines[name] for name in ("console.l1", "control.l1", "agent.l1")]
    ready, _, _ = select.select(heard, [], [])
    for line in ready:
        data = line.recv(65536)
        if line is not lines["control.l1"]:
            line.sendall(data)
            continue
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        if data == b"off\\n":
            sys.exit(0)
        child = shell()
        line.sendall(b"again\\n")
"""


@pytest.fixture(autouse=True)
def runtime(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def start(runtime):
    """Start a keeper with the stand-in; whatever is left is killed at the end."""
    started = []

    def make(name="lab", command=(sys.executable, "-c", STAND_IN, *STREAMS)):
        place = Place.named(name)
        place.folder.mkdir(mode=0o700, exist_ok=True)
        about = {"depth": 2, "cpus": 1, "accelerator": "tcg"}
        plan = {"command": list(command), "streams": STREAMS, "about": about}
        (place.folder / PLAN).write_text(json.dumps(plan))
        keeper = subprocess.Popen(
            [sys.executable, "-m", "undervisor.lab.keeper", str(place.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        started.append(keeper)
        return place, keeper

    yield make
    for keeper in started:
        keeper.kill()
        keeper.wait()
        keeper.stdin.close()
        keeper.stdout.close()


def children(pid):
    with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]
    return []


def gone(pids, seconds=10):
    deadline = time.monotonic() + seconds
    while any(alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def is_free(place, seconds=10):
    """The lock goes with the last thread, which may end behind the one that counts as dead."""
    deadline = time.monotonic() + seconds
    while place.runs() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not place.runs()


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def ready(keeper):
    assert keeper.stdout.readline() == READY
    return children(keeper.pid)


def test_streams_are_handed_on(start):
    place, keeper = start()
    ready(keeper)
    with connect(place, "agent.l1") as line:
        line.sendall(b"to the agent")
        assert line.recv(100) == b"to the agent"
    with connect(place, "console.l1") as late:
        assert late.recv(100) == b"booted\n"
    assert place.log("console.l1").read_bytes() == b"booted\n"


def test_a_console_is_for_everybody(start):
    place, keeper = start()
    ready(keeper)
    with connect(place, "console.l1") as one, connect(place, "console.l1") as other:
        for line in (one, other):
            assert line.recv(100) == b"booted\n"
        one.sendall(b"typed")
        assert one.recv(100) == other.recv(100) == b"typed"


def test_a_stream_has_one_user_at_a_time(start):
    place, keeper = start()
    ready(keeper)
    with connect(place, "agent.l1") as one, connect(place, "agent.l1") as other:
        one.sendall(b"first")
        assert one.recv(100) == b"first"
        other.sendall(b"second")
        other.settimeout(0.3)
        with pytest.raises(TimeoutError):
            other.recv(100)
        one.close()
        other.settimeout(10)
        assert other.recv(100) == b"second"


def test_a_level_is_a_machine_to_look_at(start):
    place, keeper = start()
    ready(keeper)
    host = LabHost(place, 1)
    try:
        fact = host.run(["echo", "a  b"])
        assert isinstance(fact, Known)
        assert fact.value.stdout == "a  b\n"
        assert isinstance(host.read_text("/proc/version"), Known)
    finally:
        host.close()


def test_a_command_that_does_not_end_is_killed_and_the_next_is_answered(start):
    place, keeper = start()
    ready(keeper)
    host = LabHost(place, 1)
    try:
        fact = host.execute("sleep 100", 0.3, 100)
        assert isinstance(fact, Unknown)
        assert fact.code == "ETIMEDOUT"
        assert host.execute("echo again", 10, 100).value == (0, b"again\n", b"")
    finally:
        host.close()


def test_who_waits_for_a_shell_does_not_disturb_its_user(start):
    place, keeper = start()
    ready(keeper)
    user, other = LabHost(place, 1), LabHost(place, 1)
    try:
        before = user.execute("echo $$", 10, 100)
        fact = other.execute("true", 0.3, 100)
        assert isinstance(fact, Unknown)
        assert "somebody else" in fact.why
        assert user.execute("echo $$", 10, 100) == before
    finally:
        user.close()
        other.close()


def test_nothing_is_left_when_the_one_who_wanted_it_is_gone(start):
    place, keeper = start()
    machine = ready(keeper)
    assert machine
    keeper.stdin.close()  # as the kernel does for a process that was killed
    assert gone([keeper.pid, *machine])
    assert is_free(place)
    assert not list(place.folder.glob("*.sock"))


def test_a_lab_that_shall_stay_stays(start):
    place, keeper = start()
    ready(keeper)
    keeper.stdin.write(STAY)
    keeper.stdin.close()
    time.sleep(0.3)
    assert place.runs()
    assert end(place)
    assert gone([keeper.pid])
    assert not place.folder.exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_machine_ends_with_its_keeper(start, number):
    place, keeper = start()
    machine = ready(keeper)
    os.kill(keeper.pid, number)
    assert gone([keeper.pid, *machine])
    assert is_free(place)


def test_the_keeper_ends_with_its_machine(start):
    _, keeper = start()
    (machine,) = ready(keeper)
    os.kill(machine, signal.SIGKILL)
    assert keeper.wait(10) == 0


def test_a_machine_that_does_not_start_ends_the_keeper(start):
    place, keeper = start(command=(sys.executable, "-c", "raise SystemExit('no such machine')"))
    assert keeper.stdout.readline() == b""
    assert keeper.wait(10) == 0
    assert "no such machine" in (place.folder / places.LOG).read_text()


def test_a_lab_runs_once(start):
    place, keeper = start()
    ready(keeper)
    with pytest.raises(BadInput, match="runs already"):
        place.hold()
    with pytest.raises(BadInput, match="runs already"):
        Lab(name="lab")._new_place()


def test_a_crashed_lab_does_not_run_and_makes_room(start):
    place, keeper = start()
    machine = ready(keeper)
    keeper.kill()
    assert gone([keeper.pid, *machine])
    keeper.wait()
    assert place.keeper() is None
    with pytest.raises(BadInput, match="does not run"):
        running("lab")
    assert Lab(name="lab")._new_place().folder.exists()


def test_a_keeper_is_known_by_number_and_start(start):
    place, keeper = start()
    ready(keeper)
    assert place.keeper() == keeper.pid
    place.write({**place.record(), "started": place.record()["started"] - 1})
    assert place.keeper() is None


def test_levels_are_found_by_name(start):
    _, keeper = start("other")
    ready(keeper)
    host = open_level("lab:other/l1")
    assert host.name == "L1 of other"
    host.close()
    for wrong in ("lab:other/l3", "lab:other/", "lab:other/x", "lab:l1", "lab:../l1"):
        with pytest.raises(BadInput):
            open_level(wrong)


def test_a_folder_that_is_open_to_others_is_refused(runtime):
    (runtime / "undervisor").mkdir()
    (runtime / "undervisor").chmod(0o777)
    with pytest.raises(BadInput, match="open to others"):
        places.labs_folder()


def test_a_socket_of_nobody_is_told(runtime):
    with pytest.raises(OSError, match="No such file"):
        connect(Place.named("nowhere"), "shell.l1")


def test_a_lab_whose_folder_was_removed_still_ends(start):
    place, keeper = start()
    machine = ready(keeper)
    lab = Lab(name="lab")
    lab._place, lab._keeper = place, keeper
    shutil.rmtree(place.folder)
    lab.close()
    assert gone([keeper.pid, *machine])
