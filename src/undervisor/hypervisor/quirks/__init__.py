"""Quirks: the L0 made wrong in named, documented ways, so that the conformance suite is tested.

`CATALOGUE` has them by name; `named` finds them; `apply` makes a machine wrong.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from undervisor.errors import BadInput
from undervisor.hypervisor.quirks import mutants
from undervisor.hypervisor.quirks.processors import QUIRKS as PROCESSORS
from undervisor.hypervisor.quirks.quirk import Quirk
from undervisor.hypervisor.quirks.svm import QUIRKS as SVM
from undervisor.hypervisor.quirks.vmx import QUIRKS as VMX

if TYPE_CHECKING:
    from undervisor.hypervisor.machine import Machine
    from undervisor.hypervisor.models import CpuModel

__all__ = ["CATALOGUE", "Quirk", "apply", "changed_model", "named"]

CATALOGUE: Final[dict[str, Quirk]] = {quirk.name: quirk for quirk in (*PROCESSORS, *VMX, *SVM)}


def named(names: Iterable[str]) -> list[Quirk]:
    """The quirks with these names; BadInput for a name that is none."""
    found = []
    for name in names:
        if name.startswith(mutants.PREFIX):
            found.append(mutants.mutant(name))
            continue
        if name not in CATALOGUE:
            raise BadInput(
                f"there is no quirk {name!r}", hint="`undervisor quirks` lists all of them"
            )
        found.append(CATALOGUE[name])
    return found


def changed_model(model: CpuModel, quirks: Iterable[Quirk]) -> CpuModel:
    """The CPU model as the quirks make it."""
    for quirk in quirks:
        model = quirk.model(model)
    return model


def apply(machine: Machine, quirks: Iterable[Quirk]) -> None:
    """Make a machine that is ready to boot wrong in these ways."""
    for quirk in quirks:
        quirk.apply(machine)
