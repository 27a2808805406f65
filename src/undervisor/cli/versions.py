"""What version of a target's program is installed here."""

from __future__ import annotations

import re
import subprocess
from typing import Final

from undervisor import __version__
from undervisor.errors import BadInput

_VERSIONS: Final = {
    "qemu": (("qemu-system-x86_64", "--version"), r"QEMU emulator version ([\d.]+)"),
    "bochs": (("bochs-bin", "--help", "cpu"), r"Bochs x86 Emulator ([\d.]+)"),
}
"""What a program is asked for its version, and where it is in the answer."""
_PATIENCE: Final = 20.0


def version_of(name: str) -> str:
    """What a target says of its version; empty where it says nothing."""
    if name == "builtin":
        return f"undervisor {__version__}"
    if name in ("lab", "linux"):
        return _kernel(name)
    if name not in _VERSIONS:
        return ""
    command, pattern = _VERSIONS[name]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PATIENCE
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(pattern, done.stdout + done.stderr)
    return f"{name} {found[1]}" if found else ""


def _kernel(name: str) -> str:
    """The kernel of a lab's L1, or of the target `linux`, and what it runs on."""
    from undervisor.lab.cache import Cache
    from undervisor.lab.machines import TCG, accelerator
    from undervisor.lab.plan import Plan
    from undervisor.lab.sources import sources, version

    plan = Plan()
    try:
        kernel = sources(plan, Cache()).kernel
    except BadInput:
        return ""
    if name == "linux":
        below = version_of("builtin")
    else:
        below = version_of("qemu") if accelerator(plan) == TCG else "hardware"
    return f"Linux {version(kernel.read_bytes(), kernel.name)} on {below}"
