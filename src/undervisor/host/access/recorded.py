"""A recorded machine: a folder that answers as the machine did.

    machine.json    what is not a file's text: errors, modes, CPUID, MSRs, commands
    files/...       the files, under their own paths

The folder may come from anybody.  Links are refused, nothing outside is ever opened, files and
JSON have a size limit, and values of the wrong type are bad input.

`complete` lists the path prefixes under which everything that is not recorded was not there
(`commands` among them means: no other command exists).  What is neither recorded nor under such
a prefix is unknown, not absent.
"""

from __future__ import annotations

import errno
import json
import os
import posixpath
import stat as stat_module
from collections.abc import Sequence
from typing import Any

from undervisor.errors import BadInput
from undervisor.host.access import recorded_values as values
from undervisor.host.access.live import KINDS, explain_msr
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
from undervisor.host.fact import Absent, Fact, Known, Missing, Unknown, from_errno

FORMAT = 1
JSON_LIMIT = 64 << 20
"""Bytes of machine.json; it holds whole command outputs."""

_SHAPES: dict[str, type] = {
    "format": int,
    "name": str,
    "complete": list,
    "errors": dict,
    "absent": list,
    "folders": dict,
    "stat": dict,
    "usable": dict,
    "cpuid": dict,
    "msr": dict,
    "commands": list,
    "user": dict,
    "timing": dict,
    "kvm": dict,
    "removed": dict,
    "about": str,
    "recorded": str,
}


class RecordedHost(Host):
    """The machine in a folder that `undervisor record` made, or that was written by hand."""

    live = False

    def __init__(self, folder: str) -> None:
        self._folder = _open_folder(folder)
        try:
            self._said = _load(self._folder, folder)
            self.name = self._said.get("name", os.path.basename(os.path.abspath(folder)))
            self._commands = {
                tuple(values.strings(command["argv"])): values.output(command)
                for command in self._said.get("commands", [])
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self.close()
            raise _bad(folder, f"machine.json is not a recording: {error!r}") from error
        except BadInput:
            self.close()
            raise

    def read_bytes(self, path: str, limit: int = TEXT_LIMIT) -> Fact[bytes]:
        """The recorded bytes."""
        missing = self._error(path)
        if missing:
            return missing
        try:
            number = self._open(path)
        except OSError as error:
            return self._not_here(path, error)
        try:
            return _read_regular(number, path, limit)
        finally:
            os.close(number)

    def listdir(self, path: str) -> Fact[tuple[str, ...]]:
        """The recorded names, or those that `files` and `stat` imply."""
        missing = self._error(path)
        if missing:
            return missing
        if path in self._said.get("folders", {}):
            return Known(tuple(sorted(values.strings(self._said["folders"][path]))), path)
        prefix = path.rstrip("/") + "/"
        known = [*self._said.get("stat", {}), *self._said.get("folders", {})]
        implied = {p[len(prefix) :].split("/")[0] for p in known if p.startswith(prefix)}
        try:
            number = self._open(path)
        except OSError as error:
            return Known(tuple(sorted(implied)), path) if implied else self._not_here(path, error)
        try:
            return Known(tuple(sorted({*os.listdir(number), *implied})), path)
        except OSError as error:
            return from_errno(error.errno or 0, path)
        finally:
            os.close(number)

    def stat(self, path: str) -> Fact[Stat]:
        """The recorded mode, or a plain one for what `files` and `folders` hold."""
        missing = self._error(path)
        if missing:
            return missing
        said = self._said.get("stat", {}).get(path)
        if said is not None:
            return values.stat(said, path)
        if path in self._said.get("folders", {}):
            return Known(Stat("folder", 0o755, "root", "root"), path)
        try:
            number = self._open(path)
        except OSError as error:
            return self._not_here(path, error)
        try:
            kind = KINDS.get(stat_module.S_IFMT(os.fstat(number).st_mode), "other")
        finally:
            os.close(number)
        return Known(Stat(kind, 0o755 if kind == "folder" else 0o644, "root", "root"), path)

    def usable(self, path: str) -> Fact[bool]:
        """What was recorded about access(2)."""
        missing = self._error(path)
        if missing:
            return missing
        said = self._said.get("usable", {}).get(path)
        if isinstance(said, bool):
            return Known(said, path)
        exists = self.stat(path)
        return exists if isinstance(exists, Absent) else Unknown(path, "not recorded")

    def run(self, argv: Sequence[str], timeout: float = RUN_SECONDS) -> Fact[Output]:
        """What the command said when it was recorded."""
        source = " ".join(argv)
        if tuple(argv) in self._commands:
            said = self._commands[tuple(argv)]
            return (
                Known(said, source) if isinstance(said, Output) else values.errno_of(said, source)
            )
        if "commands" in self._said.get("complete", []):
            return Absent(source)
        return Unknown(source, "not recorded")

    def cpuid(self, leaf: int, subleaf: int = 0) -> Fact[Cpuid]:
        """The recorded registers."""
        source = f"CPUID.{leaf:X}H:{subleaf}"
        said = self._said.get("cpuid", {}).get(f"{leaf:#x}.{subleaf}")
        if not isinstance(said, list) or len(said) != 4:
            return Unknown(source, "not recorded")
        try:
            return Known(Cpuid(*(values.number(value, 32) for value in said)), source)
        except ValueError as error:
            return Unknown(source, f"recorded wrongly: {error}")

    def msr(self, index: int) -> Fact[int]:
        """The recorded value or errno."""
        source = f"MSR {index:#x}"
        said = self._said.get("msr", {}).get(f"{index:#x}")
        if said is None:
            return Unknown(source, "not recorded", "record again as root with the msr module")
        if isinstance(said, str) and said.startswith("E"):
            return explain_msr(values.errno_of(said, source), source)
        try:
            return Known(values.number(said, 64), source)
        except ValueError as error:
            return Unknown(source, f"recorded wrongly: {error}")

    def user(self) -> Fact[User]:
        """Who recorded it."""
        said = self._said.get("user", {})
        uid = said.get("uid")
        if type(uid) is not int:
            return Unknown("id", "not recorded")
        return Known(User(uid, tuple(values.strings(said.get("groups", [])))), "id")

    def timing(self) -> Fact[Timing]:
        """The recorded measurement."""
        said = self._said.get("timing", {})
        try:
            return Known(Timing(int(said["cpuid_ticks"]), int(said["plain_ticks"])), "recorded")
        except (KeyError, TypeError, ValueError):
            return Unknown("timing", "not recorded")

    def kvm(self) -> Fact[KvmOffer]:
        """The recorded answer."""
        said = self._said.get("kvm")
        if said is None:
            return Unknown("/dev/kvm", "not recorded", "record with --live")
        try:
            numbers = [said["api_version"], said["nested_state"]]
            flags = [said["vmx"], said["svm"]]
            if not all(type(n) is int for n in numbers) or not all(type(f) is bool for f in flags):
                raise ValueError("values of the wrong type")
            return Known(KvmOffer(*numbers, *flags), "recorded")
        except (KeyError, ValueError) as error:
            return Unknown("/dev/kvm", f"recorded wrongly: {error}")

    def close(self) -> None:
        """Let go of the folder."""
        if self._folder >= 0:
            os.close(self._folder)
            self._folder = -1

    def _open(self, path: str) -> int:
        """Open files/`path` step by step, following no link and leaving the folder nowhere."""
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if ".." in parts or "\0" in path:
            raise OSError(errno.ELOOP, "climbs out of the recording")
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        number = os.open("files", flags | os.O_DIRECTORY, dir_fd=self._folder)
        for part in parts:
            try:
                below = os.open(part, flags, dir_fd=number)
            finally:
                os.close(number)
            number = below
        return number

    def _error(self, path: str) -> Missing | None:
        said = self._said.get("errors", {}).get(path)
        return None if said is None else values.errno_of(said, path)

    def _not_here(self, path: str, error: OSError) -> Missing:
        """What a path means that `files` does not hold."""
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            if error.errno == errno.ELOOP:
                return Unknown(
                    path, "the recording holds a link here, which is refused", "", "ELOOP"
                )
            return from_errno(error.errno or 0, path)
        prefixes = tuple(values.strings(self._said.get("complete", [])))
        inside = any(path == p or path.startswith(p.rstrip("/") + "/") for p in prefixes)
        folder, name = posixpath.split(path)
        names = self._said.get("folders", {}).get(folder)
        if inside or path in self._said.get("absent", []):
            return Absent(path)
        if isinstance(names, list) and name not in names:
            return Absent(path)
        return Unknown(path, "not recorded")


def _open_folder(folder: str) -> int:
    try:
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadInput(
            f"no recording at {folder}: {reason}", hint="`undervisor record DIR` makes one"
        ) from error


def _bad(folder: str, why: str) -> BadInput:
    return BadInput(f"{folder}: {why}", hint="`undervisor record DIR` makes a good one")


def _load(number: int, folder: str) -> dict[str, Any]:
    """The checked contents of machine.json."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        handle = os.open("machine.json", flags, dir_fd=number)
    except OSError as error:
        raise _bad(folder, f"machine.json: {error.strerror}") from error
    try:
        raw = _read_regular(handle, "machine.json", JSON_LIMIT)
    finally:
        os.close(handle)
    if not isinstance(raw, Known):
        raise _bad(folder, str(raw))
    try:
        said = json.loads(raw.value)
    except (ValueError, RecursionError) as error:
        raise _bad(folder, f"machine.json is not JSON: {str(error)[:200]}") from error
    if not isinstance(said, dict):
        raise _bad(folder, "machine.json is not an object")
    for key, value in said.items():
        if key not in _SHAPES:
            raise _bad(folder, f"machine.json: unknown key {key[:80]!r}")
        if type(value) is not _SHAPES[key]:
            raise _bad(folder, f"machine.json: {key} must be of type {_SHAPES[key].__name__}")
    if said.get("format") != FORMAT:
        raise _bad(folder, f"machine.json has format {said.get('format')}, not {FORMAT}")
    return said


def _read_regular(number: int, source: str, limit: int) -> Fact[bytes]:
    if not stat_module.S_ISREG(os.fstat(number).st_mode):
        return Unknown(source, "not a regular file", code="EINVAL")
    whole = bytearray()
    while piece := os.read(number, min(1 << 20, limit + 1 - len(whole))):
        whole += piece
        if len(whole) > limit:
            return Unknown(source, f"longer than {limit} bytes", code="EFBIG")
    return Known(bytes(whole), source)
