"""A Linux on the built-in L0 as a target: its KVM, kvm_intel too, without hardware.

Linux boots once, and each machine is run by the KVM of a copy of it: what one does to its L1 goes
with it.  The tests run here; in Linux there is only the agent of the `kvm` target.
"""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import replace
from types import TracebackType
from typing import Final

from undervisor.errors import BadInput, TimedOut
from undervisor.guest.image import Image
from undervisor.guest.placement import Module
from undervisor.lab import images
from undervisor.lab.cache import Cache
from undervisor.lab.plan import Plan
from undervisor.lab.sources import sources
from undervisor.lab.target import MOST_CPUS
from undervisor.targets import Abilities, Job
from undervisor.targets.bridge import BridgeRunning, abilities, begin, check_cpus
from undervisor.targets.builtin import BuiltinRunning, BuiltinTarget
from undervisor.targets.kvm.link import Link

PATIENCE: Final = 3.0
"""Times the built-in L0's: KVM itself runs on it."""
MEMORY: Final = 768 << 20
COMMAND_LINE: Final = "console=ttyS0 quiet"
END_TIME: Final = 2.0
"""Seconds to learn how L1 ended that has closed its line."""


class LinuxTarget:
    """The KVM of a Linux on the built-in L0 with a CPU model."""

    def __init__(self, cpu: str = "intel") -> None:
        self.cpu = cpu
        self.name = f"linux ({cpu})"
        self._l0 = BuiltinTarget(cpu)
        if not self._l0.abilities.vendors:
            raise BadInput(
                f"the CPU model {cpu} has neither VMX nor SVM, so no KVM runs on it",
                hint="--cpu intel or amd, or one of their variants with the extension on",
            )
        self._lock = threading.Lock()
        self._linux: Job | None = None
        self._abilities: Abilities | None = None

    @property
    def abilities(self) -> Abilities:
        """What Linux's KVM can do; BadInput where it has none.  It is asked once."""
        job = self._job()
        with self._lock:
            if self._abilities is None:
                with self._l0.start(job) as running:
                    found = abilities(Link(_Line(running)).open(), os.cpu_count() or 1, PATIENCE)
                most = min(MOST_CPUS, found.most_cpus)
                self._abilities = replace(found, most_cpus=most)
            return self._abilities

    def start(self, job: Job) -> LinuxRunning:
        """Start an image on the KVM of a new copy."""
        job.place()
        with contextlib.ExitStack() as stack:
            linux = stack.enter_context(self._l0.start(self._job()))
            link = Link(_Line(linux))
            check_cpus(job, link.open())
            begin(link, 1, job)
            stack.pop_all()
        return LinuxRunning(link, linux)

    def _job(self) -> Job:
        """Linux as it boots, made at the first use."""
        with self._lock:
            if self._linux is None:
                cache = Cache()
                found = sources(Plan(), cache)
                disk = Module("initramfs", images.with_agent(found, cache))
                kernel = Image.parse(found.kernel.read_bytes(), found.kernel.name)
                self._linux = Job(kernel, 1, MEMORY, COMMAND_LINE, (disk,), prompt=True)
            return self._linux


class LinuxRunning(BridgeRunning):
    """A machine on a KVM of its own."""

    def __init__(self, link: Link, linux: BuiltinRunning) -> None:
        super().__init__(link, 1)
        self._linux = linux

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._linux.__exit__(kind, error, trace)


class _Line:
    """The agent's line, which at its end says how L1 ended."""

    def __init__(self, linux: BuiltinRunning) -> None:
        self._linux = linux

    def send(self, data: bytes) -> None:
        """All of `data`; EOFError with L1's end where it is gone."""
        try:
            self._linux.send(data)
        except EOFError:
            raise self._end() from None

    def receive(self, timeout: float) -> bytes:
        """Some bytes, or none after `timeout` seconds; EOFError as above."""
        try:
            return self._linux.receive(timeout)
        except EOFError:
            raise self._end() from None

    def _end(self) -> EOFError:
        try:
            return EOFError(f"L1 ended: {self._linux.wait(END_TIME).text}")
        except TimedOut:
            return EOFError("L1 has closed its line")
