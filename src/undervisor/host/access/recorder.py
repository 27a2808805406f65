"""Record a machine: ask it everything that our checks ask, and write the answers down.

The recorder is itself a `Host`: whatever is read through it is kept.  So a recording holds exactly
what the checks looked at, and they see the same machine again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from undervisor.errors import BadInput
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
from undervisor.host.access.recorded import FORMAT
from undervisor.host.fact import Absent, Denied, Fact, Known, Missing
from undervisor.host.redact import Redactor

_ONLY_ENTRIES = {"/proc/1/environ": (b"\0", b"container=")}
"""Files of which a recording keeps only entries that begin so: the rest is nobody's business."""

_ONLY_LINES = {"ps": re.compile(r"\s*\d+ \S*(?:qemu|kvm)")}
"""Commands of whose output a recording keeps only such lines."""


class RecordingHost(Host):
    """Another host, with every answer kept."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.name = host.name
        self.live = host.live
        self._files: dict[str, bytes] = {}
        self._said: dict[str, Any] = {
            key: {} for key in ("errors", "folders", "stat", "usable", "cpuid", "msr", "user")
        }
        self._absent: set[str] = set()
        self._commands: dict[tuple[str, ...], dict[str, Any]] = {}

    def read_bytes(self, path: str, limit: int = TEXT_LIMIT) -> Fact[bytes]:
        """Read and keep."""
        fact = self._host.read_bytes(path, limit)
        if isinstance(fact, Known):
            self._files[path] = _kept(path, fact.value)
        else:
            self._miss(path, fact)
        return fact

    def listdir(self, path: str) -> Fact[tuple[str, ...]]:
        """List and keep."""
        fact = self._host.listdir(path)
        if isinstance(fact, Known):
            self._said["folders"][path] = list(fact.value)
        else:
            self._miss(path, fact)
        return fact

    def stat(self, path: str) -> Fact[Stat]:
        """Look and keep."""
        fact = self._host.stat(path)
        if isinstance(fact, Known):
            value = fact.value
            said: dict[str, Any] = {"kind": value.kind, "mode": f"{value.mode:04o}"}
            said |= {"owner": _system_name(value.owner), "group": _system_name(value.group)}
            if value.device:
                said["device"] = list(value.device)
            self._said["stat"][path] = said
        else:
            self._miss(path, fact)
        return fact

    def usable(self, path: str) -> Fact[bool]:
        """Ask and keep."""
        fact = self._host.usable(path)
        if isinstance(fact, Known):
            self._said["usable"][path] = fact.value
        else:
            self._miss(path, fact)
        return fact

    def run(self, argv: Sequence[str], timeout: float = RUN_SECONDS) -> Fact[Output]:
        """Run and keep."""
        fact = self._host.run(argv, timeout)
        said: dict[str, Any] = {"argv": list(argv)}
        if isinstance(fact, Known):
            said["status"] = fact.value.status
            said["stdout"] = _lines(_kept_lines(argv[0], fact.value.stdout))
            said["stderr"] = _lines(fact.value.stderr)
        else:
            said["error"] = _error_word(fact)
        self._commands[tuple(argv)] = said
        return fact

    def cpuid(self, leaf: int, subleaf: int = 0) -> Fact[Cpuid]:
        """Execute and keep."""
        fact = self._host.cpuid(leaf, subleaf)
        if isinstance(fact, Known):
            it = fact.value
            words = [f"{value:#x}" for value in (it.eax, it.ebx, it.ecx, it.edx)]
            self._said["cpuid"][f"{leaf:#x}.{subleaf}"] = words
        return fact

    def msr(self, index: int) -> Fact[int]:
        """Read and keep."""
        fact = self._host.msr(index)
        if isinstance(fact, Known):
            self._said["msr"][f"{index:#x}"] = f"{fact.value:#x}"
        else:
            # An absent MSR is one that faults; a missing device is unknown.
            words = {Absent: "EIO", Denied: "EACCES"}
            self._said["msr"][f"{index:#x}"] = words.get(type(fact), "ENOENT")
        return fact

    def user(self) -> Fact[User]:
        """Ask and keep; the names of ordinary groups are replaced."""
        fact = self._host.user()
        if isinstance(fact, Known):
            groups = [_system_name(group) for group in fact.value.groups]
            self._said["user"] = {"uid": fact.value.uid, "groups": groups}
        return fact

    def timing(self) -> Fact[Timing]:
        """Measure and keep."""
        fact = self._host.timing()
        if isinstance(fact, Known):
            value = fact.value
            self._said["timing"] = {
                "cpuid_ticks": value.cpuid_ticks,
                "plain_ticks": value.plain_ticks,
            }
        return fact

    def kvm(self) -> Fact[KvmOffer]:
        """Ask and keep."""
        fact = self._host.kvm()
        if isinstance(fact, Known):
            self._said["kvm"] = dataclasses.asdict(fact.value)
        return fact

    def close(self) -> None:
        """Let go of the machine behind."""
        self._host.close()

    def names(self) -> list[str]:
        """The machine's own names, which a recording must not hold."""
        found = set()
        for path in ("/proc/sys/kernel/hostname", "/etc/hostname"):
            fact = self._host.read_line(path)
            if isinstance(fact, Known) and fact.value:
                found |= {fact.value, fact.value.split(".")[0]}
        return sorted(found)

    def write(self, folder: str, about: str = "") -> dict[str, int]:
        """Write the recording to a new `folder`, whole or not at all; the secrets removed by kind.

        Raises BadInput where the folder can't be written or is not empty.
        """
        target = os.path.abspath(folder)
        redactor = Redactor(self.names())
        try:
            if os.path.lexists(target) and (os.path.islink(target) or os.listdir(target)):
                raise BadInput(f"{folder} is not empty", hint="give a new folder")
            scratch = tempfile.mkdtemp(prefix=".recording-", dir=os.path.dirname(target))
        except OSError as error:
            raise BadInput(f"cannot write {folder}: {error.strerror}") from error
        try:
            os.chmod(scratch, 0o755)
            self._fill(scratch, redactor, about)
            os.rename(scratch, target)
        except OSError as error:
            raise BadInput(f"cannot write {folder}: {error.strerror}") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return redactor.removed

    def _fill(self, scratch: str, redactor: Redactor, about: str) -> None:
        os.mkdir(os.path.join(scratch, "files"))
        for path, raw in sorted(self._files.items()):
            place = os.path.join(scratch, "files", os.path.normpath(path).lstrip("/"))
            os.makedirs(os.path.dirname(place), exist_ok=True)
            with open(place, "wb") as file:
                file.write(redactor.raw(raw))
        text = json.dumps([self._said, sorted(self._absent), list(self._commands.values())])
        said, absent, commands = json.loads(_redact_json(text, redactor))
        whole = {
            "format": FORMAT,
            "name": "recorded machine",
            "about": about,
            "recorded": datetime.now(UTC).strftime("%Y-%m-%d"),
            **said,
            "absent": absent,
            "commands": commands,
            "removed": redactor.removed,
        }
        with open(os.path.join(scratch, "machine.json"), "w") as file:
            json.dump(whole, file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    def _miss(self, path: str, fact: Missing) -> None:
        if isinstance(fact, Absent):
            self._absent.add(path)
        else:
            self._said["errors"][path] = _error_word(fact)


def _kept(path: str, raw: bytes) -> bytes:
    """What of a file goes into a recording."""
    if path not in _ONLY_ENTRIES:
        return raw
    separator, beginning = _ONLY_ENTRIES[path]
    return separator.join(e for e in raw.split(separator) if e.startswith(beginning))


def _kept_lines(command: str, text: str) -> str:
    """What of a command's output goes into a recording."""
    shape = _ONLY_LINES.get(command)
    if shape is None:
        return text
    return "".join(line for line in text.splitlines(keepends=True) if shape.match(line))


def _redact_json(text: str, redactor: Redactor) -> str:
    """Redact every string inside, keys included, without breaking the JSON around it."""

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return redactor.text(value)
        if isinstance(value, list):
            return [walk(item) for item in value]
        if isinstance(value, dict):
            return {redactor.text(key): walk(item) for key, item in value.items()}
        return value

    return json.dumps(walk(json.loads(text)))


def _lines(text: str) -> str | list[str]:
    """As lines where that is the same text, for people who read the JSON."""
    return text[:-1].split("\n") if text.endswith("\n") else text


def _error_word(fact: Missing) -> str:
    if isinstance(fact, Absent):
        return "ENOENT"
    if isinstance(fact, Denied):
        return "EACCES"
    return fact.code if fact.code and not fact.code.startswith("ET") else fact.why


_SYSTEM_NAMES = {"root", "kvm", "libvirt", "libvirt-qemu", "qemu", "docker", "sudo", "wheel", "adm"}
_SYSTEM_NAMES |= {"disk", "users", "nobody", "nogroup", "admin", "lxd", "libvirtd"}


def _system_name(name: str) -> str:
    return name if name in _SYSTEM_NAMES or name.isdigit() else "someone"
