"""How much of this process is in memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from undervisor.hypervisor.machine import Machine


def resident_bytes() -> int:
    """All of this process that is in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def resident_beside_ram(machine: Machine) -> int:
    """Bytes of this process in memory, without the guest's RAM."""
    return resident_bytes() - _resident_ram(machine)


def _resident_ram(machine: Machine) -> int:
    """What of the mappings that hold the guest's RAM is in memory."""
    ram = [(start, start + size) for _, size, start in machine.memory.regions()[:-1]]
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            low, high = (int(part, 16) for part in first.split("-"))
            inside = any(start < high and low < end for start, end in ram)
        elif inside and first == "Rss:":
            total += int(rest.split()[0]) << 10
    return total
