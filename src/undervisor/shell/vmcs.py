"""The current VMCS as an object: `vmcs.guest_rip` is VMREAD, `vmcs.guest_rip = x` VMWRITE."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from undervisor.arch.vmx.fields import VmcsField
from undervisor.explain.names import vmx_field
from undervisor.explain.numbers import VMX_LAYOUTS, named_bits, vm_instruction_error
from undervisor.guest.probe.answers import Fault, VmxResult
from undervisor.guest.probe.client import Batch
from undervisor.shell.bench import Bench
from undervisor.shell.machine import Refused
from undervisor.shell.values import Failed, Hex, Raised, Shown, fault_words

NOT_ON: Final = "vmx.on() comes first"
BITS_SHOWN: Final = 8


class Vmcs:
    """Every field is an attribute, by its name in lower case; `vmcs` shows what has changed.

    Values come from the processor at each look, by VMREAD.
    """

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._before: dict[int, int] = {}

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __setattr__(self, name: str, value: object) -> None:
        """VMWRITE; Refused where it faults or fails."""
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        elif not isinstance(value, int):
            raise TypeError(f"a field is a number, not {value!r}")
        else:
            self.set(**{name: value})

    def __getitem__(self, field: int | str) -> object:
        """VMREAD by encoding, or by any usual name: vmcs[0x681e], vmcs["guest-RIP"]."""
        return self._read(_encoding(field))

    def __setitem__(self, field: int | str, value: int) -> None:
        """VMWRITE by encoding, or by any usual name."""
        self._write({_encoding(field): value})

    def set(self, **fields: int) -> None:
        """Several VMWRITEs in one round trip; Refused at the first that faults or fails."""
        self._write({_member(name): value for name, value in fields.items()})

    def all(self) -> Shown:
        """Every field that the processor has, decoded."""
        return Shown(field_words(self.values()))

    def changed(self) -> Shown:
        """What is not as it was when VMX was switched on: written by you or by an exit."""
        values = self.values()
        different = {f: v for f, v in values.items() if self._before.get(f) != v}
        return Shown(field_words(different, self._before) or "nothing has changed")

    def values(self) -> dict[int, int]:
        """Every field that the processor has; Refused where there is no current VMCS."""
        batch = Batch()
        read = batch.vmread(VmcsField.VM_INSTRUCTION_ERROR)
        fields = batch.vmreads(VmcsField, self._bench.places.scratch)
        self._bench.batch(batch)
        if isinstance(read.outcome, Fault):
            raise Refused(f"VMREAD: {fault_words(read.outcome)}", hint=NOT_ON)
        if not read.value.succeeded:
            raise Refused(f"VMREAD: {result_words(read.value)}", hint=NOT_ON)
        return {field: value for field, value in fields.value.items() if value is not None}

    def remember(self) -> None:
        """What is changed from now on is compared with what is there now."""
        self._before = self.values()

    def forget(self) -> None:
        """Nothing is known any more."""
        self._before = {}

    def __repr__(self) -> str:
        try:
            return repr(self.changed())
        except Refused as error:
            return str(error)

    def _read(self, encoding: int) -> object:
        batch = Batch()
        answer = batch.vmread(encoding)
        self._bench.batch(batch)
        outcome = answer.outcome
        if isinstance(outcome, Fault):
            return Raised(outcome, NOT_ON)
        assert isinstance(outcome, VmxResult)
        if not outcome.succeeded:
            return Failed(f"VMREAD of {_name(encoding)}: {result_words(outcome)}")
        return Hex(outcome.value)

    def _write(self, fields: Mapping[int, int]) -> None:
        batch = Batch()
        written = [(field, batch.vmwrite(field, value)) for field, value in fields.items()]
        self._bench.batch(batch)
        for field, answer in written:
            outcome = answer.outcome
            if isinstance(outcome, Fault):
                raise Refused(f"VMWRITE of {_name(field)}: {fault_words(outcome)}", hint=NOT_ON)
            assert isinstance(outcome, VmxResult)
            if not outcome.succeeded:
                raise Refused(f"VMWRITE of {_name(field)}: {result_words(outcome)}")


def result_words(result: VmxResult) -> str:
    """How a VMX instruction ended."""
    if result.error:
        return f"{result.outcome.value}, {vm_instruction_error(result.error).title}"
    return result.outcome.value if result.succeeded else f"{result.outcome.value}: no current VMCS"


def field_words(values: Mapping[int, int], before: Mapping[int, int] | None = None) -> str:
    """Fields in lines, control words decoded; `before` is what they were."""
    lines = []
    for field, value in values.items():
        line = f"{_name(field).lower():36} {value:#x}"
        was = None if before is None else before.get(field)
        line += f"  (was {was:#x})" if was is not None else ""
        lines.append(line)
        lines += _bit_lines(field, value)
    return "\n".join(lines)


def _bit_lines(field: int, value: int) -> Iterable[str]:
    layout = VMX_LAYOUTS.get(field)
    if layout is None or not value:
        return
    for bits, number, name in named_bits(layout, value):
        yield f"    {bits:>5}  {number:<6} {name}"


def _name(encoding: int) -> str:
    try:
        return VmcsField(encoding).name
    except ValueError:
        return f"field {encoding:#x}"


def _member(name: str) -> int:
    try:
        return VmcsField[name.upper()]
    except KeyError:
        raise AttributeError(f"no VMCS field {name}; vmcs.<TAB> shows them") from None


def _encoding(field: int | str) -> int:
    if isinstance(field, int):
        return field
    found = vmx_field(field)
    if found is None:
        raise KeyError(f"no VMCS field {field}")
    return found


def _property(field: VmcsField) -> property:
    return property(lambda vmcs: vmcs._read(field), doc=f"{field.name}, encoding {field:#06x}")


for _field in VmcsField:
    # On the class: completion must find them without a VMREAD of each.
    setattr(Vmcs, _field.name.lower(), _property(_field))
