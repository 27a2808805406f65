"""The program that measures levels runs here, and its numbers are what they should be."""

import errno
import os
import subprocess

import pytest

from undervisor.host.access.live import LiveHost
from undervisor.host.fact import Known
from undervisor.host.facts.place import signature
from undervisor.lab.levels.measures import DISK, MEASURES
from undervisor.lab.levels.program import MOST_SAMPLES, parse, program

SIZE = 1 << 20
PLACES = {one.key: one.place for one in MEASURES}
ALL = (1 << len(MEASURES)) - 1
WITHOUT_DISK = sum(1 << one.place for one in MEASURES if one.key not in DISK)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    made = tmp_path_factory.mktemp("levels") / "levels"
    made.write_bytes(program())
    made.chmod(0o755)
    return made


def run(path, mask, samples=3, nanoseconds=200_000, disk="-", size=SIZE, **options):
    words = [f"{mask:x}", f"{samples:x}", f"{nanoseconds:x}", str(disk), f"{size:x}"]
    return subprocess.run([path, *words], timeout=120, **options)


def said(path, mask, **options):
    ran = run(path, mask, capture_output=True, text=True, **options)
    assert ran.returncode == 0, ran.stderr
    return parse(ran.stdout)


@pytest.fixture(scope="module")
def costs(path):
    """The least of a few samples of everything but the disk, by key."""
    found = said(path, WITHOUT_DISK, samples=15)
    assert found.failed == {}
    return {key: min(found.samples[place]) for key, place in PLACES.items() if key not in DISK}


def test_every_measure_gives_its_samples(path):
    found = said(path, WITHOUT_DISK, samples=2)
    assert set(found.samples) == {PLACES[key] for key in PLACES if key not in DISK}
    assert {len(samples) for samples in found.samples.values()} == {2}
    assert all(cost > 0 for samples in found.samples.values() for cost in samples)
    assert found.seconds > 0


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ("cpu", "syscall"),  # instructions, and a way into the kernel
        ("syscall", "switch"),  # which is four of them and two switches
        ("switch", "process"),
        ("switch", "loopback"),  # the same with TCP between
        ("latency-32k", "latency-32m"),  # in the cache, and not
        ("cpu", "exit"),
        ("loopback", "loopback-64k"),
    ],
)
def test_what_does_more_costs_more(costs, less, more):
    assert costs[less] < costs[more]


def test_numbers_are_those_of_a_computer(costs):
    """Between a tenth and a thousand times what processors of the last twenty years take."""
    assert 0.05 < costs["cpu"] < 1000
    assert 0.1 < costs["latency-32k"] < 1000
    assert 10 < costs["syscall"] < 100_000
    assert 0.01 < MEASURES[PLACES["read"]].amount / costs["read"] * 1e9 < 2000


def test_it_says_what_cpuid_says(path):
    found = said(path, 1)
    present, leaf = (LiveHost().cpuid(number) for number in (1, 0x4000_0000))
    assert isinstance(present, Known)
    assert isinstance(leaf, Known)
    assert found.signature == (signature(leaf.value) if present.value.ecx >> 31 else "")


def test_only_what_is_asked_for_is_measured(path):
    assert set(said(path, 0b101).samples) == {0, 2}
    assert said(path, 0).samples == {}


def direct_access_refused(path):
    """The error number of a file system that can't be read past its cache; else 0."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError as error:
        return error.errno
    return 0


def test_a_disk_is_read_and_written(path, tmp_path):
    disk, content = tmp_path / "disk", bytes([0xA5]) * SIZE
    disk.write_bytes(content)
    found = said(path, 1 << PLACES["disk-read"], disk=disk)
    assert disk.read_bytes() == content, "reading changes nothing"
    more = said(path, 1 << PLACES["disk-write"], disk=disk)
    written = disk.read_bytes()
    pages = {written[at : at + 4096] for at in range(0, SIZE, 4096)}
    refused = direct_access_refused(disk)
    assert found.failed | more.failed == dict.fromkeys((13, 14) if refused else (), refused)
    assert len(written) == SIZE
    assert pages <= {content[:4096], bytes(4096)}
    assert (bytes(4096) in pages) != bool(refused)


def test_a_disk_that_is_not_there_fails_alone(path, tmp_path):
    found = said(path, ALL & ~(1 << PLACES["process"]), samples=1, disk=tmp_path / "nothing")
    assert found.failed == {PLACES[key]: errno.ENOENT for key in DISK}
    assert PLACES["cpu"] in found.samples


def test_no_child_is_left_behind(path):
    with subprocess.Popen(
        [path, f"{WITHOUT_DISK:x}", "1", "186a0", "-", "0"], stdout=subprocess.PIPE,
        start_new_session=True,
    ) as ran:  # fmt: skip
        ran.communicate(timeout=60)
    with pytest.raises(ProcessLookupError):
        os.killpg(ran.pid, 0)


def test_a_closed_pipe_and_wrong_arguments_end_it(path):
    with open("/dev/full", "wb") as full:
        assert run(path, 1, stdout=full).returncode == 1
    assert subprocess.run([path, "1"], timeout=30).returncode == 2


def test_as_many_samples_as_there_is_room_for_fit(path):
    found = said(path, 0b11, samples=MOST_SAMPLES, nanoseconds=1)
    assert [len(found.samples[place]) for place in (0, 1)] == [MOST_SAMPLES] * 2


def test_the_program_is_small_and_the_same_each_time():
    assert program() == program()
    assert len(program()) < 4096


@pytest.mark.parametrize(
    "text", ["", "0 0 0 0\n", "1 2\n0\n", "0 0 0 0\nx\n1\n", "0 0 0 0\n1 2\n1\n", "hello"]
)
def test_other_words_than_its_own_are_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011  (int's words, or ours)
        parse(text)


def test_a_run_is_read_line_by_line():
    found = parse("80000000 4b4d564b 564b4d56 4d\n0 64 c8\n0 64 64\nd 0 16\n77359400\n")
    assert found.signature == "KVMKVMKVM"
    assert found.samples == {0: (2.0, 1.0)}
    assert found.failed == {13: 22}
    assert found.seconds == 2.0
    assert parse("0 4b4d564b 564b4d56 4d\n1\n").signature == ""
