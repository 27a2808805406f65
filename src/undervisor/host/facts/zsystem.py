"""IBM Z: the levels in /proc/sysinfo and what nesting needs there."""

from __future__ import annotations

import re
from dataclasses import dataclass

from undervisor.host.access.protocol import Host
from undervisor.host.fact import Absent, Fact, Known, then
from undervisor.host.facts.processor import Processor


@dataclass(frozen=True, slots=True)
class Level:
    """One level of virtualization: `number` 0 is the machine's own firmware hypervisor."""

    name: str
    control_program: str


@dataclass(frozen=True, slots=True)
class Zsystem:
    """What /proc/sysinfo tells; absent on other architectures."""

    levels: Fact[tuple[Level, ...]]


def parse_sysinfo(text: str) -> tuple[Level, ...]:
    """LPAR and VMnn levels, the outermost first."""
    if "Type:" not in text and "LPAR" not in text:
        raise ValueError("not a system information file")
    found = []
    if re.search(r"^LPAR Number:", text, re.M):
        found.append(Level("LPAR", "PR/SM"))
    # VM00 is the level nearest to this machine.
    programs = re.findall(r"^VM(\d\d) Control Program:\s*(\S[^\n]{0,40})", text, re.M)
    for number, program in sorted(programs, reverse=True):
        found.append(Level(f"VM{number}", program.strip()))
    return tuple(found)


def zsystem(host: Host, processor: Processor) -> Zsystem:
    """Read the levels."""
    if not (isinstance(processor.architecture, Known) and processor.architecture.value == "s390x"):
        return Zsystem(Absent("/proc/sysinfo"))
    return Zsystem(then(host.read_text("/proc/sysinfo"), parse_sysinfo))
