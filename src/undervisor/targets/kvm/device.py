"""/dev/kvm: the calls that go to the kernel, and what KVM says of itself."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from dataclasses import asdict, dataclass
from typing import Any, Final, Protocol

from undervisor.arch.kvm import (
    API_VERSION,
    CPUID_ENTRY,
    CPUID_HEADER,
    DEVICE,
    Capability,
    Request,
)
from undervisor.errors import BadInput

MOST_CPUS: Final = 8
"""Processors of one machine here; KVM itself allows more."""
_INT_MOST: Final = (1 << 31) - 1
_CPUID_ROOM: Final = 256
_VENDOR_FLAGS: Final = {"vmx": (1, 1 << 5), "svm": (0x80000001, 1 << 2)}
"""The leaf and the bit of ECX that tell each extension."""

Leaf = tuple[int, int, int, int, int, int, int]
"""Leaf, subleaf, flags, EAX, EBX, ECX, EDX."""


class Calls(Protocol):
    """The kernel as far as a machine needs it; tests put another one in its place."""

    def open(self) -> int:
        """A descriptor of the device."""

    def ioctl(self, number: int, request: int, argument: int | bytearray = 0) -> int:
        """ioctl(2); a bytearray is filled in."""

    def shared(self, number: int, size: int) -> mmap.mmap:
        """The pages that a vCPU's descriptor shares."""


class Kernel:
    """The kernel that we run on."""

    def open(self) -> int:
        """A descriptor of /dev/kvm."""
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)

    def ioctl(self, number: int, request: int, argument: int | bytearray = 0) -> int:
        """ioctl(2); other threads go on meanwhile."""
        if isinstance(argument, int) and argument > _INT_MOST:
            return _wide_ioctl(number, request, argument)
        return int(fcntl.ioctl(number, request, argument))

    def shared(self, number: int, size: int) -> mmap.mmap:
        """mmap(2) of a vCPU's descriptor."""
        return mmap.mmap(number, size)


def _wide_ioctl(number: int, request: int, argument: int) -> int:
    """ioctl(2) with an address in the argument itself, for which fcntl's is too narrow."""
    libc = ctypes.CDLL(None, use_errno=True)
    result = int(libc.ioctl(number, ctypes.c_ulong(request), ctypes.c_ulong(argument)))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


@dataclass(frozen=True, slots=True)
class Facts:
    """What KVM says of itself.

    `vendors`: the extensions in the CPUID that guests get, which alone tells that nesting is on:
    on AMD KVM_CAP_NESTED_STATE is there even with nested=0.  `tells_l2`: whether an exit says that
    it carries L2's state (KVM_CAP_X86_GUEST_MODE).  `gathers_output`: KVM_CAP_COALESCED_PIO.
    """

    leaves: tuple[Leaf, ...]
    vendors: tuple[str, ...]
    most_cpus: int
    nested_state: int
    tells_l2: bool
    gathers_output: bool
    kernel: str

    def as_json(self) -> dict[str, Any]:
        """The facts as JSON has them."""
        return asdict(self)

    @classmethod
    def of_json(cls, data: dict[str, Any]) -> Facts:
        """The facts that `as_json` gave."""
        leaves = tuple(tuple(leaf) for leaf in data["leaves"])
        return cls(**data | {"vendors": tuple(data["vendors"]), "leaves": leaves})


def opened(calls: Calls) -> int:
    """The open device; BadInput where it can't be opened or is not the KVM that we know."""
    try:
        number = calls.open()
        version = calls.ioctl(number, Request.GET_API_VERSION)
    except OSError as error:
        hints = {
            errno.EACCES: "be in the group kvm, or run it as root",
            errno.ENOENT: "load kvm_intel or kvm_amd; `undervisor check` says what is missing",
            errno.EBUSY: "another hypervisor uses the processor's extension",
        }
        hint = hints.get(error.errno or 0, "")
        raise BadInput(f"{DEVICE}: {error.strerror}", hint=hint) from None
    if version != API_VERSION:
        raise BadInput(f"{DEVICE} speaks API version {version}, not {API_VERSION}")
    return number


def supported_cpuid(calls: Calls, number: int) -> list[Leaf]:
    """What KVM can give to a guest: KVM_GET_SUPPORTED_CPUID."""
    buffer = bytearray(CPUID_HEADER.pack(_CPUID_ROOM, 0) + bytes(CPUID_ENTRY.size * _CPUID_ROOM))
    calls.ioctl(number, Request.GET_SUPPORTED_CPUID, buffer)
    count = min(CPUID_HEADER.unpack_from(buffer)[0], _CPUID_ROOM)
    end = CPUID_HEADER.size + count * CPUID_ENTRY.size
    return list(CPUID_ENTRY.iter_unpack(buffer[CPUID_HEADER.size : end]))


def has(calls: Calls, number: int, capability: Capability) -> int:
    """KVM_CHECK_EXTENSION: 0 where it is absent."""
    return calls.ioctl(number, Request.CHECK_EXTENSION, capability)


def facts(calls: Calls) -> Facts:
    """Ask KVM what it can do; BadInput where there is none to ask."""
    number = opened(calls)
    try:
        leaves = supported_cpuid(calls, number)
        ecx = {(leaf[0], leaf[1]): leaf[5] for leaf in leaves}
        vendors = [
            name for name, (leaf, bit) in _VENDOR_FLAGS.items() if ecx.get((leaf, 0), 0) & bit
        ]
        return Facts(
            leaves=tuple(leaves),
            vendors=tuple(vendors),
            most_cpus=min(MOST_CPUS, has(calls, number, Capability.MAX_VCPUS) or 1),
            nested_state=has(calls, number, Capability.NESTED_STATE),
            tells_l2=bool(has(calls, number, Capability.X86_GUEST_MODE)),
            gathers_output=bool(has(calls, number, Capability.COALESCED_PIO)),
            kernel=os.uname().release,
        )
    except OSError as error:
        raise BadInput(f"{DEVICE} does not answer as KVM does: {error.strerror}") from None
    finally:
        os.close(number)
