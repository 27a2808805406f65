"""Quirks: the L0 made wrong in named, documented ways, so that the conformance suite is tested.

`catalogue` has them by name; `named` finds them; `apply` makes a machine wrong.  Their modules are
loaded when a name is asked for: a machine without quirks does not pay for them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from undervisor.errors import BadInput
from undervisor.hypervisor.quirks.quirk import Quirk

if TYPE_CHECKING:
    from undervisor.hypervisor.machine import Machine
    from undervisor.hypervisor.models import CpuModel

__all__ = ["Quirk", "apply", "changed_model", "named"]


def named(names: Iterable[str]) -> list[Quirk]:
    """The quirks with these names; BadInput for a name that is none."""
    return [_named(name) for name in names]


def _named(name: str) -> Quirk:
    from undervisor.hypervisor.quirks import mutants
    from undervisor.hypervisor.quirks.catalogue import CATALOGUE

    if name.startswith(mutants.PREFIX):
        return mutants.mutant(name)
    if name not in CATALOGUE:
        raise BadInput(f"there is no quirk {name!r}", hint="`undervisor quirks` lists all of them")
    return CATALOGUE[name]


def changed_model(model: CpuModel, quirks: Iterable[Quirk]) -> CpuModel:
    """The CPU model as the quirks make it."""
    for quirk in quirks:
        model = quirk.model(model)
    return model


def apply(machine: Machine, quirks: Iterable[Quirk]) -> None:
    """Make a machine that is ready to boot wrong in these ways."""
    for quirk in quirks:
        quirk.apply(machine)
