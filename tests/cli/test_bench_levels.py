"""`undervisor bench --levels`: from the command line to the table, the JSON and the pictures."""

import json
import os
from xml.etree import ElementTree

import pytest
from guests import undervisor

from undervisor.lab.levels.measures import DISK, MEASURES

TITLES = [one.title for one in MEASURES]


def test_a_machine_against_itself_costs_nothing_more(tmp_path):
    """The control: the same machine as L0 and as L1, so every ratio should be one."""
    svg, html = tmp_path / "levels.svg", tmp_path / "levels.html"
    found = undervisor("bench", "--levels", "--quick", "--json", "--picture", str(svg),
                       "--picture", str(html), "here", "here")  # fmt: skip
    assert found.status == 0, found.err
    said = json.loads(found.out)
    rows = {row["key"]: row for row in said["rows"]}
    assert [row["title"] for row in said["rows"]] == TITLES
    for key, row in rows.items():
        assert not row["missing"] or key in DISK, row
    for key in ("cpu", "latency-32k", "syscall"):  # those that nothing else on the machine slows
        (ratio,) = rows[key]["ratios"]
        assert 0.5 < ratio["middle"] < 2, ratio
        assert ratio["verdict"] == "not judged"
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    assert "<svg" in html.read_text()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--levels", "here"], "compared with nothing"),
        (["--levels", "l1=here", "l1=here"], "L1 is not inside L1"),
        (["--levels", "l2=here", "here"], "L1 is not inside L2"),
        (["--levels", "here", "lab:l1"], "the lab lab does not run"),
        (["--levels", "here", "-o"], "-o"),
        (["--levels", "here", "here", "--picture", "levels.png"], "no picture of that kind"),
        (["--levels", "--picture", "/nowhere/levels.svg"], "there is no such folder"),
        (["here"], "are for --levels"),
        (["--picture", "levels.svg"], "are for --levels"),
    ],
)
def test_what_is_meant_wrongly_is_told(words, why, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    found = undervisor("bench", *words)
    assert found.status == 2
    assert why in found.err


@pytest.mark.deep
@pytest.mark.qemu
def test_the_levels_of_a_lab_are_measured(tmp_path, monkeypatch):
    """L0 here, L1 emulated or not, L2 under L1's KVM: everything at each of them."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    found = undervisor("bench", "--levels", "--quick", "--json", timeout=400)
    assert found.status in (0, 1), found.err
    said = json.loads(found.out)
    assert [level["name"] for level in said["levels"]] == ["L0", "L1", "L2"]
    assert said["levels"][2]["below"] == "KVMKVMKVM"
    emulated = said["levels"][1]["below"] == "TCGTCGTCGTCG"
    assert bool(said["emulated"]) == emulated
    rows = {row["key"]: row for row in said["rows"]}
    for key, row in rows.items():
        if key not in DISK:
            assert [ratio["name"] for ratio in row["ratios"]] == ["L1/L0", "L2/L1", "L2/L0"], row
    disk = {tuple(sorted(rows[key]["missing"])) for key in DISK}
    assert disk in ({()}, {("L0", "L1", "L2")}), "the levels share one disk, or there is none"
    exit_of_l2 = rows["exit"]["nanoseconds"]["L2"]["low"]
    assert exit_of_l2 > 100 * rows["cpu"]["nanoseconds"]["L2"]["low"]
    if emulated:
        verdicts = {ratio["verdict"] for row in rows.values() for ratio in row["ratios"]}
        assert verdicts == {"not judged"}
    assert not [name for name in os.listdir(tmp_path / "undervisor") if name.startswith("run-")]
