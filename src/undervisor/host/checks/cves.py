"""Vulnerabilities of nested virtualization in Linux, by kernel version and stable branch: data.

The fixed versions are those of the CVE records (cvelistV5, Linux CNA, as of 2026-05-28) or, for
older ones, of linux_kernel_cves, where `listed` is true.  For records that list no stable branches
only the mainline release is known here, and branches before it are said to be unknown.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from undervisor.host.facts.version import Flavour, Version, parse_version

RECORDS_OF = "2026-05-28"


@dataclass(frozen=True, slots=True)
class Cve:
    """One vulnerability.  `extension` is vmx, svm or empty for both; `since` the first affected
    release; `fixed` the first fixed one of mainline; `stable` that of each stable branch."""

    id: str
    extension: str
    what: str
    fixed: str
    since: str = "0.0"
    stable: tuple[str, ...] = ()
    listed: bool = False
    branches: dict[tuple[int, int], Version] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        versions = [parse_version(text) for text in self.stable]
        object.__setattr__(self, "branches", {v.branch: v for v in versions})


CVES: tuple[Cve, ...] = (
    Cve("CVE-2018-12904", "vmx", "an L1 program may execute VMX instructions without CPL 0",
        "4.18-rc1", stable=("4.17.2",)),
    Cve("CVE-2018-16882", "vmx", "use after free of the nested posted-interrupt descriptor",
        "4.20", stable=("4.14.91", "4.19.13")),
    Cve("CVE-2019-7221", "vmx", "use after free of the nested preemption timer", "5.0-rc6"),
    Cve("CVE-2019-3887", "vmx", "L2 reaches the host's x2APIC MSRs", "5.1-rc4", since="4.16"),
    Cve("CVE-2020-2732", "vmx", "emulating an L2 instruction reaches L1's resources", "5.6-rc4"),
    Cve("CVE-2021-29657", "svm", "VMRUN reads vmcb12 twice, so L1 reaches the host's MSRs",
        "5.12", since="5.10", stable=("5.11.12",)),
    Cve("CVE-2021-3653", "svm", "L1 enables AVIC for L2, which then writes host memory",
        "5.14-rc7", listed=True,
        stable=("4.4.282", "4.9.281", "4.14.245", "4.19.205", "5.4.142", "5.10.60", "5.13.12")),
    Cve("CVE-2021-3656", "svm", "L2 executes VMLOAD and VMSAVE on host memory", "5.14-rc7",
        since="4.13", listed=True,
        stable=("4.14.245", "4.19.205", "5.4.142", "5.10.60", "5.13.12")),
    Cve("CVE-2022-3344", "svm", "L1 that does not intercept SHUTDOWN panics the host",
        "6.1-rc7"),
    Cve("CVE-2022-45869", "", "a race in the TDP MMU with nested guests corrupts host state",
        "6.1-rc7"),
    Cve("CVE-2022-2196", "vmx", "no branch-predictor barrier between L2 and L1", "6.2",
        since="5.8"),
    Cve("CVE-2023-30456", "vmx", "guest CR0 and CR4 are not checked on nested VM entry",
        "6.3-rc3", stable=("6.2.8",)),
    Cve("CVE-2024-50115", "svm", "PDPTEs are read past a page because nCR3 bits 4:0 count",
        "6.12", since="3.2", listed=True,
        stable=("5.10.229", "5.15.170", "6.1.115", "6.6.59", "6.11.6")),
    Cve("CVE-2026-45987", "svm", "a restored L2 loses its interrupt shadow and can hang",
        "7.1-rc1", since="5.8", listed=True,
        stable=("6.6.140", "6.12.86", "6.18.27", "7.0.4")),
    Cve("CVE-2026-46032", "svm", "a failure to restore L1's CR3 is ignored", "7.1-rc1",
        since="5.9", listed=True, stable=("7.0.4",)),
    Cve("CVE-2026-46071", "svm", "a clean bit in vmcb12 is changed behind L1's back",
        "7.1-rc1", since="5.19", listed=True, stable=("6.18.27", "7.0.4")),
    Cve("CVE-2026-46076", "svm", "VMMCALL of L2 is taken for a hypercall of L1", "7.1-rc1",
        since="6.2", listed=True, stable=("6.12.86", "6.18.27", "7.0.4")),
    Cve("CVE-2026-46131", "", "a Hyper-V TLB flush of L2 without nested paging is not checked",
        "7.1-rc3", since="6.2", listed=True,
        stable=("6.6.140", "6.12.88", "6.18.30", "7.0.7")),
)  # fmt: skip


class Status(Enum):
    """What a kernel's version says about a vulnerability."""

    FIXED = "fixed"
    NOT_AFFECTED = "not affected"
    VULNERABLE = "vulnerable"
    UNKNOWN = "unknown"


def status(cve: Cve, version: Version, flavour: Flavour) -> Status:
    """Judge one kernel.  A version at or past the fix has it, whoever built it; a version before
    the fix is vulnerable only if it is a kernel.org build, for others backport."""
    stable = cve.branches.get(version.branch)
    if version >= parse_version(cve.fixed) or (stable and version >= stable):
        return Status.FIXED
    if flavour is not Flavour.UPSTREAM:
        return Status.UNKNOWN
    if version < parse_version(cve.since):
        return Status.NOT_AFFECTED
    if stable or cve.listed:
        return Status.VULNERABLE
    # The record names no stable branches: a point release may hold a backport that we don't know.
    return Status.UNKNOWN if version.patch else Status.VULNERABLE
