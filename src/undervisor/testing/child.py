"""A machine's process: builds it, does what the test asks for, and leaves a black box behind.

A message from the test is `(method, arguments, options)`; the answer is `(VALUE, it)` or
`(ERROR, exception)`.  In between the child may ask back, `(ASK, (callback, argument))`, and the
test may look into the machine before it answers `(ANSWER, it, {})`.
"""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from undervisor.api import Decision, FailedEntry, L2Exception, Transition, Vm, World
from undervisor.report.trace.transition import text
from undervisor.testing.blackbox import Writer
from undervisor.testing.boot import (
    ABANDONED,
    ANSWER,
    ASK,
    ERROR,
    EXCEPTION,
    VALUE,
    WHEN,
    Boot,
)
from undervisor.testing.events import Event


class _Recorded(Vm):
    """A machine that writes everything to a black box, and its whole trace to a file if wanted."""

    box: Writer | None = None
    trace: int | None = None

    def _remember(self, transition: Transition, failed: FailedEntry | None) -> None:
        super()._remember(transition, failed)
        if self.box is not None:
            self.box.transition(transition)
            if failed is not None:
                self.box.failure(str(failed))
        if self.trace is not None:
            os.write(self.trace, text(transition).encode() + b"\n")

    def _received(self, data: bytes) -> None:
        if self.box is not None:
            self.box.printed(data)
        super()._received(data)


class Server:
    """The machine and the line to the test."""

    def __init__(self, line: Connection, vm: Vm) -> None:
        self._line, self._vm = line, vm
        self._methods: dict[str, Callable[..., Any]] = {
            "run": vm.run,
            "run_until": self._run_until,
            "send": vm.send,
            "counts": lambda: dict(vm.counts()),
            "current": lambda: vm.current,
            "read_hpa": vm.read_hpa,
            "write_hpa": vm.write_hpa,
            "intercept": self._intercept,
            "world": self._world,
            "registers": self._registers,
            "now": lambda: vm.machine.now(),
        }

    def serve(self) -> Any:
        """Do what is asked, until the test is gone or answers what this side asked."""
        while True:
            try:
                name, arguments, options = self._line.recv()
            except EOFError:
                os._exit(0)
            if name == ANSWER:
                return arguments
            self._answer(*self._done(name, arguments, options))

    def _answer(self, kind: str, value: Any) -> None:
        try:
            self._line.send((kind, value))
        except (pickle.PicklingError, TypeError, AttributeError):
            self._line.send((ERROR, RuntimeError(f"{value!r} cannot leave the machine's process")))

    def _done(
        self, name: str, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[str, Any]:
        try:
            return VALUE, self._methods[name](*arguments, **options)
        except Exception as error:  # the test's own to see, whatever it is
            return ERROR, error

    def _ask(self, callback: str, argument: Any) -> Any:
        self._line.send((ASK, (callback, argument)))
        answer = self.serve()
        if answer == ABANDONED:
            self._vm.machine.request_stop()
        return answer

    # -- methods that are not the machine's own -----------------------------------------------

    def _run_until(self, has_when: bool, options: dict[str, Any]) -> Event:
        """`has_when`: a predicate of the test decides last."""
        when = (lambda transition: self._ask(WHEN, transition) is True) if has_when else None
        return self._vm.run_until(when, **options)

    def _intercept(self, vectors: list[int]) -> None:
        self._vm.intercept(vectors, self._on_exception)

    def _on_exception(self, exception: L2Exception) -> Decision:
        e = exception
        answer = self._ask(EXCEPTION, (e.vcpu, e.vector, e.error_code, e.address))
        return Decision[answer] if answer in Decision.__members__ else Decision.PASS

    def _world(self, level: int, vcpu: int, method: str, *arguments: Any, **options: Any) -> Any:
        world = self._vm.world(level, vcpu)
        if method in ("is_running", "exists"):
            return getattr(world, method)
        return getattr(world, method)(*arguments, **options)

    def _registers(self) -> str:
        """Both levels on the processor that the machine stopped on, and where the others are."""
        vm = self._vm
        worlds = [vm.l1(), vm.l2()]
        parts = [world.text_of_registers() for world in worlds if world.exists]
        for vcpu in vm.machine.vcpus:
            if vcpu.index != vm.current:
                level = 2 if vcpu.in_l2 else 1
                rip = World(vcpu, level)["rip"]
                state = vcpu.activity.name.lower().replace("_", " ")
                parts.append(f"vCPU {vcpu.index}: in L{level} at rip {rip:#x}, {state}")
        return "\n".join(parts)


def serve(line: Connection, boot: Boot, folder: Path, trace: Path | None) -> None:
    """A child's whole life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the test decides
    try:
        vm = _Recorded(**boot.options())
        vm.box = Writer(folder)
        if trace is not None:
            vm.trace = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    except Exception as error:
        line.send((ERROR, error))
        os._exit(0)
    line.send((VALUE, None))
    Server(line, vm).serve()
