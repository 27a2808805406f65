"""What the kernel says about the processor's vulnerabilities and about access control."""

from __future__ import annotations

from dataclasses import dataclass

from undervisor.host.access.protocol import Host
from undervisor.host.fact import Fact, Known, value_or

_VULNERABILITIES = "/sys/devices/system/cpu/vulnerabilities"


@dataclass(frozen=True, slots=True)
class Security:
    """`vulnerabilities`: file name to text.  `lsm`: the active security modules.
    `selinux`: 1 where it enforces."""

    vulnerabilities: Fact[dict[str, str]]
    lsm: Fact[str]
    selinux: Fact[str]


def security(host: Host) -> Security:
    """Read them."""
    names = host.listdir(_VULNERABILITIES)
    vulnerabilities: Fact[dict[str, str]]
    if isinstance(names, Known):
        texts = {
            n: value_or(host.read_line(f"{_VULNERABILITIES}/{n}"), "") for n in names.value[:100]
        }
        vulnerabilities = Known({n: t for n, t in texts.items() if t}, _VULNERABILITIES)
    else:
        vulnerabilities = names
    return Security(
        vulnerabilities,
        host.read_line("/sys/kernel/security/lsm"),
        host.read_line("/sys/fs/selinux/enforce"),
    )
