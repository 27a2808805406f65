"""Ask KVM through its device what it would give to a guest; no guest is made."""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from undervisor.host.access.protocol import KvmOffer
from undervisor.host.fact import Fact, Known, Unknown, from_errno

DEVICE = "/dev/kvm"

KVM_GET_API_VERSION = 0xAE00
KVM_CHECK_EXTENSION = 0xAE03
KVM_GET_SUPPORTED_CPUID = 0xC008AE05
KVM_CAP_NESTED_STATE = 157

_ENTRY = struct.Struct("<7I12x")
_ROOM = 256
"""Entries of CPUID to make room for; KVM has fewer than 100."""


def ask(device: str = DEVICE) -> Fact[KvmOffer]:
    """Open the device, ask, close it."""
    try:
        number = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return from_errno(error.errno or 0, device)
    try:
        version = fcntl.ioctl(number, KVM_GET_API_VERSION, 0)
        state = fcntl.ioctl(number, KVM_CHECK_EXTENSION, KVM_CAP_NESTED_STATE)
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
    buffer = bytearray(struct.pack("<II", _ROOM, 0) + bytes(_ENTRY.size * _ROOM))
    fcntl.ioctl(number, KVM_GET_SUPPORTED_CPUID, buffer)
    count = min(struct.unpack_from("<I", buffer)[0], _ROOM)
    found = {}
    for entry in range(count):
        leaf, subleaf, _, eax, ebx, ecx, edx = _ENTRY.unpack_from(buffer, 8 + entry * _ENTRY.size)
        found[leaf, subleaf] = (eax, ebx, ecx, edx)
    return found
