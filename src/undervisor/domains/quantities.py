"""Sizes as people and libvirt write them, and sets of processors as the kernel writes them."""

from __future__ import annotations

import re

from undervisor.errors import BadInput

_BYTES = {
    "b": 1, "bytes": 1, "kb": 10**3, "k": 1 << 10, "kib": 1 << 10, "mb": 10**6, "m": 1 << 20,
    "mib": 1 << 20, "gb": 10**9, "g": 1 << 30, "gib": 1 << 30, "tb": 10**12, "t": 1 << 40,
    "tib": 1 << 40, "pb": 10**15, "p": 1 << 50, "pib": 1 << 50, "eb": 10**18, "e": 1 << 60,
    "eib": 1 << 60,
}  # fmt: skip
"""libvirt's units of memory, in lower case, in bytes."""

CPU_LIMIT = 16384
"""The highest processor number that a set may hold, as in libvirt's bitmaps."""


def to_kib(number: int, unit: str = "KiB") -> int:
    """A size in KiB, rounded up as libvirt does; ValueError where the unit is none."""
    scale = _BYTES.get((unit or "KiB").lower())
    if scale is None:
        raise ValueError(f"{unit[:20]!r} is no unit of memory")
    return -(-number * scale // 1024)


def parse_size(text: str) -> int:
    """`8G`, `512M`, `1 GiB`, a bare number of MiB as QEMU has it: KiB.  Raises BadInput."""
    match = re.fullmatch(r"\s*(\d{1,15})\s*([A-Za-z]*)\s*", text)
    try:
        if not match:
            raise ValueError("no size")
        return to_kib(int(match[1]), match[2] or "M")
    except ValueError as error:
        raise BadInput(f"{text!r} is not a size", hint="such as 4G or 512M") from error


def show_size(kib: int) -> str:
    """A size in the largest binary unit that divides it."""
    for shift, unit in ((30, "TiB"), (20, "GiB"), (10, "MiB")):
        if kib and not kib % (1 << shift):
            return f"{kib >> shift} {unit}"
    return f"{kib} KiB"


def parse_cpus(text: str) -> frozenset[int]:
    """A set of processors (`0-3,^2,8`), as libvirt and the kernel write it.

    A later `^` takes away from what stands before it.  ValueError where it is none.
    """
    found: set[int] = set()
    for piece in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\^?)(\d{1,6})(?:-(\d{1,6}))?", piece)
        if not match:
            raise ValueError(f"{text[:40]!r} is no set of processors")
        first, last = int(match[2]), int(match[3] or match[2])
        if last < first or last >= CPU_LIMIT:
            raise ValueError(f"{piece!r} is no range of processors")
        members = range(first, last + 1)
        found = found.difference(members) if match[1] else found.union(members)
    return frozenset(found)


def show_cpus(cpus: frozenset[int]) -> str:
    """The shortest form of a set of processors."""
    pieces: list[str] = []
    rest = sorted(cpus)
    while rest:
        length = 1
        while length < len(rest) and rest[length] == rest[0] + length:
            length += 1
        first, last = rest[0], rest[length - 1]
        pieces += [str(first)] if length == 1 else [f"{first}-{last}"]
        rest = rest[length:]
    return ",".join(pieces)
