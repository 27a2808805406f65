"""The suite in docs/test-your-hypervisor.md is real: it prints what the document shows."""

import multiprocessing.forkserver
import re
from importlib import resources
from pathlib import Path

import undervisor.api
from undervisor.testing import fixture, remote, report

pytest_plugins = ["pytester"]

KEPT = (undervisor.api, multiprocessing.forkserver, fixture, remote, report)
"""Not forgotten after the suite: see test_pytest_plugin."""
DOCUMENT = (Path(__file__).parents[2] / "docs" / "test-your-hypervisor.md").read_text()


def test_the_suite_of_the_guide_prints_what_the_guide_shows(pytester):
    suite = re.search(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)[1]
    command, *shown = re.search(r"```\n(\$ pytest .*?)\n```", DOCUMENT, re.DOTALL)[1].splitlines()
    pytester.makepyfile(test_hypervisor=suite)
    image = resources.files("undervisor") / "data" / "examples" / "vmx.elf"
    (pytester.path / "vmx.elf").write_bytes(image.read_bytes())
    options = command.removeprefix("$ pytest ").split()
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", *options)
    printed = iter(result.stdout.lines)
    for line in shown:
        if line.strip() != "...":  # left out in the document, as are percentage and time
            assert any(one.startswith(line) for one in printed), line
