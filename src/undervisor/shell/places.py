"""Where the shell puts things in the machine's memory, by processor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from undervisor.guest.probe.program import FREE, USER_SIZE

FIRST: Final = FREE + USER_SIZE
SIZE: Final = 0x20000
CODE_SIZE: Final = 0x8000
YOURS: Final = FIRST + 8 * SIZE
"""Memory from here to the end is the user's."""


@dataclass(frozen=True, slots=True)
class Places:
    """A processor's share of memory."""

    number: int

    @property
    def region(self) -> int:
        """The VMXON region, or SVM's host save area."""
        return FIRST + SIZE * self.number

    @property
    def control(self) -> int:
        """The VMCS region, or the VMCB."""
        return self.region + 0x1000

    @property
    def scratch(self) -> int:
        """For batches of VMREADs and VMWRITEs."""
        return self.region + 0x2000

    @property
    def code(self) -> int:
        """L2's code."""
        return self.region + 0x8000

    @property
    def stack(self) -> int:
        """The top of L2's stack."""
        return self.region + SIZE - 16
