"""Ask KVM through its device what it would give to a guest; no guest is made."""

from __future__ import annotations

import errno
import fcntl
import os

from undervisor.arch.kvm import CPUID_ENTRY, CPUID_HEADER, DEVICE, Capability, Request
from undervisor.host.access.protocol import KvmOffer
from undervisor.host.fact import Fact, Known, Unknown, from_errno

_ROOM = 256
"""Entries of CPUID to make room for; KVM has fewer than 100."""


def ask(device: str = DEVICE) -> Fact[KvmOffer]:
    """Open the device, ask, close it."""
    try:
        number = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return from_errno(error.errno or 0, device)
    try:
        version = fcntl.ioctl(number, Request.GET_API_VERSION, 0)
        state = fcntl.ioctl(number, Request.CHECK_EXTENSION, Capability.NESTED_STATE)
        cpuid = _supported(number)
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EINVAL):
            return Unknown(device, "it does not answer as KVM does")
        return from_errno(error.errno or 0, device)
    finally:
        os.close(number)
    vmx = bool(cpuid.get((1, 0), (0, 0, 0, 0))[2] & 1 << 5)
    svm = bool(cpuid.get((0x80000001, 0), (0, 0, 0, 0))[2] & 1 << 2)
    return Known(KvmOffer(version, state, vmx, svm), device)


def _supported(number: int) -> dict[tuple[int, int], tuple[int, int, int, int]]:
    """KVM_GET_SUPPORTED_CPUID: leaf and subleaf to EAX, EBX, ECX, EDX."""
    buffer = bytearray(CPUID_HEADER.pack(_ROOM, 0) + bytes(CPUID_ENTRY.size * _ROOM))
    fcntl.ioctl(number, Request.GET_SUPPORTED_CPUID, buffer)
    count = min(CPUID_HEADER.unpack_from(buffer)[0], _ROOM)
    found = {}
    for entry in range(count):
        at = CPUID_HEADER.size + entry * CPUID_ENTRY.size
        leaf, subleaf, _, eax, ebx, ecx, edx = CPUID_ENTRY.unpack_from(buffer, at)
        found[leaf, subleaf] = (eax, ebx, ecx, edx)
    return found
