"""The VMCS dumps of Linux (`kvm_intel.dump_invalid_vmcs=1`) and of Xen (key `v`, or a crash).

Both print three sections with the same titles; the lines differ in details and by version.
Whatever stands before a line (time stamps, host names, "(XEN)", quote marks) does not matter: every
line is known by its own shape.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.vmx.fields import guest_segment
from undervisor.explain.dump import VMX, Dump

GUEST, HOST, CONTROL = "guest", "host", "control"
MARKERS = (
    b"*** Guest State",
    b"*** Host State",
    b"*** Control State",
    b"gh_mask=",
    b"CPUBased=",
    b"Interruptibility =",
    b"FSBase=",
)

_H = r"(?:0x)?([0-9a-fA-F]{1,16})\b"
_IN_BRACKETS = r"(?:\s*\([^)\n]{0,200}\))?"


@dataclass(frozen=True, slots=True)
class Line:
    """A line's shape and the fields of its numbers; `section` is where it stands.

    `sure` lines occur in one section only, so that they tell it when the title is lost.
    """

    section: str
    shape: re.Pattern[str]
    fields: tuple[F, ...]
    sure: bool = False


def _line(section: str, shape: str, *fields: F, sure: bool = False) -> Line:
    shape = shape.replace("{H}", _H).replace("{B}", _IN_BRACKETS).replace(" ", r"\s*")
    return Line(section, re.compile(r"(?<![\w.])" + shape), fields, sure)


LINES: tuple[Line, ...] = (
    *(
        _line(
            GUEST,
            f"CR{n}: actual={{H}}, shadow={{H}}, gh_mask={{H}}",
            F[f"GUEST_CR{n}"],
            F[f"CR{n}_READ_SHADOW"],
            F[f"CR{n}_GUEST_HOST_MASK"],
            sure=True,
        )
        for n in (0, 4)
    ),
    _line(GUEST, "CR3 = {H}$", F.GUEST_CR3),
    *(_line(GUEST, f"PDPT[RE]{n} = {{H}}", F[f"GUEST_PDPTE{n}"], sure=True) for n in range(4)),
    _line(GUEST, "RSP = {H}{B} RIP = {H}", F.GUEST_RSP, F.GUEST_RIP),
    _line(GUEST, "RFLAGS={H}{B} DR7 = {H}", F.GUEST_RFLAGS, F.GUEST_DR7, sure=True),
    _line(
        GUEST,
        "Sysenter RSP={H} CS:RIP={H}:{H}",
        F.GUEST_SYSENTER_ESP,
        F.GUEST_SYSENTER_CS,
        F.GUEST_SYSENTER_EIP,
    ),
    _line(GUEST, "EFER(?:\\(VMCS\\))? = {H}(?!\\s*\\((?:effective|autoload))", F.GUEST_EFER),
    _line(GUEST, "PAT = {H}", F.GUEST_PAT),
    _line(
        GUEST,
        "DebugCtl = {H} DebugExceptions = {H}",
        F.GUEST_DEBUGCTL,
        F.GUEST_PENDING_DEBUG_EXCEPTIONS,
        sure=True,
    ),
    _line(GUEST, "PerfGlobCtl = {H}", F.GUEST_PERF_GLOBAL_CTRL),
    _line(GUEST, "BndCfgS = {H}", F.GUEST_BNDCFGS, sure=True),
    _line(
        GUEST,
        "Interruptibility = {H} ActivityState = {H}",
        F.GUEST_INTERRUPTIBILITY_STATE,
        F.GUEST_ACTIVITY_STATE,
        sure=True,
    ),
    _line(GUEST, "InterruptStatus = {H}", F.GUEST_INTERRUPT_STATUS, sure=True),
    _line(GUEST, "PreemptionTimer = {H} SM Base = {H}", F.PREEMPTION_TIMER_VALUE, F.GUEST_SMBASE),
    _line(
        GUEST,
        "S_CET = {H}, SSP = {H}, SSP TABLE = {H}",
        F.GUEST_S_CET,
        F.GUEST_SSP,
        F.GUEST_INTERRUPT_SSP_TABLE_ADDR,
    ),
    _line(
        HOST,
        "RIP = {H}{B} RSP = {H}",
        F.HOST_RIP,
        F.HOST_RSP,
        sure=True,
    ),
    _line(
        HOST,
        "CS={H} SS={H} DS={H} ES={H} FS={H} GS={H} TR={H}",
        *(F[f"HOST_{r}_SELECTOR"] for r in ("CS", "SS", "DS", "ES", "FS", "GS", "TR")),
        sure=True,
    ),
    _line(
        HOST,
        "FSBase={H} GSBase={H} TRBase={H}",
        F.HOST_FS_BASE,
        F.HOST_GS_BASE,
        F.HOST_TR_BASE,
        sure=True,
    ),
    _line(HOST, "GDTBase={H} IDTBase={H}", F.HOST_GDTR_BASE, F.HOST_IDTR_BASE, sure=True),
    _line(HOST, "CR0={H} CR3={H} CR4={H}", F.HOST_CR0, F.HOST_CR3, F.HOST_CR4, sure=True),
    _line(
        HOST,
        "Sysenter RSP={H} CS:RIP={H}:{H}",
        F.HOST_SYSENTER_ESP,
        F.HOST_SYSENTER_CS,
        F.HOST_SYSENTER_EIP,
    ),
    _line(HOST, "EFER = {H}", F.HOST_EFER),
    _line(HOST, "PAT = {H}", F.HOST_PAT),
    _line(HOST, "PerfGlobCtl = {H}", F.HOST_PERF_GLOBAL_CTRL),
    _line(
        HOST,
        "S_CET = {H}, SSP = {H}, SSP TABLE = {H}",
        F.HOST_S_CET,
        F.HOST_SSP,
        F.HOST_INTERRUPT_SSP_TABLE_ADDR,
    ),
    _line(CONTROL, "PinBased={H}", F.PIN_BASED_CONTROLS, sure=True),
    _line(CONTROL, "CPUBased={H}", F.PRIMARY_CONTROLS, sure=True),
    _line(CONTROL, "SecondaryExec={H}", F.SECONDARY_CONTROLS),
    _line(CONTROL, "TertiaryExec={H}", F.TERTIARY_CONTROLS),
    _line(CONTROL, "EntryControls={H}", F.ENTRY_CONTROLS, sure=True),
    _line(CONTROL, "ExitControls={H}", F.EXIT_CONTROLS),
    _line(CONTROL, "SecondaryExitControls={H}", F.SECONDARY_EXIT_CONTROLS),
    _line(
        CONTROL,
        "ExceptionBitmap={H} PFECmask={H} PFECmatch={H}",
        F.EXCEPTION_BITMAP,
        F.PAGE_FAULT_ERROR_CODE_MASK,
        F.PAGE_FAULT_ERROR_CODE_MATCH,
    ),
    _line(
        CONTROL,
        "VMEntry: intr_info={H} errcode={H} ilen={H}",
        F.ENTRY_INTERRUPTION_INFORMATION,
        F.ENTRY_EXCEPTION_ERROR_CODE,
        F.ENTRY_INSTRUCTION_LENGTH,
    ),
    _line(CONTROL, "ilen=[0-9a-f]+ event_data={H}", F.INJECTED_EVENT_DATA),
    _line(
        CONTROL,
        "VMExit: intr_info={H} errcode={H} ilen={H}",
        F.EXIT_INTERRUPTION_INFORMATION,
        F.EXIT_INTERRUPTION_ERROR_CODE,
        F.EXIT_INSTRUCTION_LENGTH,
    ),
    _line(CONTROL, "reason={H} qualification={H}", F.EXIT_REASON, F.EXIT_QUALIFICATION),
    _line(
        CONTROL,
        "IDTVectoring: info={H} errcode={H}",
        F.IDT_VECTORING_INFORMATION,
        F.IDT_VECTORING_ERROR_CODE,
    ),
    _line(CONTROL, "TSC Offset = {H}", F.TSC_OFFSET),
    _line(CONTROL, "TSC Multiplier = {H}", F.TSC_MULTIPLIER),
    _line(CONTROL, "TPR Threshold = {H}", F.TPR_THRESHOLD),
    _line(CONTROL, "APIC-access addr = {H}", F.APIC_ACCESS_ADDRESS),
    _line(CONTROL, "virt-APIC addr = {H}", F.VIRTUAL_APIC_ADDRESS),
    _line(CONTROL, "PostedIntrVec = {H}", F.POSTED_INTERRUPT_NOTIFICATION_VECTOR),
    _line(CONTROL, "EPT pointer = {H}", F.EPT_POINTER),
    _line(CONTROL, "EPTP index = {H}", F.EPTP_INDEX),
    *(_line(CONTROL, f"target{n}={{H}}", F[f"CR3_TARGET_VALUE_{n}"]) for n in range(4)),
    _line(CONTROL, "PLE Gap={H} Window={H}", F.PLE_GAP, F.PLE_WINDOW),
    _line(CONTROL, "Virtual processor ID = {H}", F.VPID),
    _line(CONTROL, "VMfunc controls = {H}", F.VM_FUNCTION_CONTROLS),
)

_TITLE = re.compile(r"\*\*\*\s*(Guest|Host|Control) State")
_SEGMENT = re.compile(
    r"(?<!\w)(CS|DS|SS|ES|FS|GS|LDTR|TR)\s*:\s*"
    r"(?:sel=)?(?:0x)?([0-9a-fA-F]{4}),?\s*(?:attr=)?(?:0x)?([0-9a-fA-F]{5}),?\s*"
    r"(?:limit=)?(?:0x)?([0-9a-fA-F]{8}),?\s*(?:base=)?(?:0x)?([0-9a-fA-F]{16})\b"
)
_TABLE = re.compile(
    r"(?<!\w)([GI]DTR)\s*:\s*(?:limit=)?(?:0x)?([0-9a-fA-F]{8}),?\s*"
    r"(?:base=)?(?:0x)?([0-9a-fA-F]{16})\b"
)
_STATUS = re.compile(r"SVI\|RVI\s*=\s*([0-9a-fA-F]{2})\|([0-9a-fA-F]{2})")
_VCPU = re.compile(r"(?:>>> Domain (\d+)|VCPU\s+(\d+)|VMCS (\S+), last attempted .{0,40}CPU (\d+))")
_XEN = re.compile(r"\(XEN\)|sel\s+attr\s+limit\s+base|PDPTE0|SM Base")
_PARTS = ("SELECTOR", "ACCESS_RIGHTS", "LIMIT", "BASE")


def read(lines: list[str]) -> list[Dump]:
    """The dumps in `lines`, in their order."""
    return [dump for block in _blocks(lines) if (dump := _dump(block)).state]


def _blocks(lines: list[str]) -> Iterator[list[str]]:
    """Cut the text where a guest state begins again."""
    block: list[str] = []
    for line in lines:
        title = _TITLE.search(line)
        if title and title[1] == "Guest" and block:
            yield block
            block = []
        block.append(line)
    yield block


def _dump(lines: list[str]) -> Dump:
    state: dict[int, int] = {}
    section, xen, where = "", False, ""
    for line in lines:
        title = _TITLE.search(line)
        if title:
            section = title[1].lower()
            continue
        xen = xen or bool(_XEN.search(line))
        match = _VCPU.search(line)
        if match and not state:
            where = match[0]
        section = _scan(line, section, state)
    name = "Xen VMCS dump" if xen else "Linux KVM VMCS dump (dump_invalid_vmcs)"
    dump = Dump(name, VMX, state)
    if where:
        dump.notes.append(where)
    return dump


def _scan(line: str, section: str, state: dict[int, int]) -> str:
    """Take what the line holds; the section that we are in after it."""
    if "=" not in line and ":" not in line:
        return section
    for match in _SEGMENT.finditer(line):
        for part, digits in zip(_PARTS, match.groups()[1:], strict=True):
            state[guest_segment(match[1], part)] = int(digits, 16)
        section = GUEST
    for match in _TABLE.finditer(line):
        state[F[f"GUEST_{match[1]}_LIMIT"]] = int(match[2], 16)
        state[F[f"GUEST_{match[1]}_BASE"]] = int(match[3], 16)
        section = GUEST
    status = _STATUS.search(line)
    if status:
        state[F.GUEST_INTERRUPT_STATUS] = int(status[1], 16) << 8 | int(status[2], 16)
    for shape in LINES:
        if shape.section != section and not shape.sure:
            continue
        found = shape.shape.search(line)
        if found:
            section = shape.section if shape.sure else section
            for field, digits in zip(shape.fields, found.groups(), strict=True):
                state[field] = int(digits, 16) & field.mask
    return section
