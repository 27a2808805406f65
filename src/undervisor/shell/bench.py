"""What an extension of a processor works with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from undervisor.guest.probe.batch import BatchCore
from undervisor.shell.places import Places
from undervisor.shell.registers import Registers


@dataclass(frozen=True, slots=True)
class Bench:
    """`batch` runs a batch on the processor with this number; a `Runner` for set-ups."""

    batch: Callable[[BatchCore], None]
    places: Places
    registers: Registers
    number: int

    def run(self, batch: BatchCore, timeout: float | None = None) -> None:
        """Run `batch` and fill in its answers."""
        self.batch(batch)

    def read_u64(self, gpa: int) -> int:
        """Eight bytes of memory; LookupError where there are none."""
        batch = BatchCore()
        answer = batch.read(gpa, 8)
        self.batch(batch)
        if not isinstance(answer.outcome, bytes):
            raise LookupError(f"no memory at {gpa:#x}")
        return int.from_bytes(answer.outcome, "little")
