import json
import os

import pytest

from undervisor.errors import BadInput
from undervisor.host.access.live import LiveHost
from undervisor.host.access.recorded import RecordedHost
from undervisor.host.access.recorder import RecordingHost
from undervisor.host.fact import Absent, Denied, Known, Unknown


@pytest.fixture
def recording(tmp_path):
    def make(said=None, **files):
        folder = tmp_path / "machine"
        (folder / "files").mkdir(parents=True)
        (folder / "machine.json").write_text(json.dumps({"format": 1, **(said or {})}))
        for name, text in files.items():
            path = folder / "files" / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return folder

    return make


def test_files_errors_and_absence_stay_different_facts(recording):
    said = {"errors": {"/a": "EACCES", "/b": "EIO"}, "absent": ["/c"], "complete": ["/sys"]}
    host = RecordedHost(str(recording(said, proc__version="Linux\n")))
    assert host.read_line("/proc/version").value == "Linux"
    kinds = [type(host.read_text(path)) for path in ("/a", "/b", "/c", "/sys/x", "/d")]
    assert kinds == [Denied, Unknown, Absent, Absent, Unknown]


def test_a_name_that_a_listed_folder_lacks_is_absent(recording):
    host = RecordedHost(str(recording({"folders": {"/dev": ["null"]}})))
    assert isinstance(host.stat("/dev/kvm"), Absent)
    assert isinstance(host.stat("/dev/null"), Unknown)


def test_a_recording_that_climbs_out_is_refused(recording, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    folder = recording()
    (folder / "files" / "proc").mkdir()
    (folder / "files" / "proc" / "version").symlink_to(secret)
    (folder / "files" / "sys").symlink_to(tmp_path)
    host = RecordedHost(str(folder))
    for path in ("/proc/version", "/sys/secret", "/../../secret", "/proc/../../../secret"):
        assert isinstance(host.read_text(path), Unknown), path
        assert not isinstance(host.stat(path), Known), path


def test_a_link_in_place_of_the_json_is_refused(recording, tmp_path):
    folder = recording()
    (tmp_path / "other.json").write_text('{"format": 1}')
    (folder / "machine.json").unlink()
    (folder / "machine.json").symlink_to(tmp_path / "other.json")
    with pytest.raises(BadInput):
        RecordedHost(str(folder))


def test_a_pipe_or_a_huge_file_in_a_recording_is_unknown(recording):
    folder = recording(None, big="x" * 3_000_000)
    os.mkfifo(folder / "files" / "pipe")
    host = RecordedHost(str(folder))
    assert isinstance(host.read_text("/pipe"), Unknown)
    assert host.read_text("/big").code == "EFBIG"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": 2}',
        '{"format": true}',
        "[" * 100_000,
        '{"format": 1, "commands": [7]}',
        '{"format": 1, "commands": [{"argv": "ls"}]}',
        '{"format": 1, "commands": [{"argv": ["ls"], "status": "bad"}]}',
        '{"format": 1, "stat": []}',
        '{"format": 1, "surprise": 1}',
        '{"format": ' + "9" * 5000 + "}",
    ],
)
def test_a_malformed_recording_is_bad_input(recording, text):
    folder = recording()
    (folder / "machine.json").write_text(text)
    with pytest.raises(BadInput):
        RecordedHost(str(folder))


@pytest.mark.parametrize(
    "said",
    [
        {"cpuid": {"0x1.0": ["0x1"]}},
        {"cpuid": {"0x1.0": ["0x1", "x", 0, 0]}},
        {"cpuid": {"0x1.0": [1 << 32, 0, 0, 0]}},
        {"cpuid": {"0x1.0": None}},
    ],
)
def test_values_that_lie_are_unknown(recording, said):
    assert isinstance(RecordedHost(str(recording(said))).cpuid(1), Unknown)


@pytest.mark.parametrize("value", [-1, 1 << 64, "0xg", [], None, "ESTRANGE", 1.5])
def test_an_msr_that_lies_is_unknown(recording, value):
    assert isinstance(RecordedHost(str(recording({"msr": {"0x3a": value}}))).msr(0x3A), Unknown)


@pytest.mark.parametrize("value", [7, {"mode": "rw"}, {"mode": "0660", "device": ["a", 1]}])
def test_a_mode_that_lies_is_unknown(recording, value):
    host = RecordedHost(str(recording({"stat": {"/dev/kvm": value}})))
    assert isinstance(host.stat("/dev/kvm"), Unknown)


def test_what_was_recorded_is_read_back(tmp_path):
    (tmp_path / "file").write_text("mac 52:54:00:12:34:56\n")
    live = RecordingHost(LiveHost())
    asked = {
        "file": lambda host: host.read_text(str(tmp_path / "file")),
        "no": lambda host: host.read_text(str(tmp_path / "no")),
        "folder": lambda host: host.listdir(str(tmp_path)),
        "null": lambda host: host.stat("/dev/null"),
        "usable": lambda host: host.usable("/dev/null"),
        "run": lambda host: host.run(["echo", "a"]),
        "norun": lambda host: host.run(["no-such-command-at-all"]),
        "uid": lambda host: host.user().value.uid,
        "cpuid": lambda host: host.cpuid(0),
        "msr": lambda host: type(host.msr(0x3A)),
    }
    before = {name: ask(live) for name, ask in asked.items()}
    live.write(str(tmp_path / "recording"))
    after = {name: ask(RecordedHost(str(tmp_path / "recording"))) for name, ask in asked.items()}
    assert before.pop("file").value == "mac 52:54:00:12:34:56\n"
    assert after.pop("file").value == "mac [removed-mac-1]\n"
    assert after == before


def test_a_recording_never_overwrites(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").write_text("keep")
    with pytest.raises(BadInput, match="not empty"):
        RecordingHost(LiveHost()).write(str(tmp_path / "there"))
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
