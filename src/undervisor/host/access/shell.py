"""A machine behind a plain `sh`: what we need to know is asked for in POSIX shell.

Nothing of ours has to be installed there.  Words that go into a script are quoted with shlex.
"""

from __future__ import annotations

import re
import shlex
import socket
import struct
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

from undervisor.host.access.live import explain_msr
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
from undervisor.host.fact import Absent, Denied, Fact, Known, Missing, Unknown, from_errno, then

T = TypeVar("T")

# What the tools there say, in the C locale, for the errors that are facts.
_WORDS: tuple[tuple[str, str], ...] = (
    ("No such file or directory", "ENOENT"),
    ("nonexistent", "ENOENT"),
    ("Not a directory", "ENOTDIR"),
    ("No such device", "ENXIO"),
    ("Permission denied", "EACCES"),
    ("Operation not permitted", "EPERM"),
    ("Input/output error", "EIO"),
    ("I/O error", "EIO"),
    ("Is a directory", "EISDIR"),
)

_KINDS = {
    "regular file": "file",
    "regular empty file": "file",
    "directory": "folder",
    "character special file": "character",
    "block special file": "block",
    "fifo": "fifo",
    "socket": "socket",
}


class ShellHost(Host):
    """What all shells have in common; a subclass carries scripts there and answers back."""

    live = True

    @abstractmethod
    def execute(self, script: str, timeout: float, limit: int) -> Fact[tuple[int, bytes, bytes]]:
        """Run `script` in sh there: status, stdout, stderr."""

    def follow(self, script: str, timeout: float) -> Iterator[bytes]:
        """The output of `script` as it comes; OSError where the connection breaks or the script
        has not ended after `timeout` seconds."""
        raise OSError(f"{self.name} gives no output before a command has ended")

    def hand_over(self, script: str) -> AbstractContextManager[socket.socket]:
        """Run `script` with its standard input and output at the end of a line of its own, until
        the context is left; OSError where that is not possible."""
        raise OSError(f"{self.name} gives no line to a program")

    def read_bytes(self, path: str, limit: int = TEXT_LIMIT) -> Fact[bytes]:
        """Through `head`, which stops at the limit."""
        word = shlex.quote(path)
        script = f"if [ -e {word} ] && ! [ -f {word} ]; then echo 'Is a directory' >&2; false; "
        script += f"else head -c {limit + 1} {word}; fi"
        fact = self._ask(script, path, limit=limit + 4096)
        if isinstance(fact, Known) and len(fact.value) > limit:
            return Unknown(path, f"longer than {limit} bytes", code="EFBIG")
        return fact

    def listdir(self, path: str) -> Fact[tuple[str, ...]]:
        """Through `ls -1A`; names with a newline in them are not told apart."""
        fact = self._ask(f"ls -1A {shlex.quote(path + '/.')}", path)
        names = then(fact, lambda raw: raw.decode("utf-8", "replace").splitlines())
        return then(names, lambda lines: tuple(sorted(filter(_is_name, lines))))

    def stat(self, path: str) -> Fact[Stat]:
        """Through `stat -L -c`, which GNU and BusyBox have."""
        fact = self._ask(f"stat -L -c '%a %U %G %u %g %t %T %F' {shlex.quote(path)}", path)
        return then(fact, _stat_of)

    def usable(self, path: str) -> Fact[bool]:
        """Through `test`."""
        word = shlex.quote(path)
        fact = self._ask(f"if ! [ -e {word} ]; then ls -d {word}; elif [ -r {word} ] && "
                         f"[ -w {word} ]; then echo y; else echo n; fi", path)  # fmt: skip
        return then(fact, lambda raw: raw.strip() == b"y")

    def run(self, argv: Sequence[str], timeout: float = RUN_SECONDS) -> Fact[Output]:
        """With the folders of system tools in PATH; 127 means that there is no such command."""
        source = " ".join(argv)
        fact = self.execute(shlex.join(argv), timeout, 8 << 20)
        if not isinstance(fact, Known):
            return fact
        status, out, err = fact.value
        text = err.decode("utf-8", "replace")
        if status in (126, 127) and not out:
            return Absent(source) if status == 127 else Denied(source)
        return Known(Output(status, out.decode("utf-8", "replace"), text), source)

    def cpuid(self, leaf: int, subleaf: int = 0) -> Fact[Cpuid]:
        """From the cpuid device."""
        source = f"CPUID.{leaf:X}H:{subleaf}"
        fact = self._device("cpuid", 16, leaf | subleaf << 32, source)
        if isinstance(fact, Absent):
            return Unknown(source, "there is no cpuid device", "load the module: modprobe cpuid")
        return then(fact, lambda raw: Cpuid(*struct.unpack("<4I", raw)))

    def msr(self, index: int) -> Fact[int]:
        """From the msr device."""
        source = f"MSR {index:#x}"
        fact = self._device("msr", 8, index, source)
        if isinstance(fact, Known):
            return then(fact, lambda raw: int(struct.unpack("<Q", raw)[0]))
        return explain_msr(fact, source)

    def user(self) -> Fact[User]:
        """Through `id`."""
        fact = self._ask("id -u && id -Gn", "id")
        return then(fact, _user_of)

    def timing(self) -> Fact[Timing]:
        """Can't be measured through a shell."""
        return Unknown("timing", "a shell measures no ticks", "run undervisor on that machine")

    def kvm(self) -> Fact[KvmOffer]:
        """Can't be asked through a shell."""
        return Unknown("/dev/kvm", "a shell makes no ioctl", "run undervisor on that machine")

    def close(self) -> None:
        """Nothing to let go of."""

    def _device(self, name: str, size: int, offset: int, source: str) -> Fact[bytes]:
        script = f"dd if=/dev/cpu/0/{name} bs={size} count=1 iflag=skip_bytes skip={offset}"
        fact = self._ask(f"{script} 2>&2", source)
        return then(fact, lambda raw: _exactly(raw, size))

    def _ask(self, script: str, source: str, limit: int = TEXT_LIMIT) -> Fact[bytes]:
        """The output of `script`, or the fact behind its failure."""
        fact = self.execute(script, RUN_SECONDS, limit)
        if not isinstance(fact, Known):
            return Unknown(source, fact.why if isinstance(fact, Unknown) else str(fact))
        status, out, err = fact.value
        if status == 0:
            return Known(out, source)
        return _missing(err.decode("utf-8", "replace"), source)


def _missing(words: str, source: str) -> Missing:
    import errno

    for phrase, name in _WORDS:
        if phrase in words:
            return from_errno(getattr(errno, name), source)
    first = words.strip().splitlines()[:1]
    return Unknown(source, first[0][:200] if first else "failed without a word")


def _is_name(text: str) -> bool:
    """Whether `text` can be a name in a folder: a machine may answer with anything."""
    return text not in ("", ".", "..") and not set(text) & {"/", "\0"} and len(text) < 256


def _exactly(raw: bytes, size: int) -> bytes:
    if len(raw) != size:
        raise ValueError(f"{len(raw)} bytes instead of {size}")
    return raw


_STAT = re.compile(r"([0-7]+) (\S+) (\S+) (\d+) (\d+) ([0-9a-f]+) ([0-9a-f]+) ([a-z ]+)")


def _stat_of(raw: bytes) -> Stat:
    match = _STAT.match(raw.decode("ascii", "replace"))
    if not match:
        raise ValueError(f"stat said {raw[:80]!r}")
    mode, owner, group, uid, gid, major, minor, words = match.groups()
    kind = _KINDS.get(words.strip(), "other")
    device = (int(major, 16), int(minor, 16)) if kind in ("character", "block") else None
    # A system without a user database calls everybody UNKNOWN.
    owner, group = (n if n != "UNKNOWN" else i for n, i in ((owner, uid), (group, gid)))
    return Stat(kind, int(mode, 8), owner, group, device)


def _user_of(raw: bytes) -> User:
    lines = raw.decode("utf-8", "replace").splitlines()
    if len(lines) != 2 or not lines[0].isdigit():
        raise ValueError(f"id said {raw[:80]!r}")
    return User(int(lines[0]), tuple(sorted(lines[1].split())))
