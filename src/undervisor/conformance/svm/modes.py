"""The modes in which an L2 can begin: VMCB fields to change, for `SvmLab.run`.

APM 2, "Segment State in the VMCB": the hidden parts are what counts, the selectors are not looked
at, so that the code and the data of every mode may be in the lab's places.
"""

from __future__ import annotations

from typing import Final

from undervisor.arch.svm.vmcb import VmcbField as F
from undervisor.arch.x86.registers import Cr0, Efer
from undervisor.arch.x86.segments import Segment
from undervisor.conformance.places import CS3, CS16, CS32, DS, DS3, DS16
from undervisor.conformance.svm.lab import SvmLab

DATA_SEGMENTS: Final = (F.ES_SELECTOR, F.SS_SELECTOR, F.DS_SELECTOR, F.FS_SELECTOR, F.GS_SELECTOR)
CODE64_USER, DATA_USER = 0xAFB, 0xCF3
CODE32, DATA32 = 0xC9B, 0xC93
CODE16, DATA16 = 0x09B, 0x093
FLAT: Final = 0xFFFFFFFF


def segment(first: F, value: Segment) -> dict[F, int]:
    """The four fields of the segment register whose selector is field `first`."""
    name = first.name.removesuffix("_SELECTOR")
    return {
        first: value.selector,
        F[f"{name}_ATTRIBUTES"]: value.attributes,
        F[f"{name}_LIMIT"]: value.limit,
        F[f"{name}_BASE"]: value.base,
    }


def _data(value: Segment) -> dict[F, int]:
    changes: dict[F, int] = {}
    for first in DATA_SEGMENTS:
        changes |= segment(first, value)
    return changes


def user(lab: SvmLab) -> dict[F, int]:
    """64-bit mode at CPL 3, under page tables that give user code everything."""
    return {
        **segment(F.CS_SELECTOR, Segment(CS3, 0, FLAT, CODE64_USER)),
        **_data(Segment(DS3, 0, FLAT, DATA_USER)),
        F.CPL: 3,
        F.CR3: lab.pages(),
        F.RSP: lab.places.user_stack,
    }


def compatibility() -> dict[F, int]:
    """Compatibility mode at CPL 0: long mode with a 32-bit code segment."""
    code = segment(F.CS_SELECTOR, Segment(CS32, 0, FLAT, CODE32))
    return code | _data(Segment(DS, 0, FLAT, DATA32))


def protected(lab: SvmLab) -> dict[F, int]:
    """Protected mode of 32 bits without paging; the handlers of exceptions do not work in it."""
    legacy = {F.CR0: int(Cr0.pe | Cr0.et), F.CR3: 0, F.CR4: 0, F.EFER: int(Efer.svme)}
    return compatibility() | legacy


def pae(lab: SvmLab) -> dict[F, int]:
    """Protected mode of 32 bits with PAE paging: 4 GiB, identity, by 2-MiB pages."""
    root = lab.places.pml4
    for number in range(4):
        lab.write_u64(root + 8 * number, (lab.places.free + 0x1000 * number) | 1)
    lab.table(lab.places.free, 2048, 0x87, 1 << 21)
    cr0 = int(Cr0.pe | Cr0.et | Cr0.wp | Cr0.pg)
    return protected(lab) | {F.CR0: cr0, F.CR3: root, F.CR4: 0x20}


def legacy_paging(lab: SvmLab) -> dict[F, int]:
    """Protected mode of 32 bits with two-level paging: 4 GiB, identity, by 4-MiB pages."""
    root = lab.places.pml4
    code = lab.assemble("1: mov %eax, (%rdi); add %edx, %eax; add $4, %rdi; loop 1b")
    registers = {"rdi": root, "rcx": 1024, "rax": 0x87, "rdx": 1 << 22}
    _ = lab.l1.call(code, registers, []).value
    cr0 = int(Cr0.pe | Cr0.et | Cr0.wp | Cr0.pg)
    return protected(lab) | {F.CR0: cr0, F.CR3: root, F.CR4: 0x10}


def real(lab: SvmLab) -> dict[F, int]:
    """Real mode; CS has its base at `places.code`, DS and ES at `places.data`.

    The interrupt vector table is in `places.idt`: vector n begins at `stub16(n)` of CS.
    """
    places = lab.places
    vectors = b"".join(
        stub16(vector).to_bytes(2, "little") + (places.code >> 4 & 0xFFFF).to_bytes(2, "little")
        for vector in range(256)
    )
    lab.write(places.idt, vectors)
    return {
        **_data(Segment(places.data >> 4 & 0xFFFF, places.data, 0xFFFF, DATA16)),
        **segment(F.CS_SELECTOR, Segment(places.code >> 4 & 0xFFFF, places.code, 0xFFFF, CODE16)),
        **segment(F.SS_SELECTOR, Segment(DS16, places.stack - 0x1000, 0xFFFF, DATA16)),
        F.RSP: 0x1000,
        F.RIP: 0,
        F.CR0: int(Cr0.et),
        F.CR3: 0,
        F.CR4: 0,
        F.EFER: int(Efer.svme),
        F.IDTR_LIMIT: 0x3FF,
    }


def stub16(vector: int) -> int:
    """The offset in CS at which real mode's handler of `vector` would begin."""
    return 0x8000 + 16 * vector


def protected16(lab: SvmLab) -> dict[F, int]:
    """Protected mode of 16 bits without paging, code at `places.code`."""
    places = lab.places
    return {
        **protected(lab),
        **segment(F.CS_SELECTOR, Segment(CS16, places.code, 0xFFFF, CODE16)),
        **_data(Segment(DS16, places.data, 0xFFFF, DATA16)),
        F.RIP: 0,
    }
