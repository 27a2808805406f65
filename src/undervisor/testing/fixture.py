"""The `undervisor` fixture of one test: boots its machines, and knows them when it has failed."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from undervisor.errors import BadInput
from undervisor.testing.boot import DEFAULT_MEMORY, Boot
from undervisor.testing.remote import BootedVm, TimeLimit

if TYPE_CHECKING:
    from undervisor.guest.image import Module

_UNFIT = re.compile(r"[^\w.\-\[\]]+")
LONGEST_NAME = 150


class Undervisor:
    """An L0 for one test.

    `cpu` and `cpus` are what machines get that do not name their own: from the marker, from
    `--undervisor-cpu`, from the ini-file.
    """

    def __init__(
        self, test: str, cpu: str, cpus: int, memory: int, timeout: float, traces: str | None
    ) -> None:
        self.cpu, self.cpus, self.memory = cpu, cpus, memory
        self.vms: list[BootedVm] = []
        """The machines of this test, in the order in which they were booted."""
        self._limit = TimeLimit(timeout)
        self._test, self._traces = test, traces

    def __repr__(self) -> str:
        return f"<undervisor: {self.cpu}, {self.cpus} cpus>"

    def boot(
        self,
        image: str | PathLike[str] | bytes,
        *,
        cpu: str = "",
        cpus: int = 0,
        memory: int = 0,
        append: str = "",
        modules: Sequence[Module] = (),
        raw: int | None = None,
        quirks: Sequence[str] = (),
    ) -> BootedVm:
        """A machine with the image (a path, or the bytes) in its memory, before its first step.

        `cpu` is a CPU model, `cpus` 1 to 8, `memory` bytes, `append` the command line, `raw` the
        address of a flat binary, `quirks` named defects of the L0.  BadInput where the image, the
        model or a size cannot be used.
        """
        __tracebackhide__ = True
        where = image if isinstance(image, bytes) else str(Path(image).absolute())
        boot = Boot(
            where,
            cpu=cpu or self.cpu,
            cpus=cpus or self.cpus,
            memory=memory or self.memory or DEFAULT_MEMORY,
            append=append,
            modules=tuple(modules),
            raw=raw,
            quirks=tuple(quirks),
        )
        folder = Path(tempfile.mkdtemp(prefix="undervisor-"))
        trace = self._file("trace") if self._traces is not None else None
        vm = BootedVm(boot, self._limit, folder, trace)
        self.vms.append(vm)
        return vm

    def report(self, vm: BootedVm, last: int) -> str:
        """What is attached to a failure; the whole of it goes to a file where that was asked."""
        from undervisor.testing.report import describe

        if self._traces is not None:
            path = self._file("report", self.vms.index(vm))
            path.write_text(f"{vm.boot}\n{describe(vm, None)}\n", encoding="utf-8")
        return describe(vm, last)

    def _file(self, kind: str, number: int | None = None) -> Path:
        """DIR/TEST.NUMBER.KIND; the first machine has no number."""
        assert self._traces is not None
        folder = Path(self._traces)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"--undervisor-trace {folder}: {error.strerror}") from None
        index = len(self.vms) if number is None else number
        name = _UNFIT.sub("-", self._test.replace("::", "."))[-LONGEST_NAME:].lstrip("-.")
        return folder / f"{name}{f'.{index}' if index else ''}.{kind}.txt"

    def close(self) -> None:
        """End all machines."""
        for vm in self.vms:
            vm.close()
