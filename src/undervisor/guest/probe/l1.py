"""The state that the probe itself runs in, as an L1 needs it for its L2's and host state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from undervisor.arch.x86.msr import Msr
from undervisor.arch.x86.segments import Segment
from undervisor.guest.probe.batch import BatchCore
from undervisor.guest.probe.program import CODE64, DATA

# APM 2, "Segment State in the VMCB" / SDM 3A "Segment Descriptors": present, accessed, DPL 0
CODE_SEGMENT = Segment(CODE64, 0, 0xFFFFFFFF, 0xA9B)
DATA_SEGMENT = Segment(DATA, 0, 0xFFFFFFFF, 0xC93)


class Runner(Protocol):
    """What runs batches: a `Probe`, or `Probe.on` for one of its other processors."""

    def run(self, batch: BatchCore, timeout: float | None = None) -> None:
        """Run `batch` and fill in its answers."""


@dataclass(frozen=True, slots=True)
class L1State:
    """Control registers and EFER of a processor that runs the probe."""

    cr0: int
    cr3: int
    cr4: int
    efer: int


def l1_state(probe: Runner) -> L1State:
    """The state of `probe`'s processor, now."""
    batch = BatchCore()
    parts = [batch.read_cr(number) for number in (0, 3, 4)]
    efer = batch.rdmsr(Msr.EFER)
    probe.run(batch)
    cr0, cr3, cr4 = (part.value for part in parts)
    return L1State(cr0, cr3, cr4, efer.value)
