"""Apply a plan, and take it back.

What was there is written down first, then each file is replaced by a rename, so that a kill at
any moment leaves every file as it was or as it shall be, and applying or undoing again finishes
the work.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from typing import Any

from undervisor.errors import BadInput
from undervisor.host.access.process import run_bounded
from undervisor.host.access.protocol import Output
from undervisor.host.fact import Fact, Known
from undervisor.host.fixes.plan import Command, FileChange, Plan

JOURNAL = "/var/lib/undervisor/undo.json"
"""What was there before our changes, oldest first."""

COMMAND_SECONDS = 600.0
"""An initramfs for several kernels takes minutes on a slow disk."""

Say = Callable[[str], None]


class System:
    """The system below `root`, to which a plan is applied."""

    def __init__(self, root: str = "/") -> None:
        self.root = os.path.realpath(root)
        if not os.path.isdir(self.root):
            raise BadInput(f"{root} is no folder")

    def read(self, path: str) -> str | None:
        """The text of a file; None where there is none."""
        try:
            with open(self._place(path), encoding="utf-8", errors="surrogateescape") as file:
                return file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BadInput(f"cannot read {path}: {error.strerror}") from error

    def write(self, path: str, text: str | None) -> None:
        """Replace a file at once, or remove it; its mode stays, its folder is made."""
        place = self._place(path)
        try:
            if text is None:
                if os.path.lexists(place):
                    os.unlink(place)
            else:
                os.makedirs(os.path.dirname(place), exist_ok=True)
                _replace(place, text)
            _sync_folder(os.path.dirname(place))
        except OSError as error:
            hint = "run it with sudo" if isinstance(error, PermissionError) else ""
            raise BadInput(f"cannot write {path}: {error.strerror}", hint=hint) from error

    def run(self, argv: tuple[str, ...]) -> Fact[Output]:
        """Run a command, in the root where it is not the running system's."""
        inside = () if self.root == "/" else ("chroot", self.root)
        return run_bounded([*inside, *argv], COMMAND_SECONDS)

    def _place(self, path: str) -> str:
        """Where `path` is, links in its folder followed; never outside of the root."""
        folder, name = os.path.split(os.path.normpath("/" + path.lstrip("/")))
        place = os.path.join(os.path.realpath(self.root + folder), name)
        if os.path.islink(place):
            place = os.path.realpath(place)
        if os.path.commonpath([place, self.root]) != self.root:
            raise BadInput(f"{path} leads out of {self.root}")
        return place


def apply(plan: Plan, system: System, say: Say) -> None:
    """Apply `plan`; BadInput where a file changed since the plan or a command fails."""
    for change in plan.changes:
        if system.read(change.path) not in (change.before, change.after):
            raise BadInput(f"{change.path} changed meanwhile", hint="run it again")
    if plan.changes:
        _remember(system, plan)
    for change in plan.changes:
        system.write(change.path, change.after)
        say(f"done: {change}")
    for command in plan.commands:
        _run(system, command, say)


def undo_plan(system: System) -> Plan:
    """The plan that takes our changes back; refused where somebody changed the files since."""
    entries = _journal(system)
    changes, refusals = [], []
    for entry in entries:
        now = system.read(entry["path"])
        if now == entry["before"]:
            continue
        if now != entry["after"]:
            refusals.append(entry["path"])
        changes.append(FileChange(entry["path"], now, entry["before"], "as it was before"))
    refusal = f"changed by somebody else since: {', '.join(refusals)}" if refusals else ""
    commands = tuple(
        Command(tuple(argv), "as after the change")
        for entry in entries
        for argv in entry["after_it"]
    )
    return Plan("undo", tuple(changes), tuple(dict.fromkeys(commands)) if changes else (), refusal)


def undo(system: System, say: Say) -> Plan:
    """Take our changes back; the plan that was applied."""
    plan = undo_plan(system)
    if plan.refusal:
        return plan
    for change in plan.changes:
        system.write(change.path, change.after)
        say(f"done: {change}")
    for command in plan.commands:
        _run(system, command, say)
    system.write(JOURNAL, None)
    return plan


def _remember(system: System, plan: Plan) -> None:
    """Add the plan to the journal; the oldest `before` of a file counts."""
    entries = {entry["path"]: entry for entry in _journal(system)}
    lasting = [list(c.argv) for c in plan.commands if c.argv[0] != "modprobe"]
    for change in plan.changes:
        before = entries[change.path]["before"] if change.path in entries else change.before
        entries[change.path] = {
            "path": change.path,
            "before": before,
            "after": change.after,
            "after_it": lasting,
        }
    text = json.dumps({"format": 1, "files": list(entries.values())}, indent=1)
    system.write(JOURNAL, text + "\n")


def _journal(system: System) -> list[dict[str, Any]]:
    text = system.read(JOURNAL)
    if text is None:
        return []
    try:
        said = json.loads(text)
        files = said["files"]
        for entry in files:
            if not isinstance(entry["path"], str) or not isinstance(entry["after_it"], list):
                raise ValueError("an entry of the wrong type")
            for key in ("before", "after"):
                if not isinstance(entry[key], str | None):
                    raise ValueError(f"{key} of the wrong type")
        return list(files)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(
            f"{JOURNAL} is damaged: {error}", hint="move it away; undo by hand"
        ) from error


def _run(system: System, command: Command, say: Say) -> None:
    fact = system.run(command.argv)
    words = " ".join(command.argv)
    if isinstance(fact, Known) and fact.value.status == 0:
        say(f"done: {command}")
        return
    why = str(fact)
    if isinstance(fact, Known):
        why = (fact.value.stderr.strip() or fact.value.stdout.strip())[-300:]
        why = why or f"status {fact.value.status}"
    if command.rescue:
        system.run(command.rescue)
        say(f"rescue: {' '.join(command.rescue)}")
    raise BadInput(f"{words} failed: {why}", hint="files are changed; --undo takes them back")


def _replace(place: str, text: str) -> None:
    """Write beside, flush to disk, rename."""
    scratch = f"{place}.undervisor-new"
    mode = stat.S_IMODE(os.stat(place).st_mode) if os.path.exists(place) else 0o644
    number = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
    with open(number, "w", encoding="utf-8", errors="surrogateescape") as file:
        os.fchmod(number, mode)
        file.write(text)
        file.flush()
        os.fsync(number)
    os.rename(scratch, place)


def _sync_folder(folder: str) -> None:
    if not os.path.isdir(folder):
        return
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
