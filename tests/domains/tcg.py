"""A guest changed no more than emulation on a small machine demands."""

from __future__ import annotations

import os
from dataclasses import replace

from undervisor.domains.model import MemoryLimits, Mode

MEMORY = 64 << 10


def for_tcg(guest, *, images=None):
    """`images` maps the paths of the definition to files that are there."""
    images = images or {}
    here = os.cpu_count() or 1
    cpu = guest.cpu
    if cpu.mode in (Mode.PASSTHROUGH, Mode.HOST_MODEL):
        cpu = replace(cpu, mode=Mode.MAXIMUM, migratable=None, check="none")
    cpu = replace(cpu, cells=tuple(replace(c, memory=MEMORY // len(cpu.cells)) for c in cpu.cells))
    pinning = guest.pinning
    pins = tuple((v, frozenset(c % here for c in where)) for v, where in pinning.vcpus)
    allowed = frozenset(c % here for c in pinning.allowed)
    vhost = os.path.exists("/dev/vhost-net")
    return replace(
        guest,
        type="qemu",
        cpu=cpu,
        memory=replace(guest.memory, size=MEMORY, current=None),
        # Raising the limit of locked memory needs CAP_SYS_RESOURCE; a weight and a quota a cgroup.
        memory_limits=MemoryLimits(),
        cpu_limits=type(guest.cpu_limits)(),
        pinning=replace(pinning, vcpus=pins, allowed=allowed),
        disks=tuple(replace(d, path=images.get(d.path, d.path)) for d in guest.disks),
        interfaces=tuple(replace(i, driver=i.driver if vhost or i.driver != "vhost" else "qemu")
                         for i in guest.interfaces),
        boot=replace(guest.boot, loader=images.get(guest.boot.loader, guest.boot.loader),
                     nvram=images.get(guest.boot.nvram, guest.boot.nvram)),
    )  # fmt: skip


def empty_qcow2(path, size=1 << 20):
    """The smallest qcow2 image, version 2, from its specification: header, L1, refcounts."""
    cluster = 1 << 16
    header = bytearray(4 * cluster)
    words = [(0, 4, 0x514649FB), (4, 4, 2), (20, 4, 16), (24, 8, size), (36, 4, 1),
             (40, 8, 3 * cluster), (48, 8, cluster), (56, 4, 1)]  # fmt: skip
    for offset, width, value in words:
        header[offset : offset + width] = value.to_bytes(width, "big")
    header[cluster : cluster + 8] = (2 * cluster).to_bytes(8, "big")  # refcount table
    for used in range(4):
        at = 2 * cluster + 2 * used
        header[at : at + 2] = (1).to_bytes(2, "big")
    path.write_bytes(header)
    return str(path)
