"""The processor as `/proc/cpuinfo` shows it, on every architecture that KVM knows."""

from __future__ import annotations

import re
from dataclasses import dataclass

from undervisor.host.access.protocol import Host
from undervisor.host.fact import Fact, Known, then, value_or

INTEL = ("GenuineIntel", "CentaurHauls", "  Shanghai  ")
"""Vendors whose processors have VMX; Centaur and Zhaoxin implement Intel's extension."""

AMD = ("AuthenticAMD", "HygonGenuine")
"""Vendors whose processors have SVM."""

_FLAG_KEYS = ("flags", "features", "Features", "isa")


@dataclass(frozen=True, slots=True)
class Processor:
    """What the kernel says about its first processor, and how many there are."""

    architecture: Fact[str]
    vendor: Fact[str]
    name: str
    family: int
    model: int
    flags: Fact[frozenset[str]]
    vmx_flags: frozenset[str]
    count: int

    @property
    def extension(self) -> str:
        """The flag of the vendor's virtualization extension: vmx, svm or sie; else empty."""
        vendor = value_or(self.vendor, "")
        if vendor in INTEL:
            return "vmx"
        if vendor in AMD:
            return "svm"
        return "sie" if vendor.startswith("IBM/S390") else ""

    @property
    def x86(self) -> bool:
        """Whether this is an x86 processor of 64 or 32 bits."""
        return re.fullmatch(r"x86_64|i[3-6]86", value_or(self.architecture, "")) is not None

    def has(self, flag: str) -> bool | None:
        """Whether the kernel shows `flag`; None where the flags are not known."""
        if not isinstance(self.flags, Known):
            return None
        return flag in self.flags.value or flag in self.vmx_flags


def parse_cpuinfo(text: str) -> dict[str, str]:
    """Keys and values of the first processor; the first value of a key wins."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon and len(key) < 64:
            found.setdefault(key.strip(), value.strip())
    return found


def _flags(fields: dict[str, str]) -> frozenset[str]:
    for key in _FLAG_KEYS:
        if key in fields:
            return frozenset(fields[key].split())
    raise ValueError("no line of flags")


def _count(text: str) -> int:
    """Processors listed, in the forms of x86 (`processor : 0`) and s390x (`# processors : 4`)."""
    total = re.search(r"^# processors\s*:\s*(\d{1,5})$", text, re.M)
    return int(total[1]) if total else len(re.findall(r"^processor\s*(?:\d+)?\s*:", text, re.M))


def _vendor(fields: dict[str, str]) -> str:
    for key in ("vendor_id", "CPU implementer", "cpu", "mvendorid", "uarch"):
        if fields.get(key):
            return fields[key]
    raise ValueError("no line of a vendor")


def _integer(text: str) -> int:
    return int(text) if text.isdigit() and len(text) < 6 else 0


def processor(host: Host) -> Processor:
    """Read the processor's facts."""
    machine = host.run(["uname", "-m"])
    cpuinfo = host.read_text("/proc/cpuinfo", 4 << 20)
    fields = parse_cpuinfo(value_or(cpuinfo, ""))
    return Processor(
        architecture=then(machine, lambda output: _architecture(output.stdout)),
        vendor=then(cpuinfo, lambda _: _vendor(fields)),
        name=fields.get("model name", fields.get("cpu", "")),
        family=_integer(fields.get("cpu family", "")),
        model=_integer(fields.get("model", "")),
        flags=then(cpuinfo, lambda _: _flags(fields)),
        vmx_flags=frozenset(fields.get("vmx flags", "").split()),
        count=_count(value_or(cpuinfo, "")),
    )


def _architecture(text: str) -> str:
    word = text.strip()
    if not re.fullmatch(r"[a-z0-9_]{2,16}", word):
        raise ValueError(f"uname says {word[:40]!r}")
    return word
