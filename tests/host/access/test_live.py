import os
import time

import pytest

from undervisor.host.access.live import LiveHost
from undervisor.host.fact import Absent, Denied, Known, Unknown, from_errno


@pytest.fixture
def host():
    return LiveHost()


def test_a_file_is_read_whole(host, tmp_path):
    (tmp_path / "nested").write_text("Y\n")
    assert host.read_line(str(tmp_path / "nested")) == Known("Y", str(tmp_path / "nested"))


def test_a_missing_file_is_absent_and_so_is_one_below_a_file(host, tmp_path):
    (tmp_path / "file").write_text("")
    assert isinstance(host.read_text(str(tmp_path / "no")), Absent)
    assert isinstance(host.read_text(str(tmp_path / "file" / "no")), Absent)


def test_the_three_errors_are_three_facts():
    kinds = [type(from_errno(number, "x")) for number in (2, 13, 5)]
    assert kinds == [Absent, Denied, Unknown]
    assert from_errno(5, "x").code == "EIO"


def test_a_file_over_the_limit_is_unknown(host, tmp_path):
    path = tmp_path / "garbage"
    path.write_bytes(os.urandom(1 << 16) * 160)
    fact = host.read_text(str(path))
    assert isinstance(fact, Unknown)
    assert fact.code == "EFBIG"


def test_a_pipe_does_not_make_us_wait(host, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert isinstance(host.read_bytes(str(tmp_path / "pipe")), Unknown)


def test_a_folder_is_not_a_file(host, tmp_path):
    assert isinstance(host.read_bytes(str(tmp_path)), Unknown)


def test_an_impossible_path_is_unknown(host):
    assert isinstance(host.read_bytes("/proc/\0"), Unknown)


def test_a_command_says_what_it_says(host):
    fact = host.run(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (fact.value.status, fact.value.stdout, fact.value.stderr) == (3, "out\n", "err\n")


def test_a_missing_command_is_absent(host):
    assert isinstance(host.run(["no-such-command-at-all"]), Absent)


def test_a_command_that_hangs_is_ended_with_its_children(host, tmp_path):
    pid = tmp_path / "pid"
    fact = host.run(["sh", "-c", f"sleep 60 & echo $! > {pid}; wait"], timeout=0.5)
    assert isinstance(fact, Unknown)
    assert fact.code == "ETIMEDOUT"
    child = f"/proc/{pid.read_text().strip()}/status"
    for _ in range(100):
        state = LiveHost().read_text(child)
        if isinstance(state, Absent) or "State:\tZ" in state.value:
            return
        time.sleep(0.05)
    raise AssertionError("the child is still there")


def test_a_command_that_floods_is_ended(host):
    fact = host.run(["sh", "-c", "yes"], timeout=20)
    assert isinstance(fact, Unknown)
    assert fact.code == "EFBIG"


def test_a_root_folder_answers_for_its_files_only(tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "os-release").write_text("ID=test\n")
    host = LiveHost(str(tmp_path))
    assert host.read_text("/etc/os-release").value == "ID=test\n"
    assert host.read_text("/../../etc/os-release").value == "ID=test\n"
    assert isinstance(host.run(["true"]), Unknown)
    assert isinstance(host.msr(0x3A), Unknown)
    assert isinstance(host.cpuid(0), Unknown)


def test_stat_tells_kind_mode_and_device(host):
    fact = host.stat("/dev/null").value
    assert (fact.kind, fact.device) == ("character", (1, 3))


def test_cpuid_by_instruction_agrees_with_itself():
    from undervisor.host.access import native

    fact = native.cpuid(0)
    if isinstance(fact, Known):
        vendor = b"".join(
            part.to_bytes(4, "little") for part in (fact.value.ebx, fact.value.edx, fact.value.ecx)
        )
        assert vendor.isascii()
        assert native.timing().value.plain_ticks > 0
