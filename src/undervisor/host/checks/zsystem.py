"""IBM Z: the levels, and the two parameters that exclude each other."""

from __future__ import annotations

from collections.abc import Iterator

from undervisor.host.checks.finding import Finding, Kind, Layer, Level
from undervisor.host.fact import Known, value_or
from undervisor.host.facts.machine import Machine

HPAGE = Kind(
    "hpage-excludes-nested", Layer.KERNEL, Level.FAIL, "hpage is on, which excludes nesting",
    "On s390x KVM backs guests with huge pages (hpage=1) or lets them nest (nested=1), not both; "
    "with both the module does not load.",
    "modprobe -r kvm; modprobe kvm hpage=0 nested=1, and the same in /etc/modprobe.d "
    "(sudo undervisor enable does both).",
    ("Linux Documentation, Running nested guests with KVM (s390x)",),
)  # fmt: skip
LEVELS = Kind(
    "z-levels", Layer.PLACE, Level.NOTE, "The levels of this IBM Z machine",
    "As /proc/sysinfo lists them, the outermost first. A bug report should hold this file.",
)  # fmt: skip


def check(machine: Machine) -> Iterator[Finding]:
    """Findings about IBM Z."""
    levels = machine.zsystem.levels
    if isinstance(levels, Known) and levels.value:
        yield LEVELS.found(*(f"{level.name}: {level.control_program}" for level in levels.value))
    if machine.processor.extension != "sie":
        return
    hpage = value_or(machine.kvm.parameter("hpage"), "0")
    if hpage in ("1", "Y"):
        yield HPAGE.found(f"/sys/module/kvm/parameters/hpage is {hpage}")
