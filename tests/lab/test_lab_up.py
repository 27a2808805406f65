"""A real L1 with a real L2 under its KVM: started once, looked at from all sides, ended.

The tests are in the order of a lab's life; the first one needs the network where the packages are
not in the cache.
"""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import pytest
from lab_machines import machines_in, undervisor

pytestmark = [pytest.mark.qemu, pytest.mark.xdist_group("lab")]


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def lab(runtime):
    """What `lab up` said; the lab is ended after the last test."""
    ran = undervisor("lab", "up", "--json", runtime=runtime)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    yield json.loads(ran.stdout)
    undervisor("lab", "down", runtime=runtime)
    assert machines_in(runtime) == []


def test_kvm_on_kvm_is_proven(lab):
    assert lab["proven"], lab["claims"]
    assert [level["testimony"]["signature"] for level in lab["levels"]][1] == "KVMKVMKVM"
    assert set(lab["seconds"]) == {"images", "L1", "L2", "proof"}
    assert lab["levels"][0]["counted"]["rise"]["exits"] >= 500


def test_it_is_listed(lab, runtime):
    (row,) = json.loads(undervisor("lab", "ls", "--json", runtime=runtime).stdout)
    assert (row["name"], row["depth"], row["proven"]) == ("lab", 2, True)


@pytest.mark.parametrize("level", ["l1", "l2"])
def test_commands_run_at_each_level(lab, runtime, level):
    ran = undervisor("lab", "sh", level, "hostname; echo no >&2; exit 3", runtime=runtime)
    assert (ran.stdout, ran.stderr, ran.returncode) == (f"{level}\n", "no\n", 3)


def test_a_command_that_is_no_shell_is_told(lab, runtime):
    ran = undervisor("lab", "sh", "l1", "echo 'never closed", runtime=runtime)
    assert ran.returncode == 2
    assert "unterminated quoted string" in ran.stderr


def test_a_command_that_hangs_is_ended_there(lab, runtime):
    ran = undervisor("lab", "sh", "--timeout", "0.5", "l2", "sleep 77", runtime=runtime)
    assert ran.returncode == 6
    ran = undervisor("lab", "sh", "l2", "ps | grep -c '[s]leep 77'", runtime=runtime)
    assert ran.stdout == "0\n"


def test_a_level_that_is_not_there_is_told(lab, runtime):
    ran = undervisor("lab", "sh", "l3", "true", runtime=runtime)
    assert ran.returncode == 2
    assert "l1 to l2" in ran.stderr


def test_the_checks_look_at_l1(lab, runtime):
    ran = undervisor("check", "--host", "lab:l1", "--json", runtime=runtime)
    said = json.loads(ran.stdout)
    ids = {finding["id"] for finding in said["findings"]}
    assert {"kvm-loaded", "nested-on", "device-usable", "qemu"} <= ids, ids
    assert ran.returncode == 0


def test_the_checks_look_at_l2(lab, runtime):
    ran = undervisor("check", "--host", "lab:l2", "--below", "kvm", runtime=runtime)
    assert ran.returncode == 0, ran.stdout
    assert "CPUID exits" in ran.stdout


def test_what_l1_offers_is_decoded(lab, runtime):
    ran = undervisor("caps", "lab:l1", "--json", runtime=runtime)
    assert json.loads(ran.stdout)["vendor"] == "svm", ran.stdout + ran.stderr


def test_the_exits_of_l2_are_counted_in_l1(lab, runtime):
    words = ("exits", "--host", "lab:l1", "--stats", "--seconds", "0.5", "--json")
    said = json.loads(undervisor(*words, runtime=runtime).stdout)
    assert said["totals"]["exits"] > 500


def test_the_report_holds_both_levels(lab, runtime, tmp_path):
    path = tmp_path / "report.zip"
    ran = undervisor("report", str(path), "--l1", "lab:l1", "--l2", "lab:l2", runtime=runtime)
    assert "L2 runs on KVM" in ran.stdout, ran.stdout + ran.stderr
    with zipfile.ZipFile(path) as file:
        assert any("L2" in name and "dmesg" in name for name in file.namelist())


def test_a_stream_leads_to_a_program_in_l1(lab, runtime, monkeypatch):
    from undervisor.lab.stack import Lab

    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    data = os.urandom(1 << 16)
    with Lab.attach() as found:
        port = "/lab/ports/agent.l1"
        serve = f"setsid sh -c 'head -c {len(data)} >&0' 0<>{port} >/dev/null 2>&1 &"
        found.level(1).run(serve)
        with found.stream("agent") as line:
            line.settimeout(30)
            line.sendall(data)
            back = b""
            while len(back) < len(data):
                back += line.recv(1 << 16)
    assert back == data


def test_a_console_is_a_terminal(lab, runtime, request):
    keys, terminal = pty.openpty()
    request.addfinalizer(lambda: os.close(keys))
    process = subprocess.Popen(
        [sys.executable, "-m", "undervisor", "lab", "sh", "l2"],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "XDG_RUNTIME_DIR": str(runtime)},
    )
    request.addfinalizer(process.wait)
    request.addfinalizer(process.kill)
    os.close(terminal)
    said = b""
    deadline = time.monotonic() + 60
    os.write(keys, b"\necho $((40 + 2)) is on $(hostname)\n")
    while b"42 is on l2" not in said:
        assert time.monotonic() < deadline, said
        if select.select([keys], [], [], 1.0)[0]:
            said += os.read(keys, 4096)
    os.write(keys, b"\x1d")
    assert process.wait(30) == 0


def test_a_second_lab_of_the_name_is_refused(lab, runtime):
    ran = undervisor("lab", "up", runtime=runtime)
    assert ran.returncode == 2
    assert "runs already" in ran.stderr


def test_it_ends_and_nothing_is_left(lab, runtime):
    ran = undervisor("lab", "down", runtime=runtime)
    assert ran.returncode == 0, ran.stderr
    assert machines_in(runtime) == []
    assert list((runtime / "undervisor").iterdir()) == []
    assert undervisor("lab", "down", runtime=runtime).returncode == 2


@pytest.fixture
def short():
    """A folder whose path leaves room for the names of sockets."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_ended_leaves_nothing(short, number):
    process = subprocess.Popen(
        [sys.executable, "-m", "undervisor", "lab", "run"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "XDG_RUNTIME_DIR": str(short)},
    )
    deadline = time.monotonic() + 120
    while not any("qemu-system" in words for words in machines_in(short)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    process.wait(30)
    deadline = time.monotonic() + 20
    while machines_in(short):
        assert time.monotonic() < deadline, machines_in(short)
        time.sleep(0.05)


def test_an_l1_without_svm_is_told(short, monkeypatch):
    from undervisor.errors import GuestDied
    from undervisor.lab import machines
    from undervisor.lab.plan import Plan
    from undervisor.lab.stack import Lab

    monkeypatch.setattr(machines, "EMULATED_CPU", "EPYC,-svm,-xsave")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short))
    with pytest.raises(GuestDied, match="no /dev/kvm"):
        Lab(plan=Plan(accelerator="tcg")).start()
    assert machines_in(short) == []


def test_a_folder_too_long_for_sockets_is_told(tmp_path, monkeypatch):
    from undervisor.errors import BadInput
    from undervisor.lab.plan import Plan
    from undervisor.lab.stack import Lab

    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    with pytest.raises(BadInput, match="too long for the sockets"):
        Lab(plan=Plan(accelerator="tcg")).start()
