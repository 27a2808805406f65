"""The summary counts each exit once, for whoever it was."""

import io
import json

from rich.console import Console
from trace_things import Cell

from undervisor.report.trace.summary import Run, Whose, sentence, table, tree, whose

CELLS = {
    (0, 1, 1, "CPUID"): Cell(10, 20_000),
    (0, 1, 2, "VMRUN"): Cell(3, 60_000),
    (0, 2, 1, "#VMEXIT(CPUID)"): Cell(2, 16_000),
    (0, 2, 2, "IOIO"): Cell(5, 25_000),
    (1, 1, 1, "CPUID"): Cell(4, 8_000),
}


def run(cells=CELLS, cpus=2):
    return Run("an.elf", "amd", cpus, 256 << 20, "it ended", 1, 45_000_000, 0.5, 90 << 20, cells)


def printed(thing):
    file = io.StringIO()
    Console(file=file, width=120).print(thing)
    return file.getvalue()


def test_an_exit_belongs_to_the_level_that_left_and_the_one_that_goes_on():
    assert whose(1, 1) is Whose.L1
    assert whose(1, 2) is Whose.ENTRY
    assert whose(2, 1) is Whose.L2_TO_L1
    assert whose(2, 2) is Whose.L2_TO_L0


def test_counts_add_up_however_they_are_asked_for():
    found = run()
    assert found.count() == 24
    assert found.count(0) + found.count(1) == 24
    assert sum(found.count(kind=kind) for kind in Whose) == 24
    assert sum(count for *_, count, _ in found.rows()) == 24


def test_the_same_reason_on_two_vcpus_is_one_row():
    rows = [row for row in run().rows() if row[1] == "CPUID"]
    assert rows == [(1, "CPUID", Whose.L1, 14, 28_000)]


def test_rows_are_by_level_and_then_the_most_frequent_first():
    assert [(level, count) for level, _, _, count, _ in run().rows()] == [
        (1, 14),
        (1, 3),
        (2, 5),
        (2, 2),
    ]


def test_the_tree_shows_every_level_of_every_vcpu():
    text = printed(tree(run()))
    assert "L0  undervisor: CPU model amd, 2 vCPUs, 256 MiB" in text
    assert "L1  an.elf" in text
    assert "L2  entered 3 times, 7 exits: 2 reflected to L1, 5 handled by L0" in text
    assert "vCPU 1: 4 exits of L1" in text
    assert "no L2" in text


def test_the_table_gives_what_one_exit_cost():
    line = next(line for line in printed(table(run())).splitlines() if "VMRUN" in line)
    assert "20.0" in line
    assert "L0: enters L2" in line


def test_a_long_table_says_that_it_goes_on():
    many = {(0, 1, 1, f"R{n}"): Cell() for n in range(40)}
    text = printed(table(run(many | {(0, 2, 1, "RARE"): Cell(99)})))
    assert "11 more rows" in text
    assert "RARE" in text  # the frequent ones stay, whatever their level


def test_the_document_is_json_with_the_same_numbers():
    found = json.loads(json.dumps(run().as_json()))
    assert found["type"] == "summary"
    assert sum(row["count"] for row in found["exits"]) == 24
    assert found["vcpus"][0]["l2_to_l1"] == 2


def test_a_run_without_an_exit_can_be_summed_up():
    empty = run({}, cpus=1)
    assert empty.rows() == []
    assert "0 exits" in sentence(empty)
    assert "no L2" in printed(tree(empty))
