"""A virtual machine of KVM: RAM, the interrupt controllers in the kernel, its processors."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from typing import Final

from undervisor.arch.kvm import (
    COALESCED_ZONE,
    IRQ_LEVEL,
    MEMORY_REGION,
    PIT_CONFIG,
    Capability,
    Request,
)
from undervisor.arch.x86.boot import DEVICE_HOLE, FOUR_GIB
from undervisor.errors import BadInput
from undervisor.targets.kvm.device import (
    Calls,
    Leaf,
    facts,
    has,
    opened,
    supported_cpuid,
)
from undervisor.targets.kvm.vcpu import Vcpu

TSS: Final = 0xFFFBD000
IDENTITY_MAP: Final = 0xFFFBC000
"""Pages below the flash that VMX without unrestricted guest needs for real mode."""
APIC_ID_LEAVES: Final = (0xB, 0x1F)
AMD_TOPOLOGY: Final = 0x8000001E
TSC_DEADLINE: Final = 1 << 24
"""CPUID.01H:ECX; KVM leaves it to the VMM to set where its APIC can do it."""


class Vm:
    """A machine; `close` is not needed in a process that ends with it."""

    def __init__(self, calls: Calls, cpus: int, memory: int) -> None:
        self._calls, self.facts = calls, facts(calls)
        if not 1 <= cpus <= self.facts.most_cpus:
            raise BadInput(f"{cpus} processors: KVM here can have 1 to {self.facts.most_cpus}")
        self._device = opened(calls)
        self._number = calls.ioctl(self._device, Request.CREATE_VM)
        calls.ioctl(self._number, Request.SET_TSS_ADDR, TSS)
        self._set(Request.SET_IDENTITY_MAP_ADDR, struct.pack("<Q", IDENTITY_MAP))
        calls.ioctl(self._number, Request.CREATE_IRQCHIP)
        self._set(Request.CREATE_PIT2, PIT_CONFIG.pack(0))
        self._size = memory
        self._ram = _anonymous(memory)
        self._add_memory()
        self.vcpus = [self._create(index) for index in range(cpus)]

    def _add_memory(self) -> None:
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._ram))
        low = min(self._size, DEVICE_HOLE)
        parts = [(0, 0, low), (1, FOUR_GIB, self._size - low)]
        for slot, gpa, size in parts:
            if size:
                at = address + (low if slot else 0)
                region = MEMORY_REGION.pack(slot, 0, gpa, size, at)
                self._set(Request.SET_USER_MEMORY_REGION, region)

    def _create(self, index: int) -> Vcpu:
        page_size = self._calls.ioctl(self._device, Request.GET_VCPU_MMAP_SIZE)
        number = self._calls.ioctl(self._number, Request.CREATE_VCPU, index)
        return Vcpu(self._calls, number, index, page_size, self.facts)

    def write(self, gpa: int, data: bytes) -> None:
        """`data` to RAM at `gpa`; BadInput where there is none."""
        at = gpa if gpa < FOUR_GIB else gpa - FOUR_GIB + DEVICE_HOLE
        end = self._size if gpa >= FOUR_GIB else min(self._size, DEVICE_HOLE)
        if not 0 <= at <= at + len(data) <= end:
            raise BadInput(f"{len(data)} bytes at {gpa:#x} are not in RAM")
        self._ram[at : at + len(data)] = data

    def cpuid(self, index: int) -> list[Leaf]:
        """What processor `index` answers to CPUID: all that KVM can give, and its own APIC ID."""
        leaves = supported_cpuid(self._calls, self._device)
        deadline = has(self._calls, self._device, Capability.TSC_DEADLINE_TIMER)
        return [_own(leaf, index, len(self.vcpus), bool(deadline)) for leaf in leaves]

    def irq(self, line: int, level: bool) -> None:
        """Drive an interrupt line of the controllers in the kernel."""
        self._set(Request.IRQ_LINE, IRQ_LEVEL.pack(line, level))

    def gather_output(self, port: int) -> int | None:
        """Let KVM gather what is written to `port`; the page of a vCPU that has the ring, or None
        where it can't."""
        page = has(self._calls, self._device, Capability.COALESCED_MMIO)
        if not self.facts.gathers_output or not page:
            return None
        self._set(Request.REGISTER_COALESCED_MMIO, COALESCED_ZONE.pack(port, 1, 1))
        return page

    def _set(self, request: Request, argument: bytes) -> None:
        self._calls.ioctl(self._number, request, bytearray(argument))


def _anonymous(size: int) -> mmap.mmap:
    try:
        return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
        what = f"{size >> 20} MiB of RAM for the machine: {error.strerror}"
        raise BadInput(what, hint=f"{free} MiB are free") from None


def _own(leaf: Leaf, index: int, cpus: int, deadline: bool) -> Leaf:
    """A leaf of CPUID as the processor with APIC ID `index` has it."""
    number, subleaf, flags, eax, ebx, ecx, edx = leaf
    if number == 1:
        ebx = ebx & 0xFFFF | cpus << 16 | index << 24
        ecx |= TSC_DEADLINE if deadline else 0
    elif number in APIC_ID_LEAVES:
        edx = index
    elif number == AMD_TOPOLOGY:
        eax = index
    return number, subleaf, flags, eax, ebx, ecx, edx
