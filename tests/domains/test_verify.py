import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from undervisor.domains.console import ConsoleHost
from undervisor.domains.nested_proof import PYTHON, prove
from undervisor.domains.verify import STEPS, Verdict, verify
from undervisor.errors import BadInput
from undervisor.host.access.protocol import Output
from undervisor.host.access.recorded import RecordedHost
from undervisor.host.access.ssh import SshHost
from undervisor.host.fact import Absent, Denied, Known, Unknown

HOSTS = Path(__file__).parent.parent / "hosts"


class Prover(RecordedHost):
    """A recorded machine where the nested guest ends as told."""

    def __init__(self, name, *answers):
        super().__init__(str(HOSTS / name))
        self.answers = list(answers)

    def run(self, argv, timeout=10.0):
        if list(argv[:2]) in (["python3", "-c"], ["sh", "-c"]):
            return self.answers.pop(0)
        return super().run(argv, timeout)


def ended(status, out="", err=""):
    return Known(Output(status, out, err), "a command")


GOOD = ended(0, "port 0xf4 value 42\n")
NO_PYTHON = Absent("python3")


def steps(name, *answers):
    found = verify(Prover(name, *answers))
    return found, {step.id: step.verdict for step in found.steps}


@pytest.mark.parametrize(
    ("answers", "verdict"),
    [
        ([GOOD], Verdict.GOOD),
        ([ended(0, "exit 9 detail 0x80000021\n")], Verdict.BAD),
        (
            [ended(1, "", "PermissionError: [Errno 13] Permission denied\n")],
            Verdict.BAD,
        ),
        ([Unknown("python3", "no answer within 60 s", code="ETIMEDOUT")], Verdict.UNKNOWN),
        ([NO_PYTHON, ended(0, "L2")], Verdict.GOOD),
        (
            [ended(1, "", "ModuleNotFoundError: No module named 'ctypes'"), ended(0, "L2\n")],
            Verdict.GOOD,
        ),
        ([NO_PYTHON, ended(1, "", "failed to initialize kvm: No such device")], Verdict.BAD),
        ([NO_PYTHON, ended(0, "")], Verdict.BAD),
        ([NO_PYTHON, ended(124)], Verdict.BAD),
        ([NO_PYTHON, ended(127)], Verdict.UNKNOWN),
        ([NO_PYTHON, Absent("sh -c a long script")], Verdict.UNKNOWN),
        ([NO_PYTHON, Denied("sh")], Verdict.UNKNOWN),
    ],
)
def test_only_a_guest_that_ran_is_proof(answers, verdict):
    found, verdicts = steps("intel-l1-passthrough", *answers)
    assert verdicts["nested-guest"] is verdict
    assert found.good is (verdict is Verdict.GOOD)
    assert found.as_json()["verified"] is found.good
    assert "script" not in found.steps[-1].evidence


@pytest.mark.parametrize(
    ("name", "step", "verdict"),
    [
        ("intel-l1-passthrough", "flags", Verdict.GOOD),
        ("intel-l1-passthrough", "below", Verdict.GOOD),
        ("intel-l1-passthrough", "module", Verdict.GOOD),
        ("intel-l1-passthrough", "device", Verdict.GOOD),
        ("amd-l1-host-model", "flags", Verdict.BAD),
        ("intel-module-not-loaded", "module", Verdict.BAD),
        ("intel-nested-off", "nested-parameter", Verdict.NOTE),
        ("tcg-l1", "below", Verdict.NOTE),
        ("ci-runner-device-denied", "device", Verdict.BAD),
        ("unreadable", "flags", Verdict.UNKNOWN),
        ("software-kvm", "module", Verdict.NOTE),
    ],
)
def test_each_step_says_what_it_saw(name, step, verdict):
    found, verdicts = steps(name, GOOD)
    assert verdicts[step] is verdict
    assert list(verdicts) == [s[0] for s in STEPS] + ["nested-guest"]
    assert all(s.evidence for s in found.steps)


def test_the_proof_is_a_program_that_python_takes():
    compile(PYTHON, "proof", "exec")


def test_the_proof_fails_where_there_is_no_kvm(tmp_path):
    """The true scripts, in a shell whose /dev is empty; QEMU must not emulate instead."""
    if os.geteuid() != 0:
        pytest.skip("mounts need root")
    hide = f"! [ -e /dev/kvm ] || mount --bind {tmp_path}/none /dev/kvm; exec sh"
    (tmp_path / "none").touch()
    host = SshHost("empty", ["unshare", "--mount", "sh", "-c", hide])
    fact = prove(host)
    host.close()
    assert isinstance(fact, Known)
    assert not fact.value.ran


class Terminal:
    """A real terminal with a shell on it, as a guest's console is."""

    def __init__(self, *argv):
        self.master, slave = pty.openpty()
        ends = {"stdin": slave, "stdout": slave, "stderr": slave}
        self.process = subprocess.Popen(
            argv, **ends, start_new_session=True, env={**os.environ, "PS1": "# "}
        )
        os.close(slave)

    def send(self, data):
        return os.write(self.master, data)

    def recv(self, size):
        try:
            return os.read(self.master, size)
        except OSError:
            return b""

    def close(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def console():
    terminal = Terminal("sh", "-i")
    host = ConsoleHost("console of a", terminal)
    yield host
    terminal.close()


def test_a_shell_on_a_console_is_a_host(console, tmp_path):
    console.greet()
    (tmp_path / "file").write_text("a\tb\n" * 2000)
    assert console.read_text(str(tmp_path / "file")).value == "a\tb\n" * 2000
    assert isinstance(console.read_text(str(tmp_path / "none")), Absent)
    said = console.run(["sh", "-c", "echo out; echo err >&2; exit 3"]).value
    assert said == Output(3, "out\n", "err")
    assert isinstance(console.run(["no-such-command-at-all"]), Absent)


def test_a_long_script_goes_through_a_terminal(console):
    console.greet()
    # Longer than the 4096 bytes of a terminal's line.
    text = "x" * 9000
    assert console.run([sys.executable, "-c", f"print(len('{text}'))"]).value.stdout == "9000\n"


def test_a_console_that_hangs_costs_its_time_only(console):
    console.greet()
    fact = console.run(["sleep", "30"], timeout=0.3)
    assert isinstance(fact, Unknown)
    assert fact.code == "ETIMEDOUT"
    assert "earlier request" in console.run(["true"]).why


def test_a_console_without_a_shell_is_told():
    terminal = Terminal("cat")
    host = ConsoleHost("console of a", terminal)
    with pytest.raises(BadInput, match="no shell answers"):
        host.greet(timeout=0.5)
    host.close()
    gone = Terminal("true")
    gone.process.wait()
    with pytest.raises((BadInput, OSError)):
        ConsoleHost("console of a", gone).greet(timeout=2)


def test_a_console_is_left_as_it_was_found(console):
    console.greet()
    console._send(b"\x03")
    console._send(b"\n stty sane; echo to''gether\n")
    said = b""
    while b"together" not in said:
        piece = os.read(console._said, 1024)
        assert piece
        said += piece
