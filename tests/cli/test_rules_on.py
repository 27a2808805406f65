"""`undervisor rules --on TARGET`."""

import json

import pytest

from undervisor.cli import rules_on
from undervisor.cli.main import main
from undervisor.conformance.entries.comparison import Cell, Column, from_json
from undervisor.conformance.entries.session import Result


def run(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(["rules", *words])
    return ended.value.code, capsys.readouterr()


def test_the_rules_of_a_pattern_are_broken_on_the_built_in_l0(capsys):
    code, output = run(capsys, "svm.np.*", "--on", "builtin", "--cpu", "amd")
    assert code == 0
    lines = [line.split() for line in output.out.splitlines()]
    assert ["svm.np.n_cr3.high", "VMEXIT_INVALID", "agrees"] in lines
    assert output.out.splitlines()[-1] == "builtin: SVM 5 agrees"


def test_json_is_what_can_be_read_back(capsys):
    code, output = run(capsys, "svm.cr0.*", "--on", "builtin", "--cpu", "amd-epyc", "--json")
    (column,) = from_json(json.loads(output.out))
    assert code == 0
    assert (column.target, column.cpus) == ("builtin", ("amd-epyc",))
    assert {c.result for c in column.cells.values()} == {Result.AGREES}
    assert column.version.startswith("undervisor ")


@pytest.mark.parametrize(
    "words",
    [
        ["--on", "nowhere"],
        ["--on", "builtin", "--cpu", "no-such-model"],
        ["--on", "builtin", "--on", "qemu", "--cpu", "amd"],
        ["no-such-rule", "--on", "builtin"],
    ],
)
def test_what_cannot_be_done_is_told(capsys, words):
    code, output = run(capsys, *words)
    assert code == 2
    assert "Traceback" not in output.err


def fake(name, cells):
    return Column(name, "", ("a-cpu",), cells)


def test_targets_are_columns_and_a_difference_comes_with_the_manual_s_words(capsys, monkeypatch):
    agrees = Cell("a-cpu", Result.AGREES, "VMEXIT_INVALID", "VMEXIT_INVALID")
    differs = Cell("a-cpu", Result.DIFFERS, "VMEXIT_INVALID", "L2 was entered [at once]")
    absent = Cell("a-cpu", Result.NOT_APPLICABLE, why="it has none")
    columns = {
        "builtin": fake("builtin", {"svm.np.g_pat.type": agrees, "svm.asid.zero": absent}),
        "qemu": fake("qemu", {"svm.np.g_pat.type": differs}),
    }
    monkeypatch.setattr(rules_on, "_column", lambda name, cpus, rules: columns[name])
    code, output = run(capsys, "svm.*", "--on", "builtin", "--on", "qemu")
    assert code == 1
    first = next(line for line in output.out.splitlines() if line.startswith("svm.np.g_pat.type "))
    assert "agrees" in first
    assert "differs: L2 was entered [at once]" in first
    assert "not applicable: it has none" in output.out
    assert "svm.np.g_pat.type on qemu, a-cpu: L2 was entered [at once]" in output.out
    assert "unsupported type encoding" in output.out
    assert output.out.splitlines()[-1] == "qemu: SVM 1 differs"
