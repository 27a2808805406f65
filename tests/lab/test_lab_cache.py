"""Entries of the cache are whole or not there, whenever their maker is killed."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from undervisor.errors import BadInput
from undervisor.lab.cache import Cache, default_folder

PIECES, PIECE = 40, b"0123456789abcdef" * 4096
MAKER = """
import sys, time
from pathlib import Path
from undervisor.lab.cache import Cache

def make(place):
    with place.open("wb") as file:
        for _ in range({pieces}):
            file.write({piece!r} * 4096)
            file.flush()
            print("piece", flush=True)
            time.sleep(0.001)

print("begin", flush=True)
Cache(Path(sys.argv[1])).entry("image", make)
print("made", flush=True)
"""


def maker(folder):
    script = MAKER.format(pieces=PIECES, piece=PIECE[:16])
    return subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True
    )


def whole(place):
    with place.open("wb") as file:
        for _ in range(PIECES):
            file.write(PIECE)


def test_a_maker_that_is_killed_leaves_no_entry_or_a_whole_one(tmp_path):
    chance = random.Random(6)
    for _ in range(12):
        process = maker(tmp_path)
        for _ in range(chance.randrange(PIECES + 3)):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        image = tmp_path / "image"
        if image.exists():
            assert image.read_bytes() == PIECE * PIECES
            image.unlink()


def test_what_a_killed_maker_left_is_removed_by_the_next(tmp_path):
    process = maker(tmp_path)
    while "piece" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".half")]
    Cache(tmp_path).entry("image", whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "image"]


def test_two_makers_make_it_once(tmp_path):
    both = [maker(tmp_path), maker(tmp_path)]
    said = [process.communicate()[0] for process in both]
    assert sum("piece" in text for text in said) == 1
    assert all("made" in text for text in said)


def test_a_maker_that_fails_leaves_nothing(tmp_path):
    def fail(place):
        place.write_bytes(b"half")
        raise BadInput("no")

    with pytest.raises(BadInput):
        Cache(tmp_path).entry("image", fail)
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


def test_an_entry_is_made_once(tmp_path):
    calls = []

    def make(place):
        calls.append(1)
        place.mkdir()
        (place / "file").write_bytes(b"x")

    for _ in range(2):
        assert (Cache(tmp_path).entry("folder", make) / "file").read_bytes() == b"x"
    assert calls == [1]


def test_entries_that_nobody_asks_for_are_forgotten(tmp_path):
    for name in ("old", "asked"):
        Cache(tmp_path).entry(name, whole)
        long_ago = time.time() - 100 * 86400
        os.utime(tmp_path / name, (long_ago, long_ago))
    Cache(tmp_path).entry("asked", whole)
    Cache(tmp_path).entry("new", whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "asked", "new"]


def test_a_cache_that_can_not_be_written_is_told(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BadInput, match="cache"):
        Cache(tmp_path / "file" / "below").entry("image", whole)


def test_the_cache_is_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "undervisor"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "undervisor"
