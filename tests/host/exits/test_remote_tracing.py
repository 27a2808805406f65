"""Tracing through a shell: a local `sh`, and a tracefs that is a folder with a pipe."""

import contextlib
import os
import threading
import time
from pathlib import Path

import pytest

from undervisor.errors import BadInput
from undervisor.host.access.agent import AgentHost
from undervisor.host.access.live import LiveHost
from undervisor.host.access.ssh import SshHost
from undervisor.host.exits import remote
from undervisor.host.exits.attribute import Attribution, Whose
from undervisor.host.exits.trace import TRACEPOINTS, parse

LINE = "     CPU 0/KVM-41    [002] d..1. 100.5: {event}: vcpu 0 reason CPUID rip 0x1000\n"
EVENTS = ("kvm_exit", "kvm_nested_vmexit", "kvm_entry")

# What a kernel does in a new folder of tracefs: mkdir fills it, rmdir empties it.
MKDIR = """#!/bin/sh
/bin/mkdir "$1" || exit 1
for event in {events}; do
    /bin/mkdir -p "$1/events/kvm/$event"
    echo 0 >"$1/events/kvm/$event/enable"
done
mkfifo "$1/trace_pipe"
"""
RMDIR = """#!/bin/sh
/bin/cp -r "$1/events" "{seen}"
/bin/rm -r "$1"
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A host behind `sh` and the folder of its tracefs."""
    place = tmp_path / "tracefs"
    (place / "instances").mkdir(parents=True)
    (place / "events/kvm").mkdir(parents=True)
    tools = tmp_path / "tools"
    tools.mkdir()
    events = " ".join(TRACEPOINTS[:-1])  # an old kernel without the last one
    scripts = {"mkdir": MKDIR.format(events=events), "rmdir": RMDIR.format(seen=tmp_path / "seen")}
    for name, text in scripts.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    monkeypatch.setattr(remote, "TRACEFS", (str(tmp_path / "no"), str(place)))
    host = SshHost("there", ["env", f"PATH={tools}:{os.environ['PATH']}", "sh"])
    yield host, place
    host.close()


def processes(word):
    """The processes with `word` on their command lines."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word.encode() in entry.read_bytes():
                found.append(entry.parent.name)
    return found


def wait_until(holds):
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_events_are_counted_as_they_come_and_nothing_is_left(machine, tmp_path):
    host, folder = machine
    attribution = Attribution()
    with remote.instance(host, remote.tracefs(host), 1) as place:
        assert os.path.dirname(place) == str(folder / "instances")

        def kernel():
            with open(f"{place}/trace_pipe", "w") as pipe:
                for event in EVENTS * 500:
                    pipe.write(LINE.format(event=event).replace("\n", " " + "x" * 300 + "\n"))

        writer = threading.Thread(target=kernel)
        writer.start()
        for lines in remote.lines(host, place, 1):
            attribution.feed(parse(lines))
        writer.join()
        assert processes(place)
    assert attribution.finish().counts[Whose.L2_TO_L0] == {"CPUID": 500}
    assert os.listdir(folder / "instances") == []
    for name in TRACEPOINTS[:-1]:
        assert (tmp_path / "seen/kvm" / name / "enable").read_text() == "1\n"
    assert not (tmp_path / "seen/kvm" / TRACEPOINTS[-1]).exists()
    wait_until(lambda: processes(place) == [])


def test_a_connection_that_ends_leaves_a_watchdog(machine, monkeypatch):
    host, folder = machine
    monkeypatch.setattr(remote, "_WATCHDOG_SECONDS", 1)
    with remote.instance(host, str(folder), 0) as place:
        host.close()
        monkeypatch.setattr(host, "_command", ["false"])  # there is no way back
    assert os.path.exists(place)
    wait_until(lambda: not os.path.exists(place))


def test_a_connection_that_breaks_is_told(machine):
    host, folder = machine
    with remote.instance(host, str(folder), 1) as place:
        reader = remote.lines(host, place, 1)
        pipe = os.open(f"{place}/trace_pipe", os.O_RDWR)
        os.write(pipe, LINE.format(event="kvm_exit").encode() * 200)
        next(reader)
        host._process.kill()
        with pytest.raises(BadInput, match="broke off"):
            list(reader)
        os.close(pipe)


def test_tracing_that_is_interrupted_leaves_nothing(machine):
    host, folder = machine
    with remote.instance(host, str(folder), 60) as place:
        reader = remote.lines(host, place, 60)
        pipe = os.open(f"{place}/trace_pipe", os.O_RDWR)
        os.write(pipe, LINE.format(event="kvm_exit").encode() * 200)
        next(reader)
        reader.close()
        os.close(pipe)
    assert os.listdir(folder / "instances") == []
    wait_until(lambda: processes(place) == [])


def test_a_line_without_end_costs_little_memory():
    class Endless(SshHost):
        def follow(self, script, timeout):
            return iter([b"x" * 1000] * 1000 + [b"\n" + LINE.format(event="kvm_exit").encode()])

    batches = list(remote.lines(Endless("there", ["sh"]), "/x", 1))
    assert sum(len(line) for lines in batches for line in lines) < 10_000
    assert [record.reason for record in parse(batches[-1])] == ["CPUID"]


def test_without_tracepoints_the_way_to_them_is_told(machine, monkeypatch):
    monkeypatch.setattr(remote, "TRACEFS", ("/no/such",))
    with pytest.raises(BadInput, match="shows no KVM tracepoints"):
        remote.tracefs(machine[0])


def test_a_tracefs_that_refuses_names_the_machine(machine):
    with (
        pytest.raises(BadInput, match=r"cannot trace on there: .*No such file"),
        remote.instance(machine[0], "/no/such", 1),
    ):
        pass


@pytest.mark.parametrize("host", [LiveHost(), AgentHost("guest")])
def test_a_machine_that_gives_no_stream_is_bad_input(host):
    with pytest.raises(BadInput, match=r"no shell to trace through|before a command has ended"):
        list(remote.lines(host, "/sys/kernel/tracing/instances/x", 1))
