"""Archives in the newc form, read back by what reads them: cpio's rules, spelled out here."""

import stat
import subprocess

import pytest

from undervisor.errors import BadInput
from undervisor.guest.newc import Archive


def members(data):
    """Name, mode, data and device of each member, by the words of the buffer format."""
    found, at = [], 0
    while True:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        mode, size, device, name_size = fields[1], fields[6], tuple(fields[9:11]), fields[11]
        name = data[at + 110 : at + 110 + name_size - 1].decode()
        body = (at + 110 + name_size + 3) & ~3
        if name == "TRAILER!!!":
            assert body >= len(data)
            return found
        found.append((name, mode, data[body : body + size], device))
        at = (body + size + 3) & ~3


def small():
    archive = Archive()
    archive.file("usr/bin/tool", b"\x7fELF", program=True)
    archive.file("etc/empty", b"")
    archive.link("bin/sh", "busybox")
    archive.device("dev/console", 5, 1)
    return archive


def test_members_come_back_as_they_were_put():
    found = {name: rest for name, *rest in members(small().finish())}
    assert found["usr/bin/tool"] == [stat.S_IFREG | 0o755, b"\x7fELF", (0, 0)]
    assert found["etc/empty"] == [stat.S_IFREG | 0o644, b"", (0, 0)]
    assert found["bin/sh"] == [stat.S_IFLNK | 0o777, b"busybox", (0, 0)]
    assert found["dev/console"] == [stat.S_IFCHR | 0o600, b"", (5, 1)]


def test_folders_come_before_what_is_in_them_and_once():
    archive = small()
    archive.file("usr/bin/other", b"x")
    names = [name for name, *_ in members(archive.finish())]
    assert names.index("usr") < names.index("usr/bin") < names.index("usr/bin/tool")
    assert len(names) == len(set(names))


def test_the_same_members_are_the_same_bytes():
    assert small().finish() == small().finish()


def test_a_name_is_taken_once():
    archive = small()
    with pytest.raises(BadInput, match="usr/bin/tool"):
        archive.file("/usr/bin/tool", b"again")


def test_a_path_can_not_lead_out():
    with pytest.raises(BadInput, match="leads out"):
        Archive().file("../etc/passwd", b"")


def test_the_tool_of_the_distribution_unpacks_it(tmp_path):
    # initramfs-tools brings cpio along.
    archive = small()
    archive.file("deep/er/file", b"words\n" * 1000)
    ran = subprocess.run(
        ["cpio", "-i", "--quiet", "--no-absolute-filenames", "usr*", "deep*", "etc*"],
        input=archive.finish(),
        cwd=tmp_path,
        capture_output=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "deep/er/file").read_bytes() == b"words\n" * 1000
    assert (tmp_path / "usr/bin/tool").stat().st_mode & 0o777 == 0o755
