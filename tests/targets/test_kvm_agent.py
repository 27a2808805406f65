"""The agent, its words and both targets that speak them, on a stand-in for KVM."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from undervisor.errors import BadInput, TimedOut
from undervisor.guest.image import Image
from undervisor.guest.probe.program import program
from undervisor.targets import End, How, Job, bridge
from undervisor.targets.bridge import BridgeTarget
from undervisor.targets.kvm import agent as agent_module
from undervisor.targets.kvm import link as link_module
from undervisor.targets.kvm.archive import agent
from undervisor.targets.kvm.link import Link
from undervisor.targets.kvm.target import KvmTarget, SocketStream
from undervisor.targets.kvm.words import Word, answer, say

PROGRAM = Path(__file__).with_name("kvm_standin_agent.py")
SOURCE = Path(agent_module.__file__).parents[3]
JOB = Job(Image.parse(program().elf, "probe"), memory=16 << 20)


def command(guests):
    return (sys.executable, str(PROGRAM), guests)


def target(guests, **more):
    return KvmTarget(agent=command(guests), **more)


@contextlib.contextmanager
def an_agent(*argv):
    """A program that speaks on its standard input and output; the stream to it, the process."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(argv, stdin=theirs, stdout=theirs, start_new_session=True)
    try:
        with ours:
            yield SocketStream(ours), process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def receive_all(running, wanted):
    data = b""
    while len(data) < len(wanted):
        piece = running.receive(20)
        assert piece, f"only {data!r}"
        data += piece
    return data


# -- one machine -------------------------------------------------------------------------------


def test_a_guest_speaks_and_ends():
    with target("says").start(JOB) as running:
        assert receive_all(running, b"hello\n") == b"hello\n"
        assert running.wait(20) == End(How.FINISHED, "write to the debug exit port", 9)
        with pytest.raises(EOFError):
            running.receive(1)
        with pytest.raises(EOFError):
            running.send(b"x")


def test_what_is_sent_comes_back():
    with target("echo").start(JOB) as running:
        text = b"0123456789" * 300 + b"."
        running.send(text)
        assert receive_all(running, text) == text
        assert running.wait(20).how is How.FINISHED


def test_a_process_that_dies_is_how_the_run_ended():
    with target("crashes").start(JOB) as running:
        assert running.wait(20) == End(How.TARGET_DIED, "the machine's process died of SIGSEGV")


def test_a_machine_that_waits_for_what_cannot_come_is_idle():
    with target("halts").start(Job(JOB.image, 2, JOB.memory)) as running:
        assert running.wait(20).how is How.IDLE


def test_waiting_has_a_limit_and_stopping_none():
    with target("sleeps").start(JOB) as running:
        assert running.receive(0.1) == b""
        with pytest.raises(TimedOut, match=r"after 0\.2 seconds"):
            running.wait(0.2)
        running.stop()
        assert running.wait(0) == End(How.STOPPED, "stopped by the caller")


def test_a_flood_can_be_stopped():
    with target("floods").start(JOB) as running:
        assert running.receive(20).startswith(b"flood")
        time.sleep(0.3)  # nobody listens, and everything on the way fills up
        running.stop()
        assert running.wait(1).how is How.STOPPED


def test_another_thread_may_stop_it():
    with target("sleeps").start(JOB) as running:
        threading.Timer(0.2, running.stop).start()
        begin = time.monotonic()
        with pytest.raises(EOFError):
            running.receive(20)
        assert time.monotonic() - begin < 10


def test_a_processor_that_does_not_come_back_is_killed(monkeypatch):
    monkeypatch.setattr(bridge, "ANSWER_TIME", 0.5)
    with target("hangs").start(JOB) as running:
        assert receive_all(running, b"last words\n") == b"last words\n"
        with pytest.raises(TimedOut, match="no answer"):
            running.registers()
        running.stop()
        assert running.wait(0).how is How.STOPPED


def test_leaving_early_leaves_nothing():
    with target("sleeps").start(JOB) as running:
        group = running.pid
        assert running.receive(0.1) == b""
    with pytest.raises(ProcessLookupError):
        os.killpg(group, 0)


def test_an_agent_that_is_killed_is_how_the_run_ended():
    with target("sleeps").start(JOB) as running:
        os.kill(running.pid, signal.SIGKILL)
        end = running.wait(20)
    assert end.how is How.TARGET_DIED
    assert "out of reach" in end.text


def children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_the_machine_ends_with_its_agent():
    with target("sleeps").start(JOB) as running:
        running.registers()
        (child,) = children(running.pid)
        os.kill(running.pid, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while Path(f"/proc/{child}").exists() and "Z" not in _state(child):
            assert time.monotonic() < deadline, "the machine's process lives on"
            time.sleep(0.02)


def _state(pid):
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return "Z"


# -- what it can be asked ----------------------------------------------------------------------


def test_registers_and_nested_state_go_over_the_line():
    with target("sleeps").start(JOB) as running:
        in_l2, registers = running.registers()
        assert (in_l2, registers["rip"]) == (False, JOB.place().boot.eip)
        running.set_registers({"rax": 77})
        assert running.registers()[1]["rax"] == 77
        blob = running.nested_state()
        assert len(blob) == 128
        running.set_nested_state(blob[:8] + b"\0\0\x41" + blob[11:])
        assert running.nested_state()[8:11] == b"\0\0\x41"
        with pytest.raises(BadInput, match="Invalid argument") as refused:
            running.set_nested_state(blob[:64])
        assert "undervisor state" in refused.value.hint
        with pytest.raises(BadInput, match="no vCPU 5"):
            running.registers(5)


def test_l2s_state_is_seen_refused_and_reported():
    with target("l2", interrupt_every=0.01).start(JOB) as running:
        running.receive(20)
        assert running.registers()[0]
        with pytest.raises(BadInput, match="in L2"):
            running.set_registers({"rax": 1})
        running.stop()
        assert "exits carried L2's state" in running.wait(1).report


def test_a_machine_that_has_ended_answers_nothing():
    with target("says").start(JOB) as running:
        running.wait(20)
        with pytest.raises(BadInput, match="has ended"):
            running.registers()


# -- what is refused ---------------------------------------------------------------------------


def test_without_kvm_it_says_so_before_anything_starts():
    with pytest.raises(BadInput, match="No such file") as refused:
        target("none").start(JOB)
    assert "load kvm_intel" in refused.value.hint


def test_more_processors_than_kvm_has_are_refused_by_name():
    with pytest.raises(BadInput, match="9 processors: this KVM can have 1 to 8"):
        target("sleeps").start(Job(JOB.image, 9, JOB.memory))


def test_it_has_no_cpu_models():
    with pytest.raises(BadInput, match="'intel'"):
        KvmTarget("intel")


def test_an_image_that_does_not_fit_is_refused():
    with pytest.raises(BadInput, match="not in RAM"):
        target("sleeps").start(Job(JOB.image, memory=1 << 20))


def test_a_program_that_is_no_agent_is_quoted(monkeypatch):
    monkeypatch.setattr(link_module, "OPEN_TIME", 1.0)
    with pytest.raises(BadInput, match="no agent answers within 1 s; last heard: login:"):
        KvmTarget(agent=("/bin/sh", "-c", "echo login:; sleep 5")).start(JOB)


def test_a_program_that_ends_at_once_is_no_agent():
    with pytest.raises(BadInput, match="the agent is gone"):
        KvmTarget(agent=("/bin/true",)).start(JOB)


class Played:
    """A stream that has already said everything."""

    def __init__(self, *frames):
        self.frames = list(frames)

    def send(self, data):
        pass

    def receive(self, timeout):
        return self.frames.pop(0) if self.frames else b""


def test_an_agent_of_another_version_is_refused():
    words = answer(json.dumps({"version": 0, "facts": {}}).encode())
    with pytest.raises(BadInput, match="version 0, not 1"):
        Link(Played(say(Word.FACTS, 0, words))).open()


# -- many machines over one line ---------------------------------------------------------------


def test_many_machines_run_one_after_the_other():
    with an_agent(*command("says")) as (stream, _):
        over = BridgeTarget(stream, "lab", patience=15)
        assert over.name == "lab"
        assert over.abilities.vendors == {"svm"}
        assert (over.abilities.at_once, over.abilities.patience) == (1, 15)
        assert "sse2" in over.abilities.features
        for _ in range(3):
            with over.start(JOB) as running:
                assert receive_all(running, b"hello\n") == b"hello\n"
                assert running.wait(20).status == 9


def test_a_start_ends_the_machine_before_it():
    with an_agent(*command("echo")) as (stream, process):
        over = BridgeTarget(stream)
        first = over.start(JOB)
        second = over.start(JOB)
        assert first.wait(1).how is How.STOPPED
        second.send(b"x.")
        assert receive_all(second, b"x.") == b"x."
        assert second.wait(20).how is How.FINISHED
        assert children(process.pid) == []


def test_a_crash_leaves_the_agent_ready_for_the_next():
    with an_agent(*command("crashes")) as (stream, _):
        over = BridgeTarget(stream)
        for _ in range(2):
            with over.start(JOB) as running:
                assert running.wait(20).text == "the machine's process died of SIGSEGV"


def test_the_agent_ends_with_its_line():
    with an_agent(*command("sleeps")) as (stream, process):
        BridgeTarget(stream).start(JOB).registers()
        stream._connection.close()
        assert process.wait(20) == 0


def test_an_agent_that_is_gone_starts_nothing():
    with an_agent(*command("says")) as (stream, process):
        over = BridgeTarget(stream)
        assert over.facts.most_cpus == 8
        assert over.alive
        process.kill()
        process.wait()
        with pytest.raises(BadInput, match="the agent is gone"):
            over.start(JOB)
        assert not over.alive


def test_words_on_the_line_before_the_first_frame_do_no_harm():
    with an_agent(*command("says")) as (stream, _):
        stream.send(b"\r\nwelcome\r\n" + say(Word.OPEN, 0)[:9])
        with BridgeTarget(stream).start(JOB) as running:
            assert running.wait(20).status == 9


# -- the agent as a file -----------------------------------------------------------------------


def test_the_file_needs_nothing_but_python(tmp_path):
    path = tmp_path / "agent.pyz"
    path.write_bytes(agent())
    with an_agent(sys.executable, "-I", "-S", str(path)) as (stream, _):
        stream.send(say(Word.OPEN, 0))
        payload = b""
        link = Link(stream)
        while not payload:
            payload = b"".join(f.payload for f in link.take(20) if f.kind == Word.FACTS)
    # With KVM here or without: either is an answer.
    assert payload[:1] == b"\0" or b"/dev/kvm" in payload


def test_the_same_sources_give_the_same_file():
    program_text = "from undervisor.targets.kvm.archive import agent; import sys, hashlib; "
    program_text += "print(hashlib.sha256(agent()).hexdigest())"
    sums = {
        subprocess.check_output(
            [sys.executable, *more, "-c", program_text], env=os.environ | {"PYTHONHASHSEED": seed}
        )
        for more, seed in (((), "1"), (("-X", "utf8"), "2"))
    }
    assert len(sums) == 1


def test_each_source_in_the_file_has_its_bytecode(tmp_path):
    path = tmp_path / "agent.pyz"
    path.write_bytes(agent())
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist()) - {"__main__.py"}
    sources = {name for name in names if name.endswith(".py")}
    assert names - sources == {f"{name}c" for name in sources}
    assert "undervisor/targets/kvm/agent.py" in sources
    assert all((SOURCE / name).exists() for name in sources)


def test_on_a_terminal_line_it_says_when_the_line_is_raw():
    ours, theirs = os.openpty()
    path = os.ttyname(theirs)
    process = subprocess.Popen([*command("says"), path], start_new_session=True)
    try:
        said = b""
        while not said.endswith(agent_module.READY):
            assert select.select([ours], [], [], 20)[0], f"only {said!r}"
            said += os.read(ours, 1)
        assert said == agent_module.READY
        os.write(ours, say(Word.OPEN, 0))
        facts = b""
        while b'"version"' not in facts:  # a line that is not raw would show the question first
            assert select.select([ours], [], [], 20)[0], f"only {facts!r}"
            facts += os.read(ours, 4096)
        assert facts[:4] == say(Word.OPEN, 0)[:4]
        assert facts[:12] != say(Word.OPEN, 0)[:12]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(ours)
        os.close(theirs)
