"""The targets by name, as the command line and other callers ask for them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, cast

from undervisor.errors import BadInput
from undervisor.targets import Target


@dataclass(frozen=True, slots=True)
class Row:
    """A target: `make(cpu)` in `module` builds it; `cpus` are the models it runs by default.

    `quirks`: whether `make` takes them as well.  A module is imported when its target is asked
    for, so that nobody pays for the others.
    """

    about: str
    module: str
    make: str
    cpus: tuple[str, ...]
    quirks: bool = False


ROWS: Final[dict[str, Row]] = {
    "builtin": Row(
        "the L0 of this package",
        "undervisor.targets.builtin",
        "BuiltinTarget",
        ("intel", "amd"),
        quirks=True,
    ),
    "qemu": Row(
        "QEMU, its TCG: SVM in software", "undervisor.targets.qemu", "QemuTarget", ("amd",)
    ),
    "bochs": Row(
        "Bochs, an interpreter with VMX and SVM",
        "undervisor.targets.bochs",
        "BochsTarget",
        ("intel", "amd"),
    ),
    "kvm": Row(
        "KVM on this machine, with our own small VMM",
        "undervisor.targets.kvm.target",
        "KvmTarget",
        ("host",),
    ),
    "lab": Row(
        "the KVM of a Linux L1 that is started for it",
        "undervisor.lab.target",
        "LabTarget",
        ("host",),
    ),
    "linux": Row(
        "the KVM of a Linux on the built-in L0: kvm_intel without hardware",
        "undervisor.lab.linux",
        "LinuxTarget",
        ("intel",),
    ),
}


def named(name: str, cpu: str = "", quirks: Iterable[str] = ()) -> Target:
    """The target `name` with a CPU model, its first default one where none is given.

    BadInput for a name that is none, or for quirks where the target has none.
    """
    row = _row(name)
    wrong = list(quirks)
    if wrong and not row.quirks:
        raise BadInput(
            f"the target {name} has no quirks", hint="quirks are of the built-in L0: --on builtin"
        )
    make = cast(Callable[..., Target], getattr(importlib.import_module(row.module), row.make))
    arguments = (cpu or row.cpus[0],)
    return make(*arguments, quirks=wrong) if row.quirks else make(*arguments)


def default_cpus(name: str) -> tuple[str, ...]:
    """The CPU models that a target runs unless others are asked for; BadInput for no target."""
    return _row(name).cpus


def _row(name: str) -> Row:
    if name not in ROWS:
        raise BadInput(f"there is no target {name!r}", hint=f"targets are {', '.join(ROWS)}")
    return ROWS[name]
