"""The features that CPUID of a running processor reports, by name."""

from __future__ import annotations

from dataclasses import dataclass

from undervisor.arch.x86.cpuid import FEATURES, AddressWidths, Leaf, Output
from undervisor.guest.probe.batch import BatchCore
from undervisor.guest.probe.l1 import Runner

_LOW = 0xFFFF_FFFF
_REGISTERS = {Output.EAX: "rax", Output.EBX: "rbx", Output.ECX: "rcx", Output.EDX: "rdx"}
_EXTENDED = 0x8000_0000
_ENCRYPTION = 0x8000_001F


@dataclass(frozen=True, slots=True)
class Features:
    """`names` of `arch.x86.cpuid.FEATURES`, the address widths, and other leaves as they are.

    `svm` are EBX, ECX and EDX of CPUID 8000_000AH, zeros without SVM.
    """

    names: frozenset[str]
    physical_width: int
    linear_width: int
    svm: tuple[int, int, int]
    sev_es: bool


def read_features(probe: Runner) -> Features:
    """Ask the probe's processor."""
    wanted = {(f.leaf, f.subleaf) for f in FEATURES}
    wanted |= {(0, 0), (_EXTENDED, 0), (Leaf.ADDRESS_WIDTHS, 0), (Leaf.SVM, 0), (_ENCRYPTION, 0)}
    batch = BatchCore()
    asked = {key: batch.cpuid(*key) for key in sorted(wanted)}
    probe.run(batch)
    limits = {key: asked[key, 0].value["rax"] & _LOW for key in (0, _EXTENDED)}

    def word(leaf: int, subleaf: int, register: Output) -> int:
        # What is beyond the last leaf may be anything.  Subleaf 0 says how many there are.
        if leaf > limits[leaf & _EXTENDED]:
            return 0
        if leaf == Leaf.STRUCTURED_FEATURES and 0 < subleaf > word(leaf, 0, Output.EAX):
            return 0
        return asked[leaf, subleaf].value[_REGISTERS[register]] & _LOW

    names = {f.name for f in FEATURES if word(f.leaf, f.subleaf, f.register) & f.mask}
    widths = AddressWidths(word(Leaf.ADDRESS_WIDTHS, 0, Output.EAX))
    svm = [word(Leaf.SVM, 0, register) for register in (Output.EBX, Output.ECX, Output.EDX)]
    return Features(
        frozenset(names),
        widths.physical or 36,
        widths.linear or 48,
        (svm[0], svm[1], svm[2]) if "svm" in names else (0, 0, 0),
        bool(word(_ENCRYPTION, 0, Output.EAX) >> 3 & 1),
    )
