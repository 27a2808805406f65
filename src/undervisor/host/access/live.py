"""This machine, or a folder that stands for its root."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat as stat_module
import struct
from collections.abc import Callable, Sequence
from typing import TypeVar

from undervisor.host.access.process import run_bounded
from undervisor.host.access.protocol import (
    RUN_SECONDS,
    TEXT_LIMIT,
    Cpuid,
    Host,
    KvmOffer,
    Output,
    Stat,
    Timing,
    User,
)
from undervisor.host.fact import Absent, Denied, Fact, Known, Missing, Unknown, from_errno

T = TypeVar("T")

KINDS: dict[int, str] = {
    stat_module.S_IFREG: "file",
    stat_module.S_IFDIR: "folder",
    stat_module.S_IFCHR: "character",
    stat_module.S_IFBLK: "block",
    stat_module.S_IFLNK: "link",
    stat_module.S_IFIFO: "fifo",
    stat_module.S_IFSOCK: "socket",
}

_MSR_DEVICE = "/dev/cpu/0/msr"
_CPUID_DEVICE = "/dev/cpu/0/cpuid"


class LiveHost(Host):
    """The machine that we run on; with `root`, the system in that folder (and no commands that
    would reach past it)."""

    def __init__(self, root: str = "/") -> None:
        self.root = os.path.abspath(root)
        self.name = "this machine" if self.root == "/" else self.root
        self.live = self.root == "/"

    def _path(self, path: str) -> str:
        return path if self.live else self.root + os.path.normpath("/" + path)

    def read_bytes(self, path: str, limit: int = TEXT_LIMIT) -> Fact[bytes]:
        """Read without waiting on pipes; devices and folders are refused."""
        return _guarded(path, lambda: _read(self._path(path), path, limit))

    def listdir(self, path: str) -> Fact[tuple[str, ...]]:
        """The sorted names."""
        return _guarded(path, lambda: Known(tuple(sorted(os.listdir(self._path(path)))), path))

    def stat(self, path: str) -> Fact[Stat]:
        """As stat(2)."""
        return _guarded(path, lambda: Known(stat_of(os.stat(self._path(path))), path))

    def usable(self, path: str) -> Fact[bool]:
        """As access(2) with R_OK and W_OK, for the effective user."""

        def look() -> Fact[bool]:
            os.stat(self._path(path))
            may = os.access(self._path(path), os.R_OK | os.W_OK, effective_ids=True)
            return Known(may, path)

        return _guarded(path, look)

    def run(self, argv: Sequence[str], timeout: float = RUN_SECONDS) -> Fact[Output]:
        """Run it here; in a folder there is no machine to run it on."""
        if not self.live:
            return Unknown(" ".join(argv), "a folder runs no commands")
        return run_bounded(argv, timeout)

    def cpuid(self, leaf: int, subleaf: int = 0) -> Fact[Cpuid]:
        """From the cpuid device, or else by executing the instruction."""
        source = f"CPUID.{leaf:X}H:{subleaf}"
        if not self.live:
            return Unknown(source, "a folder has no processor")
        raw = _guarded(source, lambda: _pread(_CPUID_DEVICE, 16, leaf | subleaf << 32, source))
        if isinstance(raw, Known):
            return Known(Cpuid(*struct.unpack("<4I", raw.value)), source)
        from undervisor.host.access import native

        return native.cpuid(leaf, subleaf)

    def msr(self, index: int) -> Fact[int]:
        """From the msr device."""
        source = f"MSR {index:#x}"
        if not self.live:
            return Unknown(source, "a folder has no processor")
        raw = _guarded(source, lambda: _pread(_MSR_DEVICE, 8, index, source))
        if isinstance(raw, Known):
            return Known(struct.unpack("<Q", raw.value)[0], source)
        return explain_msr(raw, source)

    def user(self) -> Fact[User]:
        """The effective user and all groups."""
        groups = sorted({os.getegid(), *os.getgroups()})
        return Known(User(os.geteuid(), tuple(_group_name(g) for g in groups)), "id")

    def timing(self) -> Fact[Timing]:
        """Measured here and now."""
        if not self.live:
            return Unknown("timing", "a folder has no processor")
        from undervisor.host.access import native

        return native.timing()

    def kvm(self) -> Fact[KvmOffer]:
        """Ask the device here."""
        if not self.live:
            return Unknown("/dev/kvm", "a folder runs no guests")
        from undervisor.host.access import kvm_device

        return kvm_device.ask()

    def close(self) -> None:
        """Nothing to let go of."""


def explain_msr(missing: Missing, source: str) -> Missing:
    """Why an MSR can't be read, in words about MSRs: the device missing is not the MSR missing."""
    if isinstance(missing, Absent):
        return Unknown(source, "there is no msr device", "load the module: modprobe msr")
    if isinstance(missing, Denied):
        return Denied(source, "run it as root, with the msr module loaded and lockdown off")
    if missing.code == "EIO":
        return Absent(f"{source} (reading it faults: the processor does not have it)")
    return missing


def stat_of(result: os.stat_result) -> Stat:
    """Our `Stat` of the system's."""
    kind = KINDS.get(stat_module.S_IFMT(result.st_mode), "other")
    device = None
    if kind in ("character", "block"):
        device = (os.major(result.st_rdev), os.minor(result.st_rdev))
    mode = stat_module.S_IMODE(result.st_mode)
    return Stat(kind, mode, _user_name(result.st_uid), _group_name(result.st_gid), device)


def _guarded(source: str, look: Callable[[], Fact[T]]) -> Fact[T]:
    try:
        return look()
    except OSError as error:
        return from_errno(error.errno or 0, source)
    except ValueError as error:
        return Unknown(source, str(error))


def _read(path: str, source: str, limit: int) -> Fact[bytes]:
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat_module.S_ISREG(os.fstat(number).st_mode):
            return Unknown(source, "not a regular file", code="EINVAL")
        whole = bytearray()
        while piece := os.read(number, 1 << 16):
            whole += piece
            if len(whole) > limit:
                return Unknown(source, f"longer than {limit} bytes", code="EFBIG")
        return Known(bytes(whole), source)
    finally:
        os.close(number)


def _pread(path: str, size: int, offset: int, source: str) -> Fact[bytes]:
    number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        raw = os.pread(number, size, offset)
    finally:
        os.close(number)
    if len(raw) != size:
        return from_errno(errno.EIO, source)
    return Known(raw, source)


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
