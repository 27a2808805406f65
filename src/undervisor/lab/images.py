"""The initial RAM disks of a lab: one for each level, the inner ones inside the outer ones.

The same inputs give the same bytes, so an image is kept under the digest of its inputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Final

from undervisor.guest.newc import Archive
from undervisor.guest.placement import aligned
from undervisor.lab import modules, probe, python, vmm
from undervisor.lab.cache import Cache
from undervisor.lab.plan import Plan
from undervisor.lab.progress import SILENT, Progress
from undervisor.lab.sources import Sources
from undervisor.targets.kvm.archive import agent

FORMAT: Final = "2"
"""Changes with what this module writes, so that an older image is not taken for a new one."""
MODULES: Final = ("kvm-amd", "kvm-intel", "cpuid", "msr", "virtio_pci", "virtio_mmio",
                  "virtio_console", "virtio_blk")  # fmt: skip
_FOLDERS: Final = ("dev", "lab", "proc", "root", "run", "sys", "tmp")
_INIT: Final = "init.sh"
_INIT_AGENT: Final = "init-agent.sh"
_AGENT: Final = "lab/agent.pyz"


@dataclass(frozen=True, slots=True)
class Images:
    """What L1 starts from."""

    kernel: Path
    initramfs: Path


def build(plan: Plan, found: Sources, cache: Cache, progress: Progress = SILENT) -> Images:
    """The images of a lab, made where they are not in the cache."""
    extra = python.archives(cache, progress) if plan.python else ()
    with progress.working("making the images"):
        name = f"initramfs-depth{plan.depth}-{_digest(plan, found, extra)}.cpio"
        path = cache.entry(name, lambda place: _write(place, plan.depth, found, extra))
    return Images(found.kernel, path)


def _write(place: Path, depth: int, found: Sources, extra: Iterable[Path]) -> None:
    """The image of L1, with all others in it; Python goes to L1 only."""
    parts = [level_image(found, level_images(found, depth)), *(p.read_bytes() for p in extra)]
    place.write_bytes(joined(parts))


def with_agent(found: Sources, cache: Cache, progress: Progress = SILENT) -> bytes:
    """A Linux with nothing inside, whose init starts the agent of the `kvm` target on its line."""
    over = Archive()
    over.file("init", files("undervisor.lab").joinpath(_INIT_AGENT).read_bytes(), program=True)
    over.file(_AGENT, agent())
    interpreter = python.interpreter(cache, progress).read_bytes()
    return joined([level_image(found, b""), interpreter, over.finish()])


def level_images(found: Sources, depth: int) -> bytes:
    """The image of L2 in a lab of that depth: the deepest one first, each in the one around it."""
    inner = b""
    for _ in range(depth - 1):
        inner = level_image(found, inner)
    return inner


def level_image(found: Sources, inner: bytes) -> bytes:
    """One level: its own system and, unless it is the deepest, a VMM and the level inside it."""
    archive = Archive()
    for folder in _FOLDERS:
        archive.folder(folder)
    archive.device("dev/console", 5, 1)
    archive.file("init", files("undervisor.lab").joinpath(_INIT).read_bytes(), program=True)
    archive.file("bin/busybox", found.busybox.read_bytes(), program=True)
    archive.link("bin/sh", "busybox")
    archive.file("etc/os-release", b'ID=undervisor-lab\nPRETTY_NAME="a level of a lab"\n')
    archive.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
    archive.file("etc/group", b"root:x:0:\n")
    archive.file(probe.PATH, probe.program(), program=True)
    loaded = modules.in_order(modules.find(found.modules), MODULES)
    for name, data in loaded.items():
        archive.file(f"lab/modules/{name}.ko", data)
    archive.file("lab/modules/order", "".join(f"{name}\n" for name in loaded).encode())
    if inner:
        vmm.add_vmm(archive)
        archive.file("lab/kernel", found.kernel.read_bytes())
        archive.file("lab/initramfs", inner)
    below = [found.initramfs.read_bytes()] if found.initramfs else []
    return joined([*below, archive.finish()])


def joined(parts: Iterable[bytes]) -> bytes:
    """Archives one after the other; Linux unpacks them in this order, the later ones on top."""
    return b"".join(part.ljust(aligned(len(part), 4), b"\0") for part in parts)


def _digest(plan: Plan, found: Sources, extra: Iterable[Path]) -> str:
    """Of everything that the image is made of."""
    names = [*modules.in_order(modules.find(found.modules), MODULES).values()]
    sum_ = hashlib.sha256(f"{FORMAT} {plan.depth}".encode())
    sum_.update(files("undervisor.lab").joinpath(_INIT).read_bytes())
    sum_.update(probe.program())
    for data in names:
        sum_.update(hashlib.sha256(data).digest())
    given = [found.kernel, found.busybox, *vmm.inputs(), *extra]
    for path in [*given, *([found.initramfs] if found.initramfs else [])]:
        sum_.update(f"{path.name}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
    return sum_.hexdigest()[:16]
