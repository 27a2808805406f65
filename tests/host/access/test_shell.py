"""The shell behind SSH, with a local `sh` at the other end of the pipe, and with bad ones."""

import getpass
import os
import random
import shutil
import socket
import subprocess
import time

import pytest

from undervisor.errors import BadInput
from undervisor.host.access.live import LiveHost
from undervisor.host.access.recorder import RecordingHost
from undervisor.host.access.shell import ShellHost
from undervisor.host.access.ssh import SshHost, ssh_command
from undervisor.host.fact import Absent, Known, Unknown
from undervisor.host.facts.machine import gather


@pytest.fixture
def shell():
    host = SshHost("test", ["sh"])
    yield host
    host.close()


def test_the_shell_sees_what_we_see(shell, tmp_path):
    path = tmp_path / "a file; with 'quotes'"
    path.write_bytes(b"\0binary\n\n\xff")
    here = LiveHost()
    assert shell.read_bytes(str(path)) == here.read_bytes(str(path))
    assert shell.listdir(str(tmp_path)) == here.listdir(str(tmp_path))
    assert shell.stat(str(path)) == here.stat(str(path))
    assert shell.stat("/dev/null") == here.stat("/dev/null")
    assert shell.usable("/dev/null") == here.usable("/dev/null")
    assert shell.user().value.uid == here.user().value.uid
    assert shell.read_text("/proc/version") == here.read_text("/proc/version")


def test_missing_things_are_absent(shell):
    assert isinstance(shell.read_text("/no/such"), Absent)
    assert isinstance(shell.listdir("/no/such"), Absent)
    assert isinstance(shell.stat("/no/such"), Absent)
    assert isinstance(shell.usable("/no/such"), Absent)
    assert isinstance(shell.run(["no-such-command-at-all"]), Absent)
    assert isinstance(shell.read_text("/proc"), Unknown)


def test_status_and_both_outputs_arrive(shell):
    output = shell.run(["sh", "-c", "printf 'a\\n\\n'; printf b >&2; exit 4"]).value
    assert (output.status, output.stdout, output.stderr) == (4, "a\n\n", "b")


class Liar(ShellHost):
    """A machine that answers every question with the same bytes."""

    def __init__(self, raw):
        self.name, self.raw = "liar", raw

    def execute(self, script, timeout, limit):
        return Known((0, self.raw[:limit], b""), "liar")


def test_names_that_are_none_are_left_out():
    liar = Liar(b"../../etc/x.conf\n.\n..\n/etc\na\0b\nreal.conf\n" + b"x" * 300 + b"\n")
    assert liar.listdir("/etc/modprobe.d").value == ("real.conf",)


@pytest.mark.parametrize("seed", range(20))
def test_a_machine_that_lies_about_everything_is_recorded_inside_the_folder(tmp_path, seed):
    rng = random.Random(seed)
    words = [b"../../../x.conf\n", b"\0", b"a/b\n", b"kvm_intel\n", b"6.1.0\n", rng.randbytes(300)]
    liar = RecordingHost(Liar(b"".join(rng.choices(words, k=6))))
    gather(liar)
    liar.write(str(tmp_path / "m"))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_file_over_the_limit_is_unknown(shell, tmp_path):
    (tmp_path / "big").write_bytes(b"x" * 5000)
    assert shell.read_bytes(str(tmp_path / "big"), limit=4999).code == "EFBIG"
    assert isinstance(shell.read_bytes(str(tmp_path / "big"), limit=5000), Known)


def test_one_command_that_hangs_does_not_spoil_the_next(shell):
    fact = shell.run(["sleep", "60"], timeout=0.3)
    assert isinstance(fact, Unknown)
    assert shell.run(["echo", "well"]).value.stdout == "well\n"


def test_a_banner_does_no_harm():
    host = SshHost("test", ["sh", "-c", "echo WELCOME; echo END; echo; exec sh"])
    assert host.run(["echo", "well"]).value.stdout == "well\n"
    host.close()


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["sh", "-c", "exec yes 'BEGIN rubbish'"], "it says far too much"),
        (["sleep", "60"], "no answer in time"),
        (["cat"], "no answer in time"),
        (["sh", "-c", "echo 'Permission denied (publickey).' >&2; exit 255"], "publickey"),
        (["no-such-ssh-client"], "No such file"),
    ],
    ids=["floods", "hangs", "echoes", "refuses", "missing"],
)
def test_a_bad_host_costs_bounded_time_and_says_why(command, why):
    host = SshHost("bad", command, connect=0.5)
    start = time.monotonic()
    with pytest.raises(BadInput, match=why):
        host.greet()
    host.close()
    assert time.monotonic() - start < 10


def test_a_connection_that_keeps_breaking_is_given_up():
    host = SshHost("bad", ["true"], connect=0.5)
    facts = [host.read_text("/proc/version") for _ in range(8)]
    assert all(isinstance(fact, Unknown) for fact in facts)
    assert "too often" in facts[-1].why


@pytest.mark.parametrize("name", ["-oProxyCommand=x", "a b", "", "x;y", "a@b@c", "$(id)", "@x"])
def test_a_destination_that_is_no_name_is_refused(name):
    with pytest.raises(BadInput):
        ssh_command(name)


@pytest.fixture
def sshd(tmp_path):
    """A real SSH daemon on a free port of this machine, for this user and one key."""
    daemon = shutil.which("sshd", path="/usr/sbin:/usr/bin")
    if not daemon or not shutil.which("ssh"):
        pytest.skip("needs sshd and ssh")
    for name in ("host", "user"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True
        )
    shutil.copy(tmp_path / "user.pub", tmp_path / "authorized")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    os.makedirs("/run/sshd", exist_ok=True)
    options = {
        "HostKey": tmp_path / "host",
        "AuthorizedKeysFile": tmp_path / "authorized",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PrintMotd": "yes",
    }
    words = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    process = subprocess.Popen(
        [daemon, "-D", "-e", "-f", "/dev/null", "-p", str(port), "-o", "ListenAddress=127.0.0.1",
         *words],
        stderr=subprocess.PIPE,
    )  # fmt: skip
    config = tmp_path / "config"
    config.write_text(
        f"Host machine\n HostName 127.0.0.1\n Port {port}\n User {getpass.getuser()}\n"
        f" IdentityFile {tmp_path}/user\n IdentitiesOnly yes\n"
        f" UserKnownHostsFile {tmp_path}/known\n StrictHostKeyChecking accept-new\n"
    )
    for _ in range(100):
        line = process.stderr.readline()
        if b"listening" in line or not line:
            break
    yield str(config)
    process.terminate()
    process.wait()
    process.stderr.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="sshd wants root for its privilege separation")
def test_a_real_ssh_server_answers(sshd):
    host = SshHost("machine", ssh_command("machine", sshd))
    host.greet()
    assert host.read_text("/proc/version") == LiveHost().read_text("/proc/version")
    assert isinstance(host.read_text("/no/such"), Absent)
    host.close()


def test_output_comes_while_the_command_runs(shell):
    before = time.monotonic()
    pieces = shell.follow("echo first; sleep 1; echo last; exit 3", 10)
    said = next(pieces)
    while b"first" not in said:
        said += next(pieces)
    assert time.monotonic() - before < 0.9
    assert said + b"".join(pieces) == b"first\nlast\n"
    assert shell.run(["echo", "next"]).value.stdout == "next\n"


def test_a_stream_that_is_left_early_does_not_spoil_the_next_answer(shell):
    pieces = shell.follow("yes", 10)
    next(pieces)
    pieces.close()
    assert shell.run(["echo", "next"]).value.stdout == "next\n"


def test_a_stream_that_does_not_end_is_ended(shell):
    with pytest.raises(TimeoutError, match="no answer in time"):
        list(shell.follow("sleep 60", 0.2))
    with pytest.raises(OSError, match="No such file"):
        list(SshHost("nobody", ["/no/such/program"]).follow("true", 1))
