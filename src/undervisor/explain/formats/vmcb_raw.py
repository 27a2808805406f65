"""A raw VMCB: exactly 4096 bytes."""

from __future__ import annotations

from undervisor.arch.svm.vmcb import SIZE, Vmcb, VmcbField
from undervisor.explain.dump import SVM, Dump

# Bytes that the layout leaves reserved in every VMCB, as ranges; random data fills them.
_RESERVED = ((0x018, 0x03C), (0x0D1 + 15, 0x0E0), (0x158 + 0x18, 0x1C8), (0x200, 0x3E0))
_TOLERATED = 16


def looks_like(raw: bytes) -> bool:
    """Whether 4096 bytes can be a VMCB: what is reserved is almost all zero, the rest is not."""
    if len(raw) != SIZE or not any(raw[: VmcbField.ES_SELECTOR]):
        return False
    filled = sum(byte != 0 for start, end in _RESERVED for byte in raw[start:end])
    return filled <= _TOLERATED


def read(raw: bytes) -> list[Dump]:
    """The VMCB."""
    vmcb = Vmcb(raw)
    return [Dump("raw VMCB", SVM, {int(field): vmcb[field] for field in vmcb})]
