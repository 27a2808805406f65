"""What a reader takes out of a text or a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from undervisor.arch.svm.vmcb import VmcbField
from undervisor.arch.vmx.checks.inputs import EntryInput
from undervisor.arch.vmx.fields import VmcsField

VMX, SVM = "vmx", "svm"


@dataclass(frozen=True, slots=True)
class Observation:
    """Something that the input itself says, decoded: not a rule, but a reason or a hint.

    `weight` orders them: the higher, the likelier it is the cause.
    """

    id: str
    title: str
    meaning: str
    remedy: str = ""
    evidence: tuple[str, ...] = ()
    weight: int = 0
    bad: bool = True


@dataclass(frozen=True, slots=True)
class Failure:
    """How the entry ended: VMfailValid with `error`, a VM exit with `reason`, an SVM exit code.

    `reason` is the whole exit-reason field; `code` the SVM exit code as a signed number.
    """

    error: int | None = None
    reason: int | None = None
    qualification: int | None = None
    code: int | None = None


@dataclass(slots=True)
class Dump:
    """A state as far as the input holds it.

    `state` maps `VmcsField`s (and `EntryInput`s) or `VmcbField`s to values; `partial` has value
    and mask of known bits for fields that are only partly known.  `named` are ids of rules that
    the input itself names as broken.  `assumed` says in words what was taken for granted.
    """

    format: str
    vendor: str = ""
    state: dict[int, int] = field(default_factory=dict)
    partial: dict[int, tuple[int, int]] = field(default_factory=dict)
    failure: Failure | None = None
    observations: list[Observation] = field(default_factory=list)
    named: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    msrs: Mapping[int, int] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether the input said nothing at all."""
        return not (self.state or self.partial or self.failure or self.observations or self.named)


def field_name(number: int, vendor: str) -> str:
    """The field's name in our words, or its number."""
    return (SVM_FIELDS if vendor == SVM else VMX_FIELDS).get(number, f"{number:#x}")


VMX_FIELDS: dict[int, str] = {
    **{int(f): f.name for f in VmcsField},
    **{int(i): i.name for i in EntryInput},
}
SVM_FIELDS: dict[int, str] = {int(f): f.name for f in VmcbField}


VMX_WIDTHS: dict[int, int] = {
    **{int(f): f.bits for f in VmcsField},
    EntryInput.LONG_MODE_ACTIVE: 1,
    EntryInput.IN_SMM: 1,
    EntryInput.TRACING: 1,
    EntryInput.LINKED_VMCS: 32,
    EntryInput.VIRTUAL_TPR: 8,
}
SVM_WIDTHS: dict[int, int] = {int(f): f.width * 8 for f in VmcbField}
