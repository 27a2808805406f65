"""The files that a lab is made of: those of the plan, and the distribution's for the others."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from undervisor.errors import BadInput
from undervisor.guest.linux import HEADER_END_MOST, MAGIC, MAGIC_AT, SECTOR
from undervisor.lab import packages
from undervisor.lab.cache import Cache
from undervisor.lab.plan import Plan
from undervisor.lab.progress import SILENT, Progress

_REAL_KERNEL: Final = r"linux-image-\d\S*"
_VERSION_AT: Final = 0x20E
"""`kernel_version` of "The Real-Mode Kernel Header": a pointer less 0x200."""


@dataclass(frozen=True, slots=True)
class Sources:
    """A kernel with the folder of its modules, a static busybox, and the user's own archive."""

    kernel: Path
    modules: Path
    busybox: Path
    initramfs: Path | None = None


def sources(plan: Plan, cache: Cache, progress: Progress = SILENT) -> Sources:
    """Where everything is, downloaded where it has to be."""
    kernel, modules, busybox = plan.kernel, plan.modules, plan.busybox
    wanted = []
    if kernel is None:
        with progress.working("asking apt which kernel is the newest"):
            wanted.append(packages.depends(packages.KERNEL, _REAL_KERNEL))
    if busybox is None:
        wanted.append(packages.BUSYBOX)
    for offer in packages.offers(wanted) if wanted else []:
        folder = packages.unpacked(cache, offer, progress)
        if offer.package == packages.BUSYBOX:
            busybox = folder / "bin/busybox"
        else:
            kernel = _only(folder, "boot/vmlinuz-*")
            modules = modules or _only(folder, "lib/modules/*")
    assert kernel is not None
    assert busybox is not None
    return Sources(kernel, modules or _modules_of(kernel), busybox, plan.initramfs)


def version(kernel: bytes, name: str) -> str:
    """The version that a bzImage says it is: `6.1.0-56-cloud-amd64`."""
    if kernel[MAGIC_AT : MAGIC_AT + 4] != MAGIC:
        raise BadInput(f"{name} is no Linux bzImage")
    (at,) = struct.unpack_from("<H", kernel.ljust(HEADER_END_MOST, b"\0"), _VERSION_AT)
    text = kernel[at + SECTOR :][:SECTOR].split(b"\0")[0].decode("ascii", "replace")
    return text.split(" ")[0]


def _modules_of(kernel: Path) -> Path:
    """Where the modules of a given kernel are installed."""
    folder = Path("/lib/modules") / version(kernel.read_bytes(), str(kernel))
    if not re.fullmatch(r"[\w.+~-]+", folder.name) or not folder.is_dir():
        raise BadInput(
            f"the modules of {kernel} are not in {folder}", hint="--modules names their folder"
        )
    return folder


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise BadInput(f"{len(found)} files {pattern} in {folder}, not one")
    return found[0]
