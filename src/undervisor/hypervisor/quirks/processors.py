"""Quirks of how processors start; they hold for either vendor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from undervisor.hypervisor.quirks.quirk import Quirk, Step

if TYPE_CHECKING:
    from undervisor.hypervisor.machine import Machine

_ELSEWHERE: Final = 0x40


def _start_elsewhere(machine: Machine) -> None:
    def quirky(original: Step) -> Step:
        def start(vector: int) -> None:
            original(vector ^ _ELSEWHERE)

        return start

    for vcpu in machine.vcpus:
        vcpu.start_by_sipi = quirky(vcpu.start_by_sipi)  # type: ignore[method-assign]


QUIRKS: Final = (
    Quirk(
        "ap-starts-at-garbage",
        "a processor starts at another address than the startup IPI's vector names",
        "KVM with more than two processors: application processors launched at an invalid address",
        _start_elsewhere,
    ),
)
