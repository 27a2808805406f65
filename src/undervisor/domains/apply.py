"""Give libvirt a definition: the plan first, the old one kept, and a way back."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import tempfile
import uuid as uuid_module
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from lxml import etree

from undervisor.domains.connection import Libvirt
from undervisor.domains.libvirt_xml import DomainXml
from undervisor.errors import BadInput


@dataclass(frozen=True, slots=True)
class Plan:
    """What would be defined; an empty `before` or `after` means that there is no such domain."""

    name: str
    before: str
    after: str
    running: bool

    @property
    def empty(self) -> bool:
        """Whether nothing changes."""
        return _canonical(self.before) == _canonical(self.after)

    def lines(self) -> list[str]:
        """The plan as an operator reads it."""
        verb = "change" if self.before and self.after else "define" if self.after else "remove"
        lines = [f"{verb} the domain {self.name}:"]
        if self.empty:
            return [*lines, "  nothing to do"]
        old, new = (_canonical(text).splitlines() for text in (self.before, self.after))
        change = difflib.unified_diff(old, new, "now", "then", lineterm="")
        lines += [f"  {line}" for line in change]
        if self.running:
            lines.append("  it runs: the change counts at its next start")
        return lines

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON has it."""
        return {"name": self.name, "before": self.before, "after": self.after,
                "running": self.running, "empty": self.empty}  # fmt: skip


def plan(libvirt: Libvirt, document: DomainXml) -> Plan:
    """What `document` would change; it gets the UUID of the domain that it replaces."""
    name = document.guest.name
    if not libvirt.has_domain(name):
        if not document.uuid:
            document = document.with_uuid(str(uuid_module.uuid4()))
        return Plan(name, "", document.text, False)
    old = libvirt.document(name)
    if document.uuid and document.uuid != old.uuid:
        raise BadInput(
            f"there is a domain {name} with another UUID ({old.uuid})",
            hint="remove <uuid> from the definition to change that domain",
        )
    after = document if document.uuid else document.with_uuid(old.uuid)
    return Plan(name, old.text, after.text, libvirt.active(name))


def plan_removal(libvirt: Libvirt, name: str) -> Plan:
    """Remove a domain's definition; it must not run."""
    if libvirt.active(name):
        raise BadInput(f"{name} runs", hint="shut it down first")
    return Plan(name, libvirt.document(name).text, "", False)


def apply(libvirt: Libvirt, planned: Plan, history: History) -> str:
    """Carry out a plan; the definition as libvirt has it then.

    The old definition is on disk before anything changes.
    """
    _unchanged(libvirt, planned.name, planned.before)
    history.remember(planned.name, planned.before, planned.after)
    try:
        result = _carry_out(libvirt, planned)
    except BadInput:
        history.forget(planned.name)
        raise
    history.settle(planned.name, result)
    return result


def plan_undo(libvirt: Libvirt, name: str, history: History) -> Plan:
    """The plan that takes our last change of `name` back; refused if somebody changed it since."""
    entry = history.last(name)
    now = libvirt.document(name).text if libvirt.has_domain(name) else ""
    if _canonical(now) != _canonical(entry["after"]):
        raise BadInput(
            f"{name} was changed by somebody else since",
            hint=f"the definition before is in {history.path(name)}",
        )
    running = bool(now) and libvirt.active(name)
    if running and not entry["before"]:
        raise BadInput(f"{name} runs", hint="shut it down first")
    return Plan(name, now, entry["before"], running)


def undo(libvirt: Libvirt, planned: Plan, history: History) -> None:
    """Carry out what `plan_undo` gave."""
    _unchanged(libvirt, planned.name, planned.before)
    _carry_out(libvirt, planned)
    history.forget(planned.name)


def _carry_out(libvirt: Libvirt, planned: Plan) -> str:
    if not planned.after:
        libvirt.undefine(planned.name)
        return ""
    libvirt.define(planned.after)
    return libvirt.document(planned.name).text


def _unchanged(libvirt: Libvirt, name: str, before: str) -> None:
    now = libvirt.document(name).text if libvirt.has_domain(name) else ""
    if _canonical(now) != _canonical(before):
        raise BadInput(f"{name} changed meanwhile", hint="run it again")


def _canonical(text: str) -> str:
    """The document with its own indentation, for comparison and for people."""
    if not text:
        return ""
    parser = etree.XMLParser(remove_blank_text=True, resolve_entities=False, no_network=True)
    root = etree.fromstring(text.encode(), parser)
    etree.indent(root)
    return etree.tostring(root, encoding="unicode")


class History:
    """What was there before our changes, a file for each domain."""

    def __init__(self, folder: str = "") -> None:
        self.folder = folder or _state_folder()

    def path(self, name: str) -> str:
        """The file of a domain."""
        return os.path.join(self.folder, quote(name, safe="")[:200] + ".json")

    def last(self, name: str) -> dict[str, str]:
        """The last change; BadInput where there is none."""
        entries = self._read(name)
        if not entries:
            raise BadInput(f"no change of {name} is known", hint=f"looked in {self.path(name)}")
        return entries[-1]

    def remember(self, name: str, before: str, after: str) -> None:
        """Keep a change that is about to be made."""
        self._write(name, [*self._read(name), {"before": before, "after": after}])

    def settle(self, name: str, result: str) -> None:
        """The change was made, and libvirt has made this of it."""
        entries = self._read(name)
        entries[-1]["after"] = result
        self._write(name, entries)

    def forget(self, name: str) -> None:
        """The last change is no more."""
        self._write(name, self._read(name)[:-1])

    def _read(self, name: str) -> list[dict[str, str]]:
        try:
            with open(self.path(name), encoding="utf-8") as file:
                entries = json.load(file)
            return [{key: str(entry[key]) for key in ("before", "after")} for entry in entries]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadInput(
                f"{self.path(name)} can't be read: {error}", hint="move it away"
            ) from error

    def _write(self, name: str, entries: list[dict[str, str]]) -> None:
        """At once: the old file or the new one, readable by its owner only."""
        path = self.path(name)
        try:
            if not entries:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                return
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            number, scratch = tempfile.mkstemp(dir=self.folder)
            with open(number, "w", encoding="utf-8") as file:
                json.dump(entries, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.rename(scratch, path)
        except OSError as error:
            raise BadInput(f"cannot write {path}: {error.strerror}") from error


def _state_folder() -> str:
    if os.geteuid() == 0:
        return "/var/lib/undervisor/domains"
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(base, "undervisor", "domains")
