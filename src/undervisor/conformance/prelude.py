"""How a test gets its lab: asked for step by step, or there already in the copy of a machine.

The first lab on a target finds out what the processor has.  The second need not, and what it sends
is kept: where machines are copies, it is the prelude of all that come after, in which L1 has
entered VMX operation or enabled SVM before they start.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from undervisor.conformance.lab import Lab
from undervisor.conformance.svm.lab import SvmLab
from undervisor.conformance.vmx.lab import VmxLab
from undervisor.guest.probe.client import Probe
from undervisor.targets import Running


@dataclass(slots=True)
class Earlier:
    """What the labs on one target leave to the later ones, by vendor."""

    labs: dict[str, Lab] = field(default_factory=dict)
    preludes: dict[str, bytes] = field(default_factory=dict)


class TestsProbe(Probe):
    """A probe that answers before `deadline`, and has been sent `prelude` already."""

    __test__ = False  # pytest's, which takes the name for a test's

    def __init__(self, running: Running, deadline: float, prelude: bytes = b"") -> None:
        super().__init__(running)
        self._deadline = deadline
        self._prelude = prelude
        self.sent = bytearray()

    @property
    def answer_time(self) -> float:
        """What is left of the time."""
        return max(0.01, self._deadline - time.monotonic())

    @answer_time.setter
    def answer_time(self, value: float) -> None:
        """The limit is the test's."""

    def _send(self, data: bytes) -> None:
        self.sent += data
        if not self._prelude:
            super()._send(data)
        elif self._prelude.startswith(data):  # its answer is on the line
            self._prelude = self._prelude[len(data) :]
        else:
            raise AssertionError("a lab asks for other things than the one that it is a copy of")


def lab_of(vendor: str, probe: TestsProbe, earlier: Earlier, *, copies: bool) -> VmxLab | SvmLab:
    """A lab that is on; `copies`: what it has sent is the prelude of later ones."""
    like = earlier.labs.get(vendor)
    lab: VmxLab | SvmLab
    if vendor == "vmx":
        lab = VmxLab(probe)
        lab.on(like if isinstance(like, VmxLab) else None)
    else:
        lab = SvmLab(probe)
        lab.on(like if isinstance(like, SvmLab) else None)
    if copies:
        lab.flush()
        if like is not None:
            earlier.preludes.setdefault(vendor, bytes(probe.sent))
    earlier.labs.setdefault(vendor, lab)
    return lab
