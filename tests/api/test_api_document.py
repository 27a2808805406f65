"""The worked example in the document works, and says what its comments say."""

import re
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "api.md"


def examples():
    return re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


def test_the_worked_example_runs_as_it_is_printed(capsys):
    exec(compile(examples()[0], str(DOCUMENT), "exec"), {})
    out = capsys.readouterr().out
    assert "VMLAUNCH on vCPU 0" in out
    assert "its code: 0fa2" in out
    assert re.search(r"gpa 0x\w+ hpa 0x\w+", out)
    assert "write to the debug exit port" in out
    assert re.search(r"[1-9]\d* undefined instructions of L2", out)


def test_the_example_of_a_child_runs_too():
    space = {}
    exec(compile(examples()[1], str(DOCUMENT), "exec"), space)
    image = DOCUMENT.parents[1] / "src" / "undervisor" / "data" / "examples" / "svm.elf"
    end = space["status"](str(image))
    assert end.status == 1
