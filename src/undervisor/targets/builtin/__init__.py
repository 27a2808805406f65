"""The built-in L0 as a target: each machine in a process of its own.

`template` makes the processes, `running` is a machine from its user's side, `machine` builds one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Final

from undervisor.errors import SiliconDied
from undervisor.hypervisor import models
from undervisor.hypervisor.machine import MAX_CPUS
from undervisor.hypervisor.quirks import named as named_quirks
from undervisor.targets import Abilities, Job
from undervisor.targets.builtin.machine import build
from undervisor.targets.builtin.running import BuiltinRunning
from undervisor.targets.builtin.template import Template

__all__ = ["BuiltinRunning", "BuiltinTarget", "build"]

_MOST_TEMPLATES: Final = 8


class BuiltinTarget:
    """The built-in L0 with a CPU model and, if wanted, quirks."""

    def __init__(self, cpu: str = "amd", quirks: Iterable[str] = ()) -> None:
        self.cpu = cpu
        self.model = models.named(cpu)
        self.quirks = tuple(quirk.name for quirk in named_quirks(quirks))
        self.name = f"builtin ({cpu})"
        self._lock = threading.Lock()
        self._templates: dict[Job, Template] = {}

    @property
    def abilities(self) -> Abilities:
        """What its CPU model has."""
        extension = {name for name in ("vmx", "svm") if self.model.has(name)}
        return Abilities(frozenset(extension), MAX_CPUS, self.model.features, copies=True)

    def start(self, job: Job) -> BuiltinRunning:
        """Start an image in a process of its own: a copy of the job's template.

        SiliconDied where the template is dead, as an image can make it that has a prompt.
        """
        job.place()  # bad input is told here, not by the process
        try:
            return BuiltinRunning(self._template(job))
        except SiliconDied:
            with self._lock:  # the next start tries anew
                self._templates.pop(job, None)
            raise

    def _template(self, job: Job) -> Template:
        """The template of a job, made at its first start; the oldest go when there are many."""
        with self._lock:
            found = self._templates.pop(job, None)
            if found is None:
                while len(self._templates) >= _MOST_TEMPLATES:
                    self._templates.pop(next(iter(self._templates)))
                found = Template(job, self.cpu, self.quirks)
            self._templates[job] = found
            return found
