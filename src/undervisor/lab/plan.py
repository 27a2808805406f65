"""What lab is wanted: depth, processors, memory, and files in place of the distribution's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from undervisor.errors import BadInput

DEEPEST: Final = 3
"""Below L3 each exit costs more than a boot can take under emulation."""
MOST_CPUS: Final = 8
_MIB_OF_A_LEAF: Final = 256
_MIB_FOR_PYTHON: Final = 384


@dataclass(frozen=True, slots=True)
class Plan:
    """A lab; paths that are None are found or downloaded.

    `disk` is a raw image that L1 has as /dev/vda, and each level inside it too: it is one disk.
    """

    depth: int = 2
    cpus: int = 1
    python: bool = False
    accelerator: str = ""
    kernel: Path | None = None
    modules: Path | None = None
    busybox: Path | None = None
    initramfs: Path | None = None
    disk: Path | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.depth <= DEEPEST:
            raise BadInput(f"a lab of depth {self.depth}", hint=f"2 to {DEEPEST} levels work")
        if not 1 <= self.cpus <= MOST_CPUS:
            raise BadInput(f"{self.cpus} processors", hint=f"1 to {MOST_CPUS} are possible")
        if self.accelerator not in ("", "kvm", "tcg"):
            raise BadInput(f"{self.accelerator!r} is no accelerator", hint="kvm or tcg")
        for name in ("kernel", "busybox", "initramfs"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise BadInput(f"{path}: no such file, for --{name}")
        if self.disk is not None and not self.disk.is_file():
            raise BadInput(f"{self.disk}: no such file, for the lab's disk")
        if self.modules is not None and not self.modules.is_dir():
            raise BadInput(f"{self.modules}: no such folder, for --modules")

    @property
    def levels(self) -> range:
        """The numbers of the levels, the outermost first."""
        return range(1, self.depth + 1)

    def memory(self, level: int) -> int:
        """MiB of a level: room for itself and for twice what is inside it."""
        inside = 2 * self.memory(level + 1) if level < self.depth else 0
        return _MIB_OF_A_LEAF + inside + (_MIB_FOR_PYTHON if self.python and level == 1 else 0)
