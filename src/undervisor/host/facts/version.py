"""Version numbers of kernels and programs, and where a kernel comes from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from functools import total_ordering


@total_ordering
@dataclass(frozen=True, slots=True)
class Version:
    """`major.minor.patch`; a release candidate sorts before its release."""

    major: int
    minor: int
    patch: int = 0
    candidate: int | None = None

    def __str__(self) -> str:
        tail = f".{self.patch}" if self.patch else ""
        return f"{self.major}.{self.minor}{tail}" + (
            f"-rc{self.candidate}" if self.candidate else ""
        )

    def __lt__(self, other: Version) -> bool:
        return self.key < other.key

    @property
    def key(self) -> tuple[int, int, int, int]:
        """What versions are ordered by."""
        final = 1 << 30
        return (self.major, self.minor, self.patch, self.candidate or final)

    @property
    def branch(self) -> tuple[int, int]:
        """The stable branch that it belongs to."""
        return (self.major, self.minor)


class Flavour(Enum):
    """Who built the kernel: how far its number can be trusted about fixes."""

    UPSTREAM = "a kernel.org release"
    DISTRIBUTION = "a distribution's kernel, which may carry fixes that its number does not show"
    CUSTOM = "a kernel with changes of its own, which may carry fixes that its number does not show"


_VERSION = re.compile(r"(\d{1,4})\.(\d{1,4})(?:\.(\d{1,5}))?(?:-rc(\d{1,3}))?")
_DISTRIBUTION = re.compile(
    r"-\d+-(?:generic|amd64|cloud-amd64|lowlatency|azure|aws|gcp|kvm|oracle|default|pve|lts)"
    r"|\.(?:el|fc|amzn|oe|cm|azl|mga)\d|-pve$|-arch\d|-MANJARO|-default$|-gentoo|-deb\d+-"
    r"|-\d+-(?:microsoft-standard)|-(?:s390x|arm64|powerpc64le)$|-\d+\.\d+(?:\.\d+)?-default"
)


def parse_version(text: str) -> Version:
    """The first version number in `text`; ValueError where there is none."""
    match = _VERSION.search(text[:4096])
    if not match:
        raise ValueError(f"no version in {text[:60]!r}")
    major, minor, patch, candidate = match.groups()
    return Version(int(major), int(minor), int(patch or 0), int(candidate) if candidate else None)


def flavour(release: str) -> Flavour:
    """Where a kernel comes from, by its release string (`uname -r`)."""
    if re.fullmatch(r"\d+\.\d+(?:\.\d+)?(?:-rc\d+)?\+?", release):
        return Flavour.CUSTOM if release.endswith("+") else Flavour.UPSTREAM
    return Flavour.DISTRIBUTION if _DISTRIBUTION.search(release) else Flavour.CUSTOM
