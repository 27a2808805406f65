"""The VMCB in the machine's memory as an object: `vmcb.rip` reads it, `vmcb.rip = x` writes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.svm.vmcb import SIZE, Vmcb, VmcbField
from undervisor.explain.names import svm_field
from undervisor.explain.numbers import SVM_LAYOUTS, named_bits
from undervisor.guest.probe.client import Batch
from undervisor.shell.bench import Bench
from undervisor.shell.machine import Refused
from undervisor.shell.values import Hex, Shown

NOT_ON: Final = "svm.on() comes first"
_WORD: Final = 8
_INTERCEPT_BYTES: Final = 0x18
"""The intercept words are the first bytes of a VMCB."""


class VmcbView:
    """Every field is an attribute, by its name in lower case; `vmcb` shows what has changed."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._before: bytes | None = None

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __setattr__(self, name: str, value: object) -> None:
        """Write a field; ValueError where the value does not fit."""
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        elif not isinstance(value, int):
            raise TypeError(f"a field is a number, not {value!r}")
        else:
            self.set(**{name: value})

    def __getitem__(self, field: int | str) -> Hex:
        """A field by its offset, or by any usual name: vmcb[0x578], vmcb["exit_info_1"]."""
        return self._get(_field(field))

    def __setitem__(self, field: int | str, value: int) -> None:
        """Write a field by its offset, or by any usual name."""
        self._set({_field(field): value})

    def set(self, **fields: int) -> None:
        """Write several fields in one round trip."""
        self._set({_member(name): value for name, value in fields.items()})

    def intercept(self, *intercepts: Intercept | int, on: bool = True) -> None:
        """Intercept these, or no longer: vmcb.intercept(Intercept.CPUID, Intercept.RDTSC)."""
        words = bytearray(self.raw()[:_INTERCEPT_BYTES])
        for bit in intercepts:
            if not 0 <= bit < _WORD * _INTERCEPT_BYTES:
                raise ValueError(f"{bit} is no intercept; Intercept.<TAB> shows them")
            mask = 1 << bit % _WORD
            words[bit // _WORD] = words[bit // _WORD] & ~mask | (mask if on else 0)
        self._write({0: bytes(words)})

    def intercepts(self) -> Shown:
        """What is intercepted now."""
        words = self.raw()
        names = [i.name for i in Intercept if words[i // _WORD] >> i % _WORD & 1]
        return Shown(", ".join(names) or "nothing")

    def all(self) -> Shown:
        """Every field that is not zero, decoded."""
        return Shown(field_words({f: v for f, v in Vmcb(self.raw()).items() if v}))

    def changed(self) -> Shown:
        """What is not as it was when SVM was switched on: written by you or by an exit."""
        now, before = Vmcb(self.raw()), Vmcb(self._before or bytes(SIZE))
        different = {f: now[f] for f in VmcbField if now[f] != before[f]}
        return Shown(field_words(different, before) or "nothing has changed")

    def raw(self) -> bytes:
        """All 4096 bytes; Refused where the shell has no VMCB yet."""
        self._must_be()
        batch = Batch()
        answer = batch.read(self._bench.places.control, SIZE)
        self._bench.batch(batch)
        return answer.value

    def begin(self, content: bytes) -> None:
        """Put a new VMCB there; what is changed is compared with it."""
        self._before = content
        self._write({0: content})

    def forget(self) -> None:
        """There is none any more."""
        self._before = None

    def __repr__(self) -> str:
        return repr(self.changed()) if self._before is not None else f"no VMCB: {NOT_ON}"

    def _must_be(self) -> None:
        if self._before is None:
            raise Refused("there is no VMCB", hint=NOT_ON)

    def _get(self, field: VmcbField) -> Hex:
        self._must_be()
        batch = Batch()
        answer = batch.read(self._bench.places.control + field, field.width)
        self._bench.batch(batch)
        return Hex(int.from_bytes(answer.value, "little"))

    def _set(self, fields: Mapping[VmcbField, int]) -> None:
        self._must_be()
        pieces = {}
        for field, value in fields.items():
            if not 0 <= value < 1 << 8 * field.width:
                raise ValueError(f"{value:#x} does not fit {field.name}, {8 * field.width} bits")
            pieces[int(field)] = value.to_bytes(field.width, "little")
        self._write(pieces)

    def _write(self, pieces: Mapping[int, bytes]) -> None:
        batch = Batch()
        answers = [batch.write(self._bench.places.control + at, d) for at, d in pieces.items()]
        self._bench.batch(batch)
        for answer in answers:
            _ = answer.value


def field_words(
    values: Mapping[VmcbField, int], before: Mapping[VmcbField, int] | None = None
) -> str:
    """Fields in lines, control words decoded; `before` is what they were."""
    lines = []
    for field, value in values.items():
        was = f"  (was {before[field]:#x})" if before is not None else ""
        lines.append(f"{field.name.lower():28} {value:#x}{was}")
        layout = SVM_LAYOUTS.get(field)
        if layout is not None and value:
            rows = named_bits(layout, value)
            lines += [f"    {bits:>5}  {number:<6} {name}" for bits, number, name in rows]
    return "\n".join(lines)


def _member(name: str) -> VmcbField:
    try:
        return VmcbField[name.upper()]
    except KeyError:
        raise AttributeError(f"no VMCB field {name}; vmcb.<TAB> shows them") from None


def _field(field: int | str) -> VmcbField:
    number = svm_field(field) if isinstance(field, str) else field
    for member in VmcbField:
        if int(member) == number:
            return member
    raise KeyError(f"no VMCB field {field}")


def _property(field: VmcbField) -> property:
    return property(lambda vmcb: vmcb._get(field), doc=f"{field.name}, offset {int(field):#05x}")


for _each in VmcbField:
    # On the class: completion must find them without reading each.
    setattr(VmcbView, _each.name.lower(), _property(_each))
