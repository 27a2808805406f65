"""What a lab of its own is given for measuring: a disk of real blocks, and the tools found here."""

import os

import pytest

from undervisor.lab import vmm
from undervisor.lab.cache import Cache
from undervisor.lab.levels import stack
from undervisor.lab.levels.session import DISK_BYTES


def test_the_disk_has_blocks_and_is_gone_afterwards():
    """A file with holes would be read without a disk."""
    with stack._disk() as path:
        if path is not None:
            assert path.stat().st_size == DISK_BYTES
            assert path.stat().st_blocks * 512 >= DISK_BYTES
    assert path is None or not path.parent.exists()


def test_without_direct_access_there_is_no_disk(monkeypatch):
    def refuse(path, flags, *more, **named):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return really(path, flags, *more, **named)

    really = os.open
    monkeypatch.setattr(stack.os, "open", refuse)
    with stack._disk() as path:
        assert path is None


def test_the_tools_found_here_go_with_their_libraries(tmp_path, monkeypatch):
    found = {"sysbench": "/bin/sh"}
    monkeypatch.setattr(stack.shutil, "which", found.get)
    archive = stack.tools_archive(Cache(tmp_path / "one"))
    content = archive.read_bytes()
    assert b"bin/sh\0" in content
    for library in vmm.libraries(stack.Path("/bin/sh")):
        assert str(library).lstrip("/").encode() + b"\0" in content
    again = stack.tools_archive(Cache(tmp_path / "two"))
    assert (again.name, again.read_bytes()) == (archive.name, content)


def test_without_tools_nothing_is_carried(tmp_path, monkeypatch):
    monkeypatch.setattr(stack.shutil, "which", lambda name: None)
    assert stack.tools_archive(Cache(tmp_path)) is None


@pytest.mark.parametrize("with_tools", [False, True])
def test_the_levels_of_a_lab_are_those_of_its_plan(with_tools, monkeypatch, tmp_path):
    made = []

    class StandIn:
        """A lab that only says what it was asked for."""

        def __init__(self, plan, cache, progress):
            self.plan = plan
            made.append(plan)

        def __enter__(self):
            return self

        def __exit__(self, *failure):
            return None

        def level(self, number):
            return type("Level", (), {"host": f"level {number}"})

    monkeypatch.setattr(stack, "Lab", StandIn)
    monkeypatch.setattr(stack, "tools_archive", lambda cache: tmp_path)
    monkeypatch.setattr(stack, "Plan", lambda depth, **more: _Plan(depth, more))
    with stack.levels_of_a_lab(3, with_tools=with_tools) as subjects:
        assert [subject.name for subject in subjects] == ["L0", "L1", "L2", "L3"]
        assert [subject.host for subject in subjects[1:]] == ["level 1", "level 2", "level 3"]
        disk = made[0].more["disk"]
        inside = {subject.disk for subject in subjects[1:]}
        assert subjects[0].disk == str(disk or "")
        assert inside == ({"/dev/vda"} if disk else {""})
    assert made[0].more["initramfs"] == (tmp_path if with_tools else None)


class _Plan:
    def __init__(self, depth, more):
        self.levels, self.more = range(1, depth + 1), more
