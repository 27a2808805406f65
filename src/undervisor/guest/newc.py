"""An initial RAM disk: a cpio archive in the "newc" form, written without root and without cpio.

Linux, "initramfs buffer format": a header of hexadecimal fields, the name, the data, each padded to
four bytes.  The same members in the same order are the same bytes: no times, no owners, inode
numbers that count.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from undervisor.errors import BadInput

_MAGIC = b"070701"
_END = "TRAILER!!!"
_LARGEST = 0xFFFF_FFFF
"""The size field has eight hexadecimal digits."""


@dataclass(slots=True)
class Archive:
    """Members are added by their paths; folders that they need come by themselves."""

    _parts: list[bytes] = field(default_factory=list)
    _names: set[str] = field(default_factory=set)

    def folder(self, path: str) -> None:
        """A folder and those above it."""
        for part in (*reversed(_pure(path).parents), _pure(path)):
            name = str(part)
            if name != "." and name not in self._names:
                self._put(name, stat.S_IFDIR | 0o755)

    def file(self, path: str, data: bytes, *, program: bool = False) -> None:
        """A regular file; a `program` may be executed."""
        self._above(path)
        self._put(str(_pure(path)), stat.S_IFREG | (0o755 if program else 0o644), data)

    def link(self, path: str, target: str) -> None:
        """A symbolic link to `target`."""
        self._above(path)
        self._put(str(_pure(path)), stat.S_IFLNK | 0o777, target.encode())

    def device(self, path: str, major: int, minor: int) -> None:
        """A character device: named here, made by the kernel that unpacks the archive."""
        self._above(path)
        self._put(str(_pure(path)), stat.S_IFCHR | 0o600, device=(major, minor))

    def __contains__(self, path: str) -> bool:
        return str(_pure(path)) in self._names

    def finish(self) -> bytes:
        """The whole archive."""
        return b"".join(self._parts) + _member(0, _END, 0, b"", (0, 0))

    def _above(self, path: str) -> None:
        self.folder(str(_pure(path).parent))

    def _put(
        self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)
    ) -> None:
        if name in self._names:
            raise BadInput(f"{name} is in the archive already")
        if len(data) > _LARGEST:
            raise BadInput(f"{name} has {len(data)} bytes, an archive takes 4 GiB of a file")
        self._names.add(name)
        self._parts.append(_member(len(self._names), name, mode, data, device))


def _pure(path: str) -> PurePosixPath:
    """The path as it is written in the archive: relative, without detours."""
    made = PurePosixPath(path.lstrip("/"))
    if ".." in made.parts:
        raise BadInput(f"{path!r} leads out of the archive")
    return made


def _member(number: int, name: str, mode: int, data: bytes, device: tuple[int, int]) -> bytes:
    path = name.encode() + b"\0"
    # inode, mode, uid, gid, links, mtime, size, device, device of the node, name's size, checksum
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
    head = _MAGIC + b"".join(b"%08X" % value for value in fields) + path
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)
