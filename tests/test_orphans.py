"""A process that goes with the one that it works for."""

import select
import subprocess
import sys

ENDS = "import os; from undervisor.orphans import die_with; die_with({parent}); print('lives')"


def run(parent):
    code = ENDS.format(parent=parent)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)


def test_a_child_of_its_parent_lives():
    assert run("os.getppid()").stdout == "lives\n"


def test_a_child_whose_parent_has_died_already_ends():
    done = run("os.getpid()")  # which is nobody's parent
    assert (done.returncode, done.stdout) == (1, "")


def test_a_child_is_killed_when_its_parent_dies():
    middle = (
        "import os, subprocess, sys\n"
        "from undervisor.orphans import die_with\n"
        "parent, pid = os.getpid(), os.fork()\n"
        "if not pid:\n"
        "    die_with(parent)\n"
        "    print('ready', flush=True)\n"
        "    os.read(0, 1)\n"
        "os.read(0, 1)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", middle], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        process.kill()
        assert select.select([process.stdout], [], [], 20)[0], "the child lives on"
        assert process.stdout.read() == b""  # the line ends when the child has ended too
