"""Well-known tools: what their output says, and which machines have them."""

import json
import shutil
import sys
from dataclasses import replace

import pytest

from undervisor.errors import BadInput
from undervisor.host.access.live import LiveHost
from undervisor.lab.levels.tools import TOOLS, has

BY_KEY = {tool.measure.key: tool for tool in TOOLS}
SAID = {
    "sysbench-cpu": "CPU speed:\n    events per second:   955.22\n\nGeneral statistics:\n",
    "sysbench-memory": "12744.00 MiB transferred (12487.02 MiB/sec)\n",
    "fio-read": "note: iodepth >= 1\n" + json.dumps({"jobs": [{"read": {"iops": 6229.5}}]}),
}  # fmt: skip
RATES = {"sysbench-cpu": 955.22, "sysbench-memory": 12487.02, "fio-read": 6229.5}


@pytest.mark.parametrize("key", sorted(SAID))
def test_the_rate_is_the_one_that_the_tool_says(key):
    assert BY_KEY[key].rate(SAID[key]) == RATES[key]


def test_every_tool_has_an_example_here():
    assert set(SAID) == set(BY_KEY)


@pytest.mark.parametrize("key", sorted(SAID))
@pytest.mark.parametrize(
    "text", ["", "FATAL: unknown option", "{}", '{"jobs": []}', "events per second:   0.00",
             "(0.00 MiB/sec)", '{"jobs": [{"read": {"iops": 0}}]}', '{"jobs": [3]}']
)  # fmt: skip
def test_output_without_a_rate_is_refused(key, text):
    with pytest.raises(ValueError, match=r"."):
        BY_KEY[key].rate(text)


def test_only_what_reads_a_disk_needs_one():
    assert {key for key, tool in BY_KEY.items() if tool.needs_disk} == {"fio-read"}


def test_a_machine_has_the_commands_that_answer():
    assert has(LiveHost(), sys.executable)
    assert not has(LiveHost(), "/nowhere/sysbench")


def test_a_tool_that_fails_says_whose_and_how():
    failing = replace(BY_KEY["fio-read"], words=("sh", "-c", "echo no DISK of BYTES >&2; exit 3"))
    with pytest.raises(BadInput, match="this machine: sh failed: no /dev/vda of 4096"):
        failing.run(LiveHost(), "/dev/vda", 4096)


def test_a_tools_cost_is_the_time_of_one_of_what_it_counts():
    tool = replace(BY_KEY["sysbench-cpu"], words=("echo", "events per second: 250000"))
    assert tool.run(LiveHost(), "", 0) == 4000.0


def of_real_tools():
    for key, tool in sorted(BY_KEY.items()):
        name = tool.words[0]
        skip = pytest.mark.skipif(not shutil.which(name), reason=f"no {name} here")
        yield pytest.param(key, marks=skip)


@pytest.mark.parametrize("key", list(of_real_tools()))
def test_the_real_tool_gives_a_rate(key, tmp_path):
    tool = BY_KEY[key]
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    assert 0 < tool.run(LiveHost(), str(disk), 1 << 20) < 1e9
