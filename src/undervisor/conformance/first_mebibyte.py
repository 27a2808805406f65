"""What the tests of nested paging of both vendors demand of memory below 1 MiB."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Protocol

from undervisor.conformance.expect import equal
from undervisor.conformance.lab import Lab

LOW: Final = 0x55000
"""A page of memory below 1 MiB that nothing uses."""
FIRMWARE: Final = 0xF8000
CODE: Final = (
    "mov 0x180000, %r9; mov (%rsi), %rax; mov %rbx, (%rsi); mov (%rdi), %rdx; mov %rcx, (%rdi); "
    "mov (%rdi), %rbp"
)


class Run(Protocol):
    """An L2 that ran, of either vendor."""

    @property
    def registers(self) -> Mapping[str, int]:
        """L2's general registers at the exit."""

    def ends(self) -> None:
        """L2 ran to the end of its code."""


def is_l1s(lab: Lab, run: Callable[[str, Mapping[str, int]], Run]) -> None:
    """RAM and firmware below 1 MiB are to L2 what they are to L1.

    `run` runs code in L2 with registers, under the nested tables that are tested.
    """
    lab.write_u64(LOW, 0x1111)
    old = lab.read_u64(FIRMWARE)
    lab.write_u64(FIRMWARE, old ^ 1)
    kept = lab.read_u64(FIRMWARE)
    lab.write_u64(FIRMWARE, old)
    l2 = run(CODE, {"rsi": LOW, "rdi": FIRMWARE, "rbx": 0x2222, "rcx": old ^ 1})
    l2.ends()
    got = l2.registers["rax"], lab.read_u64(LOW)
    equal("what L2 reads there and L1 afterwards", got, (0x1111, 0x2222))
    firmware = l2.registers["rdx"], l2.registers["rbp"]
    equal("firmware before and after L2's write", firmware, (old, kept))
    lab.write_u64(FIRMWARE, old)
