"""Events of KVM's tracepoints, read from the text of trace-cmd, perf and trace_pipe.

trace-cmd report:  CPU 0/KVM-4121  [002]  1234.567890: kvm_exit:   vcpu 0 reason CPUID rip ...
perf script:       CPU 0/KVM  4121 [002]  1234.567890: kvm:kvm_exit: vcpu 0 reason CPUID ...
trace_pipe:        CPU 0/KVM-4121  [002] d..1. 1234.567890: kvm_exit: vcpu 0 reason CPUID ...
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

LINE_LIMIT = 4096
"""Characters of a line that are looked at; KVM's longest event has about 400."""


class Event(Enum):
    """The tracepoints that tell whose an exit was."""

    ENTRY = "kvm_entry"
    EXIT = "kvm_exit"
    NESTED_ENTRY = "kvm_nested_vmenter"
    NESTED_EXIT = "kvm_nested_vmexit"
    NESTED_INJECT = "kvm_nested_vmexit_inject"
    LOST = "lost events"


_EVENTS = {event.value: event for event in Event} | {"kvm_nested_vmrun": Event.NESTED_ENTRY}
"""By name; kernels before 5.11 called the nested entry of SVM kvm_nested_vmrun."""

TRACEPOINTS = (
    "kvm_entry",
    "kvm_exit",
    "kvm_nested_vmenter",
    "kvm_nested_vmexit",
    "kvm_nested_vmexit_inject",
)
"""What has to be recorded."""


@dataclass(frozen=True, slots=True)
class Record:
    """One event: when (seconds), in which thread, and the exit reason where it has one.

    The thread stands for the vCPU: QEMU, and every VMM that we know, runs each vCPU in a thread of
    its own, and kernels before 6.8 do not print the vCPU's number with every event.
    """

    event: Event
    time: float
    thread: int
    reason: str = ""


_LINE = re.compile(
    r"^\s*(?:.{0,64}?)[-\s](?P<thread>\d{1,10})\s+(?:\([^)]{0,20}\)\s+)?\[\d{1,4}\]\s+"
    r"(?:[\w.#]{4,8}\s+)?(?P<time>\d{1,12}\.\d{1,9}):\s+(?:kvm:)?(?P<event>kvm_\w{1,40}):\s*(?P<rest>.*)$"
)
_REASON = re.compile(r"\breason:?\s+([\w-]{1,40})")
_LOST = re.compile(r"\[?LOST (?:\d+ )?EVENTS|PERF_RECORD_LOST", re.I)


def parse(lines: Iterable[str]) -> Iterator[Record]:
    """The events in `lines`; other lines are passed over."""
    for line in lines:
        line = line[:LINE_LIMIT]
        match = _LINE.match(line)
        if match:
            event = _EVENTS.get(match["event"])
            if event:
                yield _record(event, match)
        elif _LOST.search(line):
            yield Record(Event.LOST, 0.0, 0)


def _record(event: Event, match: re.Match[str]) -> Record:
    reason = _REASON.search(match["rest"])
    return Record(
        event,
        float(match["time"]),
        int(match["thread"]),
        _tidy(reason[1]) if reason else "",
    )


def _tidy(reason: str) -> str:
    """`EXIT_REASON_CPUID`, `SVM_EXIT_CPUID`, `exit_cpuid` and `CPUID` are one reason."""
    word = reason.upper()
    for prefix in ("EXIT_REASON_", "SVM_EXIT_", "EXIT_"):
        word = word.removeprefix(prefix)
    return word
