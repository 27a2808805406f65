"""A guest for each problem that a definition can have by itself."""

from dataclasses import replace

from undervisor.domains.model import (
    Balloon,
    Cell,
    CpuLimits,
    Disk,
    Guest,
    Interface,
    Memory,
    MemoryLimits,
    Pinning,
    Policy,
    Topology,
)

GOOD = Guest("l1", Memory(4 << 20), vcpus=4)
DISK = Disk("vda", "/a")


def on_cpu(**changes):
    return replace(GOOD, cpu=replace(GOOD.cpu, **changes))


CASES = [
    ("topology", on_cpu(topology=Topology(1, 1, 4, 2))),
    ("cells-memory", on_cpu(cells=(Cell(0, frozenset(range(4)), 1 << 20),))),
    ("cells-vcpus", on_cpu(cells=(Cell(0, frozenset({9}), 4 << 20),))),
    ("cells-overlap", on_cpu(cells=(Cell(0, frozenset({0}), 2 << 20),
                                    Cell(1, frozenset({0}), 2 << 20)))),
    ("hard-limit", replace(GOOD, memory_limits=MemoryLimits(hard=4 << 20))),
    ("soft-limit", replace(GOOD, memory_limits=MemoryLimits(hard=8 << 20, soft=9 << 20))),
    ("soft-below-ram", replace(GOOD, memory_limits=MemoryLimits(soft=1 << 20))),
    ("shares", replace(GOOD, cpu_limits=CpuLimits(shares=1))),
    ("period", replace(GOOD, cpu_limits=CpuLimits(period=999))),
    ("quota", replace(GOOD, cpu_limits=CpuLimits(quota=999))),
    ("quota-idle", replace(GOOD, cpu_limits=CpuLimits(quota=200000))),
    ("disk-native", replace(GOOD, disks=(replace(DISK, io="native", cache="writeback"),))),
    ("disk-iothread", replace(GOOD, disks=(replace(DISK, iothread=1),))),
    ("disk-read-only", replace(GOOD, disks=(replace(DISK, bus="sata", read_only=True),))),
    ("disk-twice", replace(GOOD, disks=(DISK, DISK))),
    ("queues", replace(GOOD, interfaces=(Interface("user", queues=5),))),
    ("balloon", replace(GOOD, memory=Memory(4 << 20, huge=()), balloon=Balloon())),
    ("pin-beyond", replace(GOOD, pinning=Pinning(vcpus=((4, frozenset({0})),)))),
    ("pin-twice", replace(GOOD, pinning=Pinning(vcpus=((0, frozenset({0})),
                                                       (1, frozenset({0})))))),
    ("mitigation-off", replace(GOOD, cpu=GOOD.cpu.with_feature("ibpb", Policy.DISABLE))),
]  # fmt: skip
