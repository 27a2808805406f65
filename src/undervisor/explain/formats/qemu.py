"""What QEMU prints when a vCPU under KVM can't go on, with its dump of the registers.

The registers are the guest's own view, which is not what KVM had in the VMCS or VMCB: in CR0 and
CR4 KVM forces bits, and the VMX controls are not shown at all.  Only what must be the same in both
is taken for the check.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.svm.vmcb import VmcbField
from undervisor.arch.vmx.controls import EntryControls
from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.vmx.fields import guest_segment
from undervisor.arch.x86.registers import Cr0, Cr4, Efer
from undervisor.arch.x86.segments import UNUSABLE
from undervisor.explain.dump import SVM, VMX, Dump, Failure, Observation
from undervisor.explain.knowledge import SUBERRORS, place_of

MARKERS = (
    b"KVM: entry failed",
    b"KVM internal error. Suberror",
    b"KVM: unknown exit",
    b"kvm run failed",
)

_ENTRY = re.compile(r"KVM: entry failed, hardware error (0x[0-9a-fA-F]{1,16})")
_SUBERROR = re.compile(r"KVM internal error\. Suberror: (\d{1,9})")
_DATA = re.compile(r"extra data\[(\d{1,3})\]:\s*(?:0x)?([0-9a-fA-F]{1,16})\b")
_UNKNOWN = re.compile(r"KVM: unknown exit, hardware reason\s+(?:0x)?([0-9a-fA-F]{1,16})")
_RUN_FAILED = re.compile(r"kvm run failed (.{1,60})")
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
_CODE = re.compile(r"Code=((?:<?[0-9a-fA-F?]{2}>?\s*){1,80})")

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
    _failures(text, dump)
    _state(dump, registers, segments)
    _places(text, dump, registers, segments)
    return [dump]


def _last_failure(lines: list[str]) -> int | None:
    shapes = (_ENTRY, _SUBERROR, _UNKNOWN, _RUN_FAILED)
    found = [n for n, line in enumerate(lines) if any(shape.search(line) for shape in shapes)]
    return found[-1] if found else None


Segments = dict[str, tuple[int, int, int, int]]


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


# --- What the first lines say ---------------------------------------------------------------------


def _failures(text: str, dump: Dump) -> None:
    for shape, tell in (
        (_ENTRY, _entry_failed),
        (_SUBERROR, _suberror),
        (_UNKNOWN, _unknown_exit),
        (_RUN_FAILED, _run_failed),
    ):
        match = shape.search(text)
        if match:
            tell(dump, match[1], text)
            return


def _entry_failed(dump: Dump, digits: str, text: str) -> None:
    number = int(digits, 16)
    if number in (0xFFFF_FFFF, (1 << 64) - 1):
        dump.vendor, dump.failure = SVM, Failure(code=ExitCode.INVALID)
    elif number >> 31 & 1 and number & 0xFFFF in (33, 34, 41):
        dump.vendor, dump.failure = VMX, Failure(reason=number)
    elif 0 < number <= 28:
        dump.vendor, dump.failure = VMX, Failure(error=number)
    elif number == 0:
        dump.vendor = VMX
        dump.observations.append(
            Observation(
                "qemu.vmfail-invalid",
                "KVM: entry failed, hardware error 0x0",
                "VMLAUNCH or VMRESUME failed and left no VM-instruction error: VMfailInvalid, "
                "there was no current VMCS. On hardware that does not happen to KVM; under "
                "another hypervisor it means that its nested VMX lost the VMCS or broke the entry",
                "look at the hypervisor below (L0): its log, its version, and whether the same "
                "guest runs on bare metal",
                weight=9,
            )
        )
    else:
        dump.observations.append(
            Observation("qemu.hardware-error", f"hardware error {number:#x}", "not a known number")
        )


def _suberror(dump: Dump, digits: str, text: str) -> None:
    number = int(digits)
    known = SUBERRORS.get(number)
    data = {int(n): int(value, 16) for n, value in _DATA.findall(text)}
    dump.observations.append(
        Observation(
            f"kvm.suberror-{number}",
            f"KVM internal error, suberror {number}" + (f": {known.name}" if known else ""),
            known.meaning if known else "a number that no kernel defines",
            known.remedy if known else "",
            tuple(_extra(number, data)),
            weight=7,
        )
    )


def _extra(number: int, data: dict[int, int]) -> list[str]:
    """The extra data of an internal error in words."""
    words = [f"extra data[{n}] = {value:#x}" for n, value in sorted(data.items())]
    if number == 3 and {0, 1} <= data.keys():
        words[0] += f": the event being delivered has vector {data[0] & 0xFF}"
        words[1] += f": exit reason {_reason(data[1])}"
    if number == 4 and 0 in data:
        words[0] += f": exit reason {_reason(data[0])}"
    return words[:8]


def _reason(number: int) -> str:
    try:
        return ExitReason(number & 0xFFFF).name + " (if this is Intel)"
    except ValueError:
        return f"{number:#x}"


def _unknown_exit(dump: Dump, digits: str, text: str) -> None:
    dump.observations.append(
        Observation(
            "qemu.unknown-exit",
            f"KVM: unknown exit, hardware reason {digits}",
            f"the processor left the guest for a reason that KVM does not know: "
            f"{_reason(int(digits, 16))}",
            "if KVM runs nested, its own hypervisor gave an exit that L1 did not ask for",
            weight=7,
        )
    )


def _run_failed(dump: Dump, why: str, text: str) -> None:
    dump.observations.append(
        Observation(
            "qemu.kvm-run-failed",
            f"KVM_RUN failed: {why.strip()}",
            "the kernel refused to run the vCPU",
            '"Bad address" is guest memory without backing; "Invalid argument" or "Operation not '
            'permitted" in a nested L1 is often missing memory or a denied feature: see dmesg',
            weight=6,
        )
    )


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
    long_mode = _long_mode(registers, segments)
    if long_mode is not None:
        bit = EntryControls.ia32e_mode_guest
        dump.partial[F.ENTRY_CONTROLS] = (bit if long_mode else 0, bit)
        dump.assumed.append('KVM sets "IA-32e mode guest" as the guest\'s EFER.LMA is')


def _long_mode(registers: dict[str, int], segments: Segments) -> bool | None:
    if "EFER" in registers:
        return bool(registers["EFER"] & Efer.lma)
    return True if "CS" in segments and segments["CS"][3] >> 21 & 1 else None


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


# --- What the registers show ----------------------------------------------------------------------


def _places(text: str, dump: Dump, registers: dict[str, int], segments: Segments) -> None:
    rip = registers.get("RIP")
    if rip is None:
        return
    base = 0 if _long_mode(registers, segments) else segments.get("CS", (0, 0, 0, 0))[1]
    address = rip + base & (1 << 64) - 1
    look: list[Callable[[], Observation | None]] = [
        lambda: _place(address, registers),
        lambda: _code(text, address),
        lambda: _system_management(registers),
    ]
    dump.observations += [found for found in (one() for one in look) if found is not None]
    dump.notes.append(
        f"RIP {rip:#x}, {_mode(registers, segments)}, CPL {registers.get('CPL', '?')}"
    )


def _mode(registers: dict[str, int], segments: Segments) -> str:
    cr0 = registers.get("CR0", 0)
    if not cr0 & Cr0.pe:
        return "real mode"
    if _long_mode(registers, segments):
        return "64-bit mode" if segments.get("CS", (0,) * 4)[3] >> 21 & 1 else "compatibility mode"
    return "protected mode" + (" with paging" if cr0 & Cr0.pg else " without paging")


def _place(address: int, registers: dict[str, int]) -> Observation | None:
    place = place_of(address)
    if place is None:
        return None
    paging = bool(registers.get("CR0", 0) & Cr0.pg)
    note = "taking the page tables to map it one to one, as firmware's do" if paging else ""
    return Observation(
        "guest.rip-place",
        f"RIP {address:#x} is in {place.name}",
        place.meaning,
        "find who set RIP: an entry point in the VMCS or VMCB, a start-up IPI vector (its page is "
        "the vector times 4096), a corrupted stack or function pointer",
        (note,) if note else (),
        weight=8,
    )


def _code(text: str, address: int) -> Observation | None:
    match = _CODE.search(text)
    if match is None:
        return None
    before, _, after = match[1].partition("<")
    here = re.findall(r"[0-9a-fA-F]{2}", after)
    ahead = re.findall(r"[0-9a-fA-F]{2}", before)
    if len(here) < 4:
        return None
    if {b.lower() for b in here} == {"ff"}:
        zeros = ahead and set(ahead[-8:]) == {"00"}
        return Observation(
            "guest.code-unmapped",
            "every byte from RIP on is FFH",
            "that is what a PC gives for an address where nothing is: RIP is not in RAM"
            + (
                "; the bytes before it are 00H, which executes as ADD [RAX],AL: the guest slid "
                "through zeros to get here"
                if zeros
                else ""
            ),
            evidence=(" ".join(here[:8]),),
            weight=6,
        )
    if set(here) == {"00"}:
        return Observation(
            "guest.code-empty",
            "every byte from RIP on is 00H",
            "RAM that holds no code: the guest jumped into memory that was never loaded",
            evidence=(" ".join(here[:8]),),
            weight=6,
        )
    return None


def _system_management(registers: dict[str, int]) -> Observation | None:
    if not registers.get("SMM"):
        return None
    return Observation(
        "guest.smm",
        "the vCPU is in system-management mode",
        "entering and leaving SMM saves and loads much state by software; Linux before 6.2 lost "
        "the interrupt shadow there, which makes an entry with invalid guest state",
        "update the host's kernel; to prove the cause, run the guest with -machine smm=off",
        weight=4,
    )
