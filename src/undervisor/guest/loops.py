"""Measured loops: a small L1 with one L2 (or none), which does one thing again and again.

It prints a newline before the first round and after each, so that whoever holds the serial line
can tell how long a round took, on any machine.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from importlib.resources import files
from typing import Final

from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.svm.vmcb import SIZE, NestedControl, Vmcb, VmcbField
from undervisor.arch.vmx.capabilities import VmxCapabilities
from undervisor.arch.vmx.controls import (
    AccessRights,
    EntryControls,
    ExitControls,
    PrimaryControls,
    SecondaryControls,
)
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.segments import Segment
from undervisor.guest import placement
from undervisor.guest.asm import assemble
from undervisor.guest.elf_writer import write_elf

BASE: Final = 0x100000
STACK, TSS = 0x200000, 0x201000
PAGES, NESTED = 0x210000, 0x220000
VMXON_REGION, VMCS_REGION, FIELDS = 0x230000, 0x231000, 0x232000
DATA: Final = 0x800000
DATA_SIZE: Final = 4 << 20
CR0, CR4, EFER = 0x8000_0033, 0x620, 0x500

# The bodies of a round; r15 is COUNT.
ROUND_TRIPS_VMX: Final = "mov %r15, %rbp; 1: cpuid; dec %rbp; jnz 1b"
ROUND_TRIPS_SVM: Final = "mov %r15, %rbp; 1: vmmcall; dec %rbp; jnz 1b"
COMPUTE: Final = """
    mov %r15, %rbp
    mov $0x12345678, %eax
1:  imul $1103515245, %eax, %eax
    add $12345, %eax
    mov %eax, %ebx
    shr $7, %ebx
    xor %ebx, %eax
    rol $5, %eax
    lea 3(%rax,%rbx,2), %ecx
    sub %ecx, %eax
    dec %rbp
    jnz 1b
"""
MEMORY: Final = """
    mov %r15, %rbp
    xor %ebx, %ebx
1:  mov DATA(%rbx), %rax
    add %rbp, %rax
    mov %rax, DATA(%rbx)
    add $4168, %rbx
    and $(DATA_SIZE - 8), %rbx
    dec %rbp
    jnz 1b
"""
"""Every access is to another page: 1024 of them in turn."""

_FINISH: Final = {"vmx": "vmcall", "svm": "hlt", "": ""}
_VENDORS: Final = {"": 0, "vmx": 1, "svm": 2}


@dataclass(frozen=True, slots=True)
class Loop:
    """What runs: a body, how many times in a round, how many rounds; under which extension."""

    body: str
    count: int
    rounds: int
    vendor: str = ""

    def elf(self, capabilities: VmxCapabilities | None = None) -> bytes:
        """A Multiboot image; VMX needs to know the processor's capabilities."""
        tables = b""
        if self.vendor == "vmx":
            assert capabilities is not None
            fields = vmcs_fields(capabilities)
            rows = [struct.pack("<2Q", field, value) for field, value in fields.items()]
            tables = b"".join(rows)
        source = files(__package__).joinpath("loops.S").read_text()
        source = source.replace("BODY", self.body).replace("FINISH", _FINISH[self.vendor])
        code = assemble(source, BASE, self._symbols(len(tables) // 16))
        segments = [placement.Segment(BASE, code.bytes, len(code))]
        if tables:
            segments.append(placement.Segment(FIELDS, tables, len(tables)))
        if self.vendor == "svm":
            segments.append(placement.Segment(VMCS_REGION, vmcb(), SIZE))
        return write_elf(segments, code.labels["start"])

    def _symbols(self, fields: int) -> dict[str, int]:
        leaf = 0xB7 if self.vendor == "vmx" else 0x87
        return {
            "VENDOR": _VENDORS[self.vendor],
            "EFER_BITS": 0x1100 if self.vendor == "svm" else 0x100,
            "ROUNDS": self.rounds,
            "COUNT": self.count,
            "STACK": STACK,
            "TSS": TSS,
            "PAGES": PAGES,
            "NESTED": NESTED,
            "NESTED_LEAF": leaf,
            "VMXON_REGION": VMXON_REGION,
            "VMCS_REGION": VMCS_REGION,
            "FIELDS": FIELDS,
            "FIELD_COUNT": fields,
            "DATA": DATA,
            "DATA_SIZE": DATA_SIZE,
        }


_CODE, _DATA_SEGMENT = Segment(8, 0, 0xFFFF_FFFF, 0xA9B), Segment(16, 0, 0xFFFF_FFFF, 0xC93)


def vmcb() -> bytes:
    """A VMCB for L2 beside L1, with nested paging; VMMCALL and HLT exit."""
    area = bytearray(SIZE)
    found = Vmcb(area)
    for intercept in (Intercept.VMRUN, Intercept.VMMCALL, Intercept.HLT):
        area[intercept // 8] |= 1 << intercept % 8
    values = {
        VmcbField.GUEST_ASID: 1,
        VmcbField.NESTED_CONTROL: int(NestedControl.np_enable),
        VmcbField.N_CR3: NESTED,
        VmcbField.EFER: EFER | 0x1000,
        VmcbField.CR0: CR0,
        VmcbField.CR3: PAGES,
        VmcbField.CR4: CR4,
        VmcbField.DR6: 0xFFFF_0FF0,
        VmcbField.DR7: 0x400,
        VmcbField.RFLAGS: 2,
        VmcbField.RSP: STACK - 0x1000,
        VmcbField.G_PAT: 0x0007_0406_0007_0406,
    }
    for field, value in values.items():
        found[field] = value
    found.set_segment(VmcbField.CS_SELECTOR, _CODE)
    for first in (VmcbField.DS_SELECTOR, VmcbField.ES_SELECTOR, VmcbField.SS_SELECTOR):
        found.set_segment(first, _DATA_SEGMENT)
    return bytes(area)


def vmcs_fields(capabilities: VmxCapabilities) -> dict[F, int]:
    """A VMX state for L2 beside L1, with EPT; RIPs and the host RSP are set by the program."""
    wanted = {
        F.PIN_BASED_CONTROLS: 0,
        F.PRIMARY_CONTROLS: PrimaryControls.of(activate_secondary_controls=1),
        F.SECONDARY_CONTROLS: SecondaryControls.of(enable_ept=1),
        F.EXIT_CONTROLS: ExitControls.of(host_address_space_size=1),
        F.ENTRY_CONTROLS: EntryControls.of(ia32e_mode_guest=1),
    }
    fields = {f: capabilities.controls[f].adjust(int(value)) for f, value in wanted.items()}
    cr4 = CR4 | 0x2000
    return fields | _guest_fields(cr4) | {
        F.EPT_POINTER: NESTED | 0x1E,
        F.EXCEPTION_BITMAP: 0,
        F.CR3_TARGET_COUNT: 0,
        F.HOST_CR0: CR0,
        F.HOST_CR3: PAGES,
        F.HOST_CR4: cr4,
        F.HOST_CS_SELECTOR: 8,
        F.HOST_DS_SELECTOR: 16,
        F.HOST_ES_SELECTOR: 16,
        F.HOST_SS_SELECTOR: 16,
        F.HOST_TR_SELECTOR: 24,
        F.HOST_TR_BASE: TSS,
    }  # fmt: skip


def _guest_fields(cr4: int) -> dict[F, int]:
    fields: dict[F, int] = {}
    unusable = int(AccessRights.of(unusable=1))
    for name in ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR"):
        segment = _CODE if name == "CS" else _DATA_SEGMENT
        usable = name in ("ES", "CS", "SS", "DS")
        rights = int(segment.access_rights) if usable else unusable
        fields[F[f"GUEST_{name}_SELECTOR"]] = segment.selector if usable else 0
        fields[F[f"GUEST_{name}_BASE"]] = 0
        fields[F[f"GUEST_{name}_LIMIT"]] = segment.limit
        fields[F[f"GUEST_{name}_ACCESS_RIGHTS"]] = rights
    return fields | {
        F.GUEST_TR_ACCESS_RIGHTS: 0x8B,
        F.GUEST_TR_LIMIT: 0x67,
        F.GUEST_CR0: CR0,
        F.GUEST_CR3: PAGES,
        F.GUEST_CR4: cr4,
        F.GUEST_DR7: 0x400,
        F.GUEST_RSP: STACK - 0x1000,
        F.GUEST_RFLAGS: 2,
        F.VMCS_LINK_POINTER: (1 << 64) - 1,
    }
