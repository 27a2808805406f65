"""A lab for the tests that need a running one: with the cache of this user, so it is quick."""

import subprocess
import sys


def undervisor(*words, timeout=600, **more):
    """The command line, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "undervisor", *words],
        capture_output=True,
        text=True,
        timeout=timeout,
        **more,
    )
