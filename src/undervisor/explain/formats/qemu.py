"""What QEMU prints when a vCPU under KVM can't go on, with its dump of the registers.

The registers are the guest's own view, which is not what KVM had in the VMCS or VMCB: in CR0 and
CR4 KVM forces bits, and the VMX controls are not shown at all.  Only what must be the same in both
is taken for the check.
"""

from __future__ import annotations

import re

from undervisor.arch.svm.vmcb import VmcbField
from undervisor.arch.vmx.controls import EntryControls
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.vmx.fields import guest_segment
from undervisor.arch.x86.registers import Cr0, Cr4, Efer
from undervisor.arch.x86.segments import UNUSABLE
from undervisor.explain.dump import SVM, VMX, Dump
from undervisor.explain.formats.guest_registers import Segments, in_long_mode, look_at_registers
from undervisor.explain.formats.qemu_failures import SIGNS, tell_failure

MARKERS = (
    b"KVM: entry failed",
    b"KVM internal error. Suberror",
    b"KVM: unknown exit",
    b"kvm run failed",
)

_REGISTER = re.compile(
    r"(?<!\w)(R(?:AX|BX|CX|DX|SI|DI|BP|SP|IP|\d\d?)|E(?:AX|BX|CX|DX|SI|DI|BP|SP|IP|FER)|"
    r"CR[0234]|DR[0-7])\s*=\s*([0-9a-fA-F]{8,16})(?!\w)"
)
_FLAGS = re.compile(
    r"(?<!\w)(?:RFL|EFL)=([0-9a-fA-F]{8}) \[.{7}\] CPL=(\d) II=(\d) A20=(\d) SMM=(\d) HLT=(\d)"
)
_SEGMENT = re.compile(
    r"(?<!\w)(ES|CS|SS|DS|FS|GS|LDT|TR)\s*=\s*([0-9a-fA-F]{4}) ([0-9a-fA-F]{8,16}) "
    r"([0-9a-fA-F]{8}) ([0-9a-fA-F]{8})"
)
_TABLE = re.compile(r"(?<!\w)([GI]DT)=\s+([0-9a-fA-F]{8,16}) ([0-9a-fA-F]{8})")

_VIEW_CR0 = Cr0.ne | Cr0.nw | Cr0.cd | Cr0.ts | Cr0.mp | Cr0.em
"""Bits of CR0 that KVM sets or clears in the VMCS whatever the guest sees."""


def read(lines: list[str]) -> list[Dump]:
    """The last failure in the text, with the registers behind it."""
    start = _last_failure(lines)
    if start is None:
        return []
    text = "\n".join(lines[start : start + 200])
    dump = Dump("QEMU with KVM: register dump")
    registers, segments = _registers(text)
    tell_failure(text, dump)
    _state(dump, registers, segments)
    look_at_registers(text, dump, registers, segments)
    return [dump]


def _last_failure(lines: list[str]) -> int | None:
    found = [n for n, line in enumerate(lines) if any(shape.search(line) for shape in SIGNS)]
    return found[-1] if found else None


def _registers(text: str) -> tuple[dict[str, int], Segments]:
    registers: dict[str, int] = {}
    for name, digits in _REGISTER.findall(text):
        name = "R" + name[1:] if name[0] == "E" and name != "EFER" else name
        registers.setdefault(name, int(digits, 16))
    match = _FLAGS.search(text)
    if match:
        names = ("RFLAGS", "CPL", "II", "A20", "SMM", "HLT")
        bases = (16, 10, 10, 10, 10, 10)
        groups = zip(names, match.groups(), bases, strict=True)
        registers |= {name: int(digits, base) for name, digits, base in groups}
    segments: Segments = {}
    for name, selector, base, limit, flags in _SEGMENT.findall(text):
        numbers = (int(selector, 16), int(base, 16), int(limit, 16), int(flags, 16))
        segments.setdefault("LDTR" if name == "LDT" else name, numbers)
    for name, base, limit in _TABLE.findall(text):
        registers[f"{name}R_BASE"], registers[f"{name}R_LIMIT"] = int(base, 16), int(limit, 16)
    return registers, segments


# --- The state as far as it is certain ------------------------------------------------------------


def _state(dump: Dump, registers: dict[str, int], segments: Segments) -> None:
    if dump.vendor == VMX:
        _vmx_state(dump, registers, segments)
    elif dump.vendor == SVM:
        _svm_state(dump, registers, segments)


def _rights(flags: int) -> int:
    """VMCS access rights of QEMU's segment flags (the descriptor's upper word)."""
    rights = flags >> 8 & 0xF0FF
    return rights if rights & 0x80 else rights | UNUSABLE


def _vmx_state(dump: Dump, registers: dict[str, int], segments: Segments) -> None:
    state = dump.state
    for name, (selector, base, limit, flags) in segments.items():
        values = (selector, base, limit, _rights(flags))
        for part, value in zip(("SELECTOR", "BASE", "LIMIT", "ACCESS_RIGHTS"), values, strict=True):
            state[guest_segment(name, part)] = value
    plain = {
        "RIP": F.GUEST_RIP,
        "RSP": F.GUEST_RSP,
        "RFLAGS": F.GUEST_RFLAGS,
        "CR3": F.GUEST_CR3,
        "DR7": F.GUEST_DR7,
        "GDTR_BASE": F.GUEST_GDTR_BASE,
        "GDTR_LIMIT": F.GUEST_GDTR_LIMIT,
        "IDTR_BASE": F.GUEST_IDTR_BASE,
        "IDTR_LIMIT": F.GUEST_IDTR_LIMIT,
        "EFER": F.GUEST_EFER,
    }
    state.update({field: registers[name] for name, field in plain.items() if name in registers})
    cr0, cr4 = registers.get("CR0"), registers.get("CR4")
    if cr0 is not None and cr4 is not None:
        dump.partial[F.GUEST_CR0] = (cr0, ~_VIEW_CR0 & 0xFFFF_FFFF)
        dump.partial[F.GUEST_CR4] = (cr4, cr4 & ~Cr4.vmxe)
        if not cr0 & Cr0.pe:
            dump.assumed.append('the guest runs with EPT and "unrestricted guest"')
            dump.partial[F.PRIMARY_CONTROLS] = (1 << 31, 1 << 31)
            dump.partial[F.SECONDARY_CONTROLS] = (0x82, 0x82)
    long_mode = in_long_mode(registers, segments)
    if long_mode is not None:
        bit = EntryControls.ia32e_mode_guest
        dump.partial[F.ENTRY_CONTROLS] = (bit if long_mode else 0, bit)
        dump.assumed.append('KVM sets "IA-32e mode guest" as the guest\'s EFER.LMA is')


def _svm_state(dump: Dump, registers: dict[str, int], segments: Segments) -> None:
    state = dump.state
    for name, (selector, base, limit, flags) in segments.items():
        attributes = flags >> 8 & 0xFF | flags >> 12 & 0xF00
        values = (selector, base, limit, attributes)
        parts = ("SELECTOR", "BASE", "LIMIT", "ATTRIBUTES")
        for part, value in zip(parts, values, strict=True):
            state[VmcbField[f"{name}_{part}"]] = value
    for name in ("CR3", "DR6", "DR7", "RFLAGS", "RIP", "RSP"):
        if name in registers:
            state[VmcbField[name]] = registers[name]
    # KVM sets EFER.SVME and may set CR0.CD's and CR4's bits itself.
    if "EFER" in registers:
        dump.partial[VmcbField.EFER] = (registers["EFER"], ~Efer.svme & (1 << 64) - 1)
    if "CR0" in registers:
        dump.partial[VmcbField.CR0] = (registers["CR0"], ~_VIEW_CR0 & (1 << 64) - 1)
    if "CR4" in registers:
        dump.partial[VmcbField.CR4] = (registers["CR4"], registers["CR4"])
