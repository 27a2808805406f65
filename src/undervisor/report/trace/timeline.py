"""A timeline in Chrome's trace-event format, which Perfetto (ui.perfetto.dev) opens.

A process per vCPU with a lane per level: when L1 and L2 ran, and each exit on L0's lane.  Times
are the machine's virtual ones, so the same run draws the same picture.
"""

from __future__ import annotations

import json
from typing import Final, TextIO

from undervisor.report.trace.transition import Transition

EXIT_NS: Final = 1000
"""What an exit costs in virtual time: the length of its box on L0's lane."""

_LANES: Final = {0: "L0 undervisor", 1: "L1 hypervisor", 2: "L2 guest"}


class Timeline:
    """Writes events to `file` as they come; `close` completes the document."""

    def __init__(self, file: TextIO, vcpus: int, title: str) -> None:
        self._file = file
        self._first = True
        file.write('{"displayTimeUnit":"ns","otherData":')
        json.dump({"title": title, "clock": "virtual time of the machine"}, file)
        file.write(',"traceEvents":[\n')
        for vcpu in range(vcpus):
            self._name(vcpu, None, "process_name", f"vCPU {vcpu}")
            self._put({"ph": "M", "name": "process_sort_index", "pid": vcpu,
                       "args": {"sort_index": vcpu}})  # fmt: skip
            for level, name in _LANES.items():
                self._name(vcpu, level, "thread_name", name)

    def add(self, transition: Transition) -> None:
        """The time that the guest ran, and the exit that ended it."""
        t = transition
        start = t.time - EXIT_NS
        if t.ran > 0:
            self._box(t.vcpu, t.level, f"L{t.level}", start - t.ran, t.ran, {})
        about = {
            "from": f"L{t.level}",
            "to": f"L{t.to}",
            "rip": f"{t.rip:#x}",
            "detail": t.detail,
            "action": t.action,
            "why": t.why,
        }
        self._box(t.vcpu, 0, t.reason, start, EXIT_NS, about)

    def close(self) -> None:
        """The end of the document."""
        self._file.write("\n]}\n")
        self._file.close()

    def _box(
        self, vcpu: int, level: int, name: str, start: int, length: int, about: dict[str, str]
    ) -> None:
        self._put(
            {
                "ph": "X",
                "name": name,
                "cat": f"L{level}",
                "pid": vcpu,
                "tid": level,
                "ts": start / 1000,  # the format counts microseconds
                "dur": length / 1000,
                "args": about,
            }
        )

    def _name(self, vcpu: int, level: int | None, kind: str, name: str) -> None:
        event: dict[str, object] = {"ph": "M", "name": kind, "pid": vcpu, "args": {"name": name}}
        if level is not None:
            event["tid"] = level
        self._put(event)

    def _put(self, event: dict[str, object]) -> None:
        if not self._first:
            self._file.write(",\n")
        self._first = False
        json.dump(event, self._file, separators=(",", ":"))
