"""The slow half of the lab: more processors, a third level, the toolkit inside L1."""

import json

import pytest
from lab_machines import machines_in, undervisor

from undervisor.lab import python
from undervisor.lab.cache import Cache

pytestmark = [pytest.mark.qemu, pytest.mark.deep, pytest.mark.xdist_group("lab")]


@pytest.mark.parametrize(
    ("words", "levels", "cpus"),
    [(["--smp", "2"], 2, 2), (["--depth", "3"], 3, 1)],
    ids=["two processors", "three levels"],
)
def test_a_lab_is_proven(tmp_path, words, levels, cpus):
    ran = undervisor("lab", "run", "--json", *words, runtime=tmp_path, timeout=900)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    said = json.loads(ran.stdout)
    assert said["proven"]
    assert [level["cpus"] for level in said["levels"]] == [cpus] * levels
    assert machines_in(tmp_path) == []


def test_python_for_l1_is_the_same_bytes_each_time(tmp_path):
    made = []
    for name in ("one", "other"):
        paths = python.archives(Cache(tmp_path / name))
        made.append([(path.name, path.read_bytes()) for path in paths])
    assert made[0] == made[1]


@pytest.fixture(scope="module")
def inside(tmp_path_factory):
    """Runs the toolkit in an L1 that has Python."""
    runtime = tmp_path_factory.mktemp("lab")
    ran = undervisor("lab", "up", "--with-python", runtime=runtime, timeout=900)
    assert ran.returncode == 0, ran.stdout + ran.stderr

    def run(command):
        words = ("lab", "sh", "--timeout", "400", "l1", command)
        return undervisor(*words, runtime=runtime, timeout=500)

    yield run
    undervisor("lab", "down", runtime=runtime)


def test_check_runs_inside_l1(inside):
    ran = inside("undervisor check --json")
    said = json.loads(ran.stdout)
    assert {"kvm-loaded", "nested-on", "device-usable", "qemu"} <= {
        f["id"] for f in said["findings"]
    }
    assert ran.returncode == 0


def test_caps_runs_inside_l1(inside):
    said = json.loads(inside("undervisor caps here --json").stdout)
    assert said["vendor"] == "svm"


def test_exits_of_l2_are_seen_by_the_toolkit_inside_l1(inside):
    said = json.loads(inside("undervisor exits --stats --seconds 1 --json").stdout)
    assert said["totals"]["exits"] > 500


def test_exits_of_l2_are_traced_inside_l1(inside):
    said = json.loads(inside("undervisor exits --seconds 2 --json").stdout)
    assert said


def test_a_report_is_written_inside_l1(inside):
    ran = inside("undervisor report /tmp/r.zip --l1 here; [ -s /tmp/r.zip ] && echo there")
    assert "evidence is from L1" in ran.stdout
    assert ran.stdout.endswith("there\n")
