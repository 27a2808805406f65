"""Levels are measured in turns by a program that is brought to them and taken away again."""

import errno
from pathlib import Path

import pytest

from undervisor.errors import BadInput
from undervisor.host.access.live import LiveHost
from undervisor.host.access.protocol import Output
from undervisor.host.access.ssh import SshHost
from undervisor.host.fact import Absent, Denied, Known
from undervisor.lab.levels import session
from undervisor.lab.levels.comparison import compare
from undervisor.lab.levels.deliver import folder_on, put_program, shell
from undervisor.lab.levels.measures import DISK, MEASURES
from undervisor.lab.levels.program import Run, program
from undervisor.lab.levels.session import Effort, Findings, Subject, measure

TINY = Effort(2, 1, 50_000)


@pytest.fixture
def behind_a_shell():
    host = SshHost("a plain sh", ["sh"])
    yield host
    host.close()


def test_a_program_goes_through_a_plain_shell_as_it_is(behind_a_shell):
    every_byte = bytes(range(256)) * 5 + b"'%s'\\\0"
    with folder_on(behind_a_shell) as folder:
        put_program(behind_a_shell, every_byte, f"{folder}/a program's name")
        made = Path(folder) / "a program's name"
        assert made.read_bytes() == every_byte
        assert made.stat().st_mode & 0o777 == 0o700
    assert not Path(folder).exists()


def test_the_folder_is_taken_away_when_something_fails():
    with pytest.raises(BadInput, match="this machine: sh failed"), folder_on(LiveHost()) as folder:
        shell(LiveHost(), "exit 3")
    assert not Path(folder).exists()


class Refusing(LiveHost):
    """A machine on whose temporary folder nothing may be run."""

    def run(self, argv, timeout=10.0):
        if argv[0].endswith("/levels"):
            return Denied(argv[0])
        return super().run(argv, timeout)


def test_a_folder_without_programs_is_told():
    with pytest.raises(BadInput, match=r"can't be run.*TMPDIR"):
        measure([Subject(0, Refusing())], TINY, with_tools=False)


def test_a_machine_without_a_shell_is_told(monkeypatch):
    monkeypatch.setattr(LiveHost, "run", lambda *words: Absent("sh"))
    with pytest.raises(BadInput, match="sh: not there"):
        measure([Subject(0, LiveHost())], TINY, with_tools=False)


def test_another_programs_words_are_told(monkeypatch):
    monkeypatch.setattr(session, "parse", lambda text: (_ for _ in ()).throw(ValueError("odd")))
    with pytest.raises(BadInput, match="said something else: odd"):
        measure([Subject(0, LiveHost())], TINY, with_tools=False)


def test_this_machine_and_the_same_behind_a_shell(behind_a_shell, tmp_path):
    """Every measure at both, a round after the other; the one's disk is given, the other's made."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(session.DISK_BYTES))
    subjects = [Subject(0, LiveHost(), str(disk)), Subject(1, behind_a_shell)]
    found = measure(subjects, TINY, with_tools=False)
    assert found.levels == {"L0": "this machine", "L1": "a plain sh"}
    for one in MEASURES:
        known, missing = found.costs[one.key], found.missing[one.key]
        assert set(known) | set(missing) == {"L0", "L1"}
        assert {len(values) for values in known.values()} <= {TINY.rounds}
        assert not missing or one.key in DISK
    assert all(0 < ratio <= 1.02 for ratio in found.clocks["L0"])
    row = {r.measure.key: r for r in compare(found, TINY).rows}["latency-32k"]
    assert [ratio.name for ratio in row.ratios] == ["L1/L0"]


class Full(LiveHost):
    """A machine without room for a disk, and without tools."""

    def run(self, argv, timeout=10.0):
        if "dd if=" in " ".join(argv):
            return Known(Output(1, "", "dd: No space left on device\n"))
        return super().run(argv, timeout)


def test_without_room_for_a_disk_everything_else_is_measured():
    found = measure([Subject(0, Full())], Effort(1, 1, 1000), with_tools=False)
    assert {key for key, missing in found.missing.items() if missing} == DISK
    assert "No space left" in found.missing["disk-read"]["L0"]


def test_a_round_that_fails_takes_the_others_with_it():
    found = Findings(costs={"cpu": {}}, missing={"cpu": {}})
    found.keep("cpu", "L1", 1.0)
    found.lack("cpu", "L1", errno.errorcode[5])
    assert found.costs["cpu"] == {}
    assert found.missing["cpu"] == {"L1": "EIO"}


@pytest.mark.parametrize(
    ("key", "number", "words"),
    [
        ("disk-read", errno.EINVAL, "past the page cache"),
        ("disk-read", errno.ENOSPC, "No space left"),
        ("loopback", errno.EINVAL, "Invalid argument"),
    ],
)
def test_what_fails_at_a_level_says_why(key, number, words, monkeypatch):
    (one,) = (one for one in MEASURES if one.key == key)
    said = Run("", {}, {one.place: number}, 1.0)
    monkeypatch.setattr(session, "parse", lambda text: said)
    found = measure([Subject(0, LiveHost())], TINY, with_tools=False)
    assert words in found.missing[key]["L0"]


def test_the_program_fits_a_terminals_line():
    sent = []

    class Listening(LiveHost):
        def run(self, argv, timeout=10.0):
            sent.append(" ".join(argv))
            return Known(Output(0, "", ""))

    put_program(Listening(), program(), "/tmp/x")
    assert len(sent) == 6
    assert max(map(len, sent)) < 4096
