"""What a quirk is: a named way in which the L0 is wrong, applied to one machine.

Quirks are no part of the L0's code: each replaces a step of one machine from outside, so that a
machine without quirks runs what it always runs.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from undervisor.hypervisor.machine import Machine
    from undervisor.hypervisor.models import CpuModel

Step = Callable[..., Any]


def no_change(model: CpuModel) -> CpuModel:
    """The model as it is."""
    return model


def no_step(machine: Machine) -> None:
    """Nothing to replace."""


@dataclass(frozen=True, slots=True)
class Quirk:
    """A way of being wrong.

    `about` says what the L0 does and must not; `source` where that was seen.  `model` changes what
    the processors are, `apply` replaces steps of a machine that is ready to boot.
    """

    name: str
    about: str
    source: str
    apply: Callable[[Machine], None] = no_step
    model: Callable[[CpuModel], CpuModel] = no_change


def replace(machine: Machine, where: ModuleType, name: str, quirky: Callable[[Step], Step]) -> None:
    """In `machine` only, the function `name` of a module becomes `quirky(the original)`.

    The machine is known by the arguments: itself, its memory, or something of a processor's.
    """
    original: Step = getattr(where, name)
    wrong, mine = quirky(original), weakref.WeakSet[Any]()
    for thing in _parts(machine):
        mine.add(thing)

    @functools.wraps(original)
    def chosen(*arguments: Any, **keywords: Any) -> Any:
        step = wrong if any(argument in mine for argument in arguments) else original
        return step(*arguments, **keywords)

    setattr(where, name, chosen)


def replace_methods(machine: Machine, name: str, quirky: Callable[[Step], Step]) -> None:
    """On every processor's nested extension, the method `name` becomes `quirky(the original)`."""
    for vcpu in machine.vcpus:
        setattr(vcpu.nested, name, quirky(getattr(vcpu.nested, name)))


def replace_l1_exit(machine: Machine, code: int, quirky: Callable[[Step], Step]) -> None:
    """On every processor, the handler of an exit of L1."""
    for vcpu in machine.vcpus:
        vcpu.l1_handlers[code] = quirky(vcpu.l1_handlers[code])


def _parts(machine: Machine) -> list[Any]:
    """What tells a function whose machine it works on."""
    nested = [vcpu.nested for vcpu in machine.vcpus]
    states = [extension.state for extension in nested if hasattr(extension, "state")]
    return [machine, machine.memory, *machine.vcpus, *nested, *states]
