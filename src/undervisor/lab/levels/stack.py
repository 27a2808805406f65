"""The levels of a lab of our own: this machine, L1 on it, L2 in that, all with one disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from undervisor.guest.newc import Archive
from undervisor.host.access.live import LiveHost
from undervisor.lab import vmm
from undervisor.lab.cache import Cache
from undervisor.lab.levels.session import DISK_BYTES, Subject
from undervisor.lab.plan import Plan
from undervisor.lab.progress import SILENT, Progress
from undervisor.lab.stack import Lab

CARRIED: Final = ("sysbench",)
"""The tools that go into the levels, where this machine has them.  fio stays out: with the
libraries that Debian's is linked to, it is larger than everything else in a level."""
DISK_OF_A_LEVEL: Final = "/dev/vda"


@contextlib.contextmanager
def levels_of_a_lab(
    depth: int, *, with_tools: bool = True, progress: Progress = SILENT
) -> Iterator[list[Subject]]:
    """L0, which is this machine, and the levels of a new lab, which ends with the `with` block.

    Raises what starting a lab raises.
    """
    cache = Cache()
    archive = tools_archive(cache) if with_tools else None
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(_disk())
        plan = Plan(depth, initramfs=archive, disk=disk)
        lab = stack.enter_context(Lab(plan=plan, cache=cache, progress=progress))
        inside = DISK_OF_A_LEVEL if disk else ""
        subjects = [Subject(0, LiveHost(), str(disk or ""))]
        subjects += [Subject(n, lab.level(n).host, inside) for n in plan.levels]
        yield subjects


@contextlib.contextmanager
def _disk() -> Iterator[Path | None]:
    """A file with blocks that can be read past the page cache; None where none can be made."""
    with contextlib.ExitStack() as stack:
        made = None
        with contextlib.suppress(OSError):
            place = "/var/tmp" if Path("/var/tmp").is_dir() else None
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=place))
            path = Path(folder) / "disk.img"
            path.write_bytes(os.urandom(DISK_BYTES))  # zeros may be kept as a hole
            with open(os.open(path, os.O_RDWR | os.O_DIRECT), "rb") as file:
                os.fsync(file.fileno())
            made = path
        yield made


def tools_archive(cache: Cache) -> Path | None:
    """The tools of CARRIED with their libraries, for every level; None where there is none."""
    programs = [Path(found) for name in CARRIED if (found := shutil.which(name))]
    if not programs:
        return None
    inputs = sorted({file for p in programs for file in (p, *vmm.libraries(p))})
    sum_ = hashlib.sha256()
    for path in inputs:
        sum_.update(f"{path}\n".encode() + hashlib.sha256(path.read_bytes()).digest())

    def make(place: Path) -> None:
        archive = Archive()
        for program in programs:
            vmm.add_program(archive, program)
        place.write_bytes(archive.finish())

    return cache.entry(f"tools-{sum_.hexdigest()[:16]}.cpio", make)
