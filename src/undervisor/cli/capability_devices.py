"""This machine's capability MSRs, from its devices; nothing here writes."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import struct

from undervisor.arch.kvm import API_VERSION, DEVICE, MSR_ENTRY, MSRS_HEADER, Request
from undervisor.arch.vmx.capabilities import VmxMsr
from undervisor.errors import BadInput
from undervisor.explain.capabilities import MOST, MSRS

MOST_FEATURE_MSRS = 512


def msr_devices() -> list[dict[int, int]]:
    """The VMX MSRs of each processor from /dev/cpu/N/msr; empty ones where it has no VMX."""
    paths = sorted(glob.glob("/dev/cpu/[0-9]*/msr"), key=lambda p: int(p.split("/")[3]))[:MOST]
    if not paths:
        raise BadInput("there are no msr devices", hint="modprobe msr")
    cpus = []
    for path in paths:
        try:
            cpus.append(_device_msrs(path))
        except OSError as error:
            raise BadInput(f"{path}: {error.strerror}", hint="run it as root") from None
    return cpus


def _device_msrs(path: str) -> dict[int, int]:
    msrs = {}
    number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for index in sorted(MSRS):
            try:
                raw = os.pread(number, 8, index)
            except OSError as error:
                if error.errno == errno.EIO:  # the MSR's own #GP: this processor lacks it
                    continue
                raise
            if len(raw) == 8:
                msrs[index] = int.from_bytes(raw, "little")
    finally:
        os.close(number)
    if not msrs.get(VmxMsr.IA32_VMX_BASIC):  # emulators without VMX read its MSRs as zeros
        return {}
    return msrs


def kvm_feature_msrs(path: str = DEVICE) -> dict[int, int]:
    """The VMX feature MSRs that KVM has for guests."""
    try:
        number = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        hint = "be in the group kvm" if error.errno == errno.EACCES else ""
        raise BadInput(f"{path}: {error.strerror}", hint=hint) from None
    try:
        if fcntl.ioctl(number, Request.GET_API_VERSION, 0) != API_VERSION:
            raise BadInput(f"{path} is not KVM, or not of an API that is known")
        values = {index: _feature_msr(number, index) for index in _feature_indexes(number)}
        return {index: value for index, value in values.items() if value is not None}
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    finally:
        os.close(number)


def _feature_indexes(number: int) -> list[int]:
    """The VMX MSRs among those that KVM can be asked for."""
    buffer = bytearray(struct.pack("I", MOST_FEATURE_MSRS) + bytes(4 * MOST_FEATURE_MSRS))
    fcntl.ioctl(number, Request.GET_MSR_FEATURE_INDEX_LIST, buffer)
    (count,) = struct.unpack_from("I", buffer)
    count = min(count, MOST_FEATURE_MSRS)
    return [i for i in struct.unpack_from(f"{count}I", buffer, 4) if i in MSRS]


def _feature_msr(number: int, index: int) -> int | None:
    """One feature MSR: struct kvm_msrs with one entry."""
    buffer = bytearray(MSRS_HEADER.pack(1, 0) + MSR_ENTRY.pack(index, 0, 0))
    try:
        done = fcntl.ioctl(number, Request.GET_MSRS, buffer)
    except OSError:
        return None
    return int(MSR_ENTRY.unpack_from(buffer, MSRS_HEADER.size)[2]) if done == 1 else None
