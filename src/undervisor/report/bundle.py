"""The evidence bundle of a nested setup: one zip with a page to read and JSON to parse."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from dataclasses import dataclass
from typing import Any

from undervisor import __version__
from undervisor.errors import BadInput
from undervisor.host.access.protocol import Host
from undervisor.host.below import Answer, Below, below, guest_answer
from undervisor.host.checks.engine import Examination, examine
from undervisor.host.fact import Known, value_or
from undervisor.host.facts.machine import Machine, gather
from undervisor.host.facts.software import Guest
from undervisor.host.redact import Redactor
from undervisor.report.items import Collected, collect

LEVELS = ("L0", "L1", "L2")
"""Of a nested setup; on IBM Z the LPAR is below L0."""


@dataclass(frozen=True, slots=True)
class Level:
    """One level's evidence."""

    name: str
    machine: Machine
    below: Answer
    guests: tuple[tuple[Guest, Answer], ...]
    examination: Examination
    collected: tuple[Collected, ...]
    secret_names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Bundle:
    """The levels that were reached, in order, and what of the whole is missing."""

    levels: tuple[Level, ...]

    @property
    def statement(self) -> str:
        """The sentence that a bug report has to begin with: is this nested, and is it KVM?"""
        names = ", ".join(level.name for level in self.levels)
        parts = [f"This is a nested setup; evidence is from {names}."]
        for level in self.levels:
            parts.append(f"{level.name} runs on {level.below.below.value}.")
        inner = self._inner()
        if Below.TCG in inner:
            parts.append("A level runs emulated: this is NOT KVM on KVM.")
        elif inner == {Below.KVM}:
            parts.append("It is KVM on KVM.")
        else:
            parts.append("It is not shown that this is KVM on KVM.")
        return " ".join(parts)

    def _inner(self) -> set[Below]:
        """What L1 and its guests run on; unknown where one of the two was not looked at."""
        by_name = {level.name: level for level in self.levels}
        first, second = by_name.get("L1"), by_name.get("L2")
        found = {first.below.below} if first else {Below.UNKNOWN}
        if second:
            found.add(second.below.below)
        elif first and first.guests:
            found |= {answer.below for _, answer in first.guests}
        else:
            found.add(Below.UNKNOWN)
        return found

    def vulnerabilities(self) -> dict[str, dict[str, str]]:
        """The kernel's words about each vulnerability of the processor, where the levels differ.

        A mitigation that L0 has and L1 lacks is often a feature bit that L0 does not pass on.
        """
        told = {
            level.name: value_or(level.machine.security.vulnerabilities, {})
            for level in self.levels
        }
        names = sorted({name for texts in told.values() for name in texts})
        rows = {name: {who: texts.get(name, "") for who, texts in told.items()} for name in names}
        return {name: row for name, row in rows.items() if len(set(row.values())) > 1}

    def gaps(self) -> list[dict[str, str]]:
        """What is missing, why, and the command that gets it."""
        found = [
            {"level": level.name, "item": c.item.title, "why": c.missing, "get": c.item.by_hand}
            for level in self.levels
            for c in level.collected
            if c.missing
        ]
        reached = {level.name for level in self.levels}
        for name in LEVELS:
            if name not in reached:
                get = f"undervisor report ... --{name.lower()} user@name (or a recording's folder)"
                found.append({"level": name, "item": "everything", "why": "not given", "get": get})
        return found


def level(name: str, host: Host) -> Level:
    """Collect one level."""
    machine = gather(host)
    guests: tuple[Guest, ...] = value_or(machine.software.guests, ())
    names = [host.read_line(p) for p in ("/proc/sys/kernel/hostname", "/etc/hostname")]
    found = {fact.value for fact in names if isinstance(fact, Known) and fact.value}
    return Level(
        name,
        machine,
        below(machine),
        tuple((guest, guest_answer(guest)) for guest in guests),
        examine(machine, with_security=True),
        tuple(collect(host, machine)),
        tuple(sorted(found | {name.split(".")[0] for name in found})),
    )


def contents(bundle: Bundle) -> tuple[dict[str, str], dict[str, int]]:
    """The files of the bundle with secrets removed, and what was removed by kind."""
    from undervisor.report.html import page

    redactor = Redactor(name for level in bundle.levels for name in level.secret_names)
    files = {
        f"{level.name}/{c.item.name}.txt": redactor.text(c.text)
        for level in bundle.levels
        for c in level.collected
        if not c.missing
    }
    said = _redacted(as_json(bundle), redactor)
    said["removed"] = redactor.removed
    said["files"] = sorted(files)
    files["report.json"] = json.dumps(said, indent=1) + "\n"
    files["report.html"] = page(said)
    return files, redactor.removed


def as_json(bundle: Bundle) -> dict[str, Any]:
    """The bundle as JSON has it, before redaction."""
    return {
        "made_by": f"undervisor {__version__}",
        "statement": bundle.statement,
        "levels": [_level_json(level) for level in bundle.levels],
        "vulnerabilities": bundle.vulnerabilities(),
        "missing": bundle.gaps(),
    }


def _level_json(level: Level) -> dict[str, Any]:
    machine = level.machine
    return {
        "level": level.name,
        **level.below.as_json(),
        "guests": [
            {"name": g.name, "pid": g.pid, "cpu": g.cpu} | answer.as_json()
            for g, answer in level.guests
        ],
        "kernel": value_or(machine.kernel.release, None),
        "qemu": str(value_or(machine.software.qemu, "")) or None,
        "libvirt": str(value_or(machine.software.libvirt, "")) or None,
        "processor": machine.processor.name or None,
        "architecture": value_or(machine.processor.architecture, None),
        "examination": level.examination.as_json(),
    }


def _redacted(value: Any, redactor: Redactor) -> Any:
    if isinstance(value, str):
        return redactor.text(value)
    if isinstance(value, list):
        return [_redacted(item, redactor) for item in value]
    if isinstance(value, dict):
        return {key: _redacted(item, redactor) for key, item in value.items()}
    return value


def write(path: str, files: dict[str, str]) -> None:
    """Write the zip, whole or not at all, and nothing beside it; never over another file."""
    target = os.path.abspath(path)
    if os.path.lexists(target):
        raise BadInput(f"{path} is there already", hint="give a new name")
    try:
        number, scratch = tempfile.mkstemp(prefix=".report-", dir=os.path.dirname(target))
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}") from error
    try:
        with (
            open(number, "wb") as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
        ):
            for name, text in sorted(files.items()):
                entry = zipfile.ZipInfo(f"report/{name}")
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, text.encode("utf-8", "replace"))
        os.link(scratch, target)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}") from error
    finally:
        os.unlink(scratch)
