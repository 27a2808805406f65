"""Tracers: one that tells every transition in words, one that counts and measures.

A world switch that L0 makes without an exit of its own (an injected exception that L1 intercepts,
an interrupt that becomes a VM exit) is noticed by the level being another than it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.x86.events import Fault, Vector
from undervisor.hypervisor import words
from undervisor.hypervisor.machine import BLOCK_NS, EXIT_NS
from undervisor.hypervisor.nested.svm import NestedSvm
from undervisor.hypervisor.nested.vmx import NestedVmx
from undervisor.hypervisor.trace import Transition
from undervisor.hypervisor.verdict import Halt, Inject, Resume, Stop, Switched, Verdict, Yield
from undervisor.silicon import glue

if TYPE_CHECKING:
    from undervisor.hypervisor.exit import Exit
    from undervisor.hypervisor.trace import Tracer
    from undervisor.hypervisor.vcpu import Vcpu

_UNCAUSED: Final = "event"
_OWN: Final = frozenset({glue.EXIT_BUDGET})


class Recorder:
    """Gives `sink` a `Transition` for each exit and each world switch."""

    wants = True

    def __init__(self, sink: Callable[[Transition], None]) -> None:
        self._sink = sink
        self._levels: dict[int, int] = {}
        self._blocks = 0

    def before(self, vcpu: Vcpu, exit: Exit) -> Any:
        """The exit as it came, in words."""
        machine = vcpu.machine
        blocks, now = machine.processor.blocks, machine.now()
        ran = (blocks - self._blocks) * BLOCK_NS - EXIT_NS
        self._blocks = blocks
        level = 2 if vcpu.in_l2 else 1
        was = self._levels.get(vcpu.index, level)
        if was != level:
            self._switched(vcpu, was, level, now - ran - EXIT_NS)
        return (
            now,
            level,
            words.reason(vcpu, exit),
            vcpu.state.rip,
            words.detail(vcpu, exit),
            ran,
        )

    def after(self, vcpu: Vcpu, exit: Exit, before: Any, verdict: Verdict) -> None:
        """The exit has been handled."""
        to = 2 if vcpu.in_l2 else 1
        if before is None:
            self._switched(vcpu, self._levels.get(vcpu.index, 3 - to), to, vcpu.machine.now())
            return
        self._levels[vcpu.index] = to
        now, level, reason, rip, detail, ran = before
        nested = vcpu.nested.reason
        reflected = level == 2 and to == 1
        if reflected and nested:
            reason = nested
        why = _why(vcpu, level, to, exit.code)
        action = _action(level, to, verdict)
        self._sink(Transition(now, vcpu.index, level, to, reason, rip, action, why, detail, ran))

    def _switched(self, vcpu: Vcpu, level: int, to: int, now: int) -> None:
        """A world switch without an exit of the silicon's."""
        self._levels[vcpu.index] = to
        action = "reflect" if to == 1 else "enter L2"
        reason = vcpu.nested.reason or _UNCAUSED
        self._sink(
            Transition(now, vcpu.index, level, to, reason, vcpu.state.rip, action, _PENDING, "", 0)
        )


_PENDING: Final = "an event that L0 had for L2"


def _action(level: int, to: int, verdict: Verdict) -> str:
    """What L0 did."""
    match verdict:
        case Resume(advance=0):
            return "resume"
        case Resume(advance=length):
            return f"emulate, rip + {length}"
        case Inject(fault=fault):
            return f"inject {fault_name(fault)}"
        case Switched():
            return _SWITCHES[level, to]
        case Halt():
            return "wait for an event"
        case Yield():
            return "let others run"
        case Stop(outcome=outcome):
            return f"stop: {outcome.ending.value}"


_SWITCHES: Final = {
    (1, 2): "enter L2",
    (2, 1): "reflect",
    (1, 1): "go on in L1",
    (2, 2): "deliver an event",
}


def _why(vcpu: Vcpu, level: int, to: int, code: int) -> str:
    """Why it did that; "" where there is nothing to say."""
    nested = vcpu.nested.reason
    if level == 2:
        if to == 1:
            return "L1 intercepts it"
        return "" if code in _OWN else "L1 does not intercept it"
    if to == 2:
        return "L1 entered its guest"
    if code in _ENTRIES and nested.startswith(("VMfail", "VM-entry", "#VMEXIT(INVALID)")):
        rules = _broken(vcpu)
        return f"{nested}: {rules}" if rules else nested
    return ""


def _broken(vcpu: Vcpu) -> str:
    """The rules that the entry broke which just failed; "" where the reason says it already."""
    extension = vcpu.nested
    if isinstance(extension, NestedSvm):
        verdict = extension.state.broken
        return "; ".join(map(str, verdict.broken)) if verdict else ""
    if isinstance(extension, NestedVmx) and extension.reason.startswith(_FAILED_CHECKS):
        return str(extension.failure.violation) if extension.failure else ""
    return ""


_FAILED_CHECKS: Final = ("VMfailValid(7)", "VMfailValid(8)")
_ENTRIES: Final = frozenset({ExitCode.EXCP_UD, ExitCode.VMRUN})


def fault_name(fault: Fault) -> str:
    """An exception as the manuals write it: #GP(0), #UD."""
    try:
        name = Vector(fault.vector).name
    except ValueError:
        name = str(int(fault.vector))
    return f"#{name}" if fault.error_code is None else f"#{name}({fault.error_code:#x})"


# -- counting ----------------------------------------------------------------------------------


@dataclass(slots=True)
class Cell:
    """How often, and what it cost the host in nanoseconds."""

    count: int = 0
    host_ns: int = 0


class Tally:
    """Counts exits by level, reason and who handled them, and measures what L0's work cost.

    `cells` are by (vCPU, level, level that went on, reason).
    """

    wants = True

    def __init__(self) -> None:
        self.cells: dict[tuple[int, int, int, str], Cell] = {}
        self._names: dict[tuple[int, bool], str] = {}
        self._levels: dict[int, int] = {}

    def before(self, vcpu: Vcpu, exit: Exit) -> Any:
        """Name the exit, then start the watch."""
        code = exit.code
        level = 2 if vcpu.in_l2 else 1
        was = self._levels.get(vcpu.index, level)
        if was != level:
            self._count(vcpu, was, level, vcpu.nested.reason or _UNCAUSED, 0)
        if code in _VARIABLE:
            name = words.reason(vcpu, exit)
        else:
            name = self._names.get((code, vcpu.is_amd), "") or self._name(vcpu, exit)
        return level, name, time.perf_counter_ns()

    def after(self, vcpu: Vcpu, exit: Exit, before: Any, verdict: Verdict) -> None:
        """Stop the watch and count."""
        now = time.perf_counter_ns()
        to = 2 if vcpu.in_l2 else 1
        if before is None:
            level = self._levels.get(vcpu.index, 3 - to)
            self._count(vcpu, level, to, vcpu.nested.reason or _UNCAUSED, 0)
            return
        level, name, started = before
        if level == 2 and to == 1:
            name = vcpu.nested.reason or name
        self._count(vcpu, level, to, name, now - started)

    def _count(self, vcpu: Vcpu, level: int, to: int, name: str, spent: int) -> None:
        index = vcpu.index
        self._levels[index] = to
        key = index, level, to, name
        cell = self.cells.get(key)
        if cell is None:
            cell = self.cells[key] = Cell()
        cell.count += 1
        cell.host_ns += spent

    def _name(self, vcpu: Vcpu, exit: Exit) -> str:
        name = self._names[exit.code, vcpu.is_amd] = words.reason(vcpu, exit)
        return name


# Exits whose name depends on more than the code.
_VARIABLE: Final = frozenset({ExitCode.EXCP_UD, ExitCode.MSR})


class Both:
    """Two tracers; the second is the nearer one to L0's work and measures without the first."""

    wants = True

    def __init__(self, outer: Tracer, inner: Tracer) -> None:
        self._outer, self._inner = outer, inner

    def before(self, vcpu: Vcpu, exit: Exit) -> Any:
        """Both see it."""
        outer = self._outer.before(vcpu, exit)
        return outer, self._inner.before(vcpu, exit)

    def after(self, vcpu: Vcpu, exit: Exit, before: Any, verdict: Verdict) -> None:
        """Both see it."""
        outer, inner = (None, None) if before is None else before
        self._inner.after(vcpu, exit, inner, verdict)
        self._outer.after(vcpu, exit, outer, verdict)
