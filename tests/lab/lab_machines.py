"""The command line in a process of its own, for the tests that need a running lab."""

import os
import subprocess
import sys
from pathlib import Path


def undervisor(*words, runtime, timeout=300):
    """Run it; its labs are in the folder `runtime`, its cache is this user's."""
    return subprocess.run(
        [sys.executable, "-m", "undervisor", *words],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=timeout,
        env={**os.environ, "XDG_RUNTIME_DIR": str(runtime)},
    )


def machines_in(runtime):
    """The processes whose folder or arguments are below `runtime`: keepers, and QEMU."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            where = os.readlink(entry / "cwd")
            words = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(runtime) in where or str(runtime) in words:
            found.append(words.replace("\0", " ").strip())
    return found
