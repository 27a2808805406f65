"""The VMCB dump of Linux (`kvm_amd.dump_invalid_vmcb=1`)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from undervisor.arch.svm.vmcb import VmcbField as F
from undervisor.explain.dump import SVM, Dump

MARKERS = (b"VMCB Control Area", b"VMCB State Save Area", b"msrpm_base_pa:")

_SEGMENT = re.compile(
    r"(?<!\w)(es|cs|ss|ds|fs|gs|gdtr|ldtr|idtr|tr):\s+s:\s*([0-9a-fA-F]{1,4})\s+"
    r"a:\s*([0-9a-fA-F]{1,4})\s+l:\s*([0-9a-fA-F]{1,8})\s+b:\s*([0-9a-fA-F]{1,16})\b"
)
_PARTS = ("SELECTOR", "ATTRIBUTES", "LIMIT", "BASE")
_PAIR = re.compile(
    r"(?<![\w.])([a-z][a-z0-9_]*(?: [a-z]+)*):\s*(-?(?:0x)?[0-9a-fA-F]{1,16})\b"
    r"(?:[ \t]+([0-9a-fA-F]{8})\b)?(?:[ \t]+([0-9a-fA-F]{8})\b)?"
)
_TITLE = "VMCB Control Area"

FIELDS: dict[str, F] = {
    "cr_read": F.INTERCEPT_CR_READ,
    "cr_write": F.INTERCEPT_CR_WRITE,
    "dr_read": F.INTERCEPT_DR_READ,
    "dr_write": F.INTERCEPT_DR_WRITE,
    "exceptions": F.INTERCEPT_EXCEPTIONS,
    "pause filter count": F.PAUSE_FILTER_COUNT,
    "pause filter threshold": F.PAUSE_FILTER_THRESHOLD,
    "iopm_base_pa": F.IOPM_BASE_PA,
    "msrpm_base_pa": F.MSRPM_BASE_PA,
    "tsc_offset": F.TSC_OFFSET,
    "asid": F.GUEST_ASID,
    "tlb_ctl": F.TLB_CONTROL,
    "int_ctl": F.V_INTR_CONTROL,
    "int_vector": F.V_INTR_VECTOR,
    "int_state": F.INTERRUPT_SHADOW,
    "exit_code": F.EXITCODE,
    "exit_info1": F.EXITINFO1,
    "exit_info2": F.EXITINFO2,
    "nested_ctl": F.NESTED_CONTROL,
    "misc_ctl": F.NESTED_CONTROL,
    "nested_cr3": F.N_CR3,
    "avic_vapic_bar": F.AVIC_APIC_BAR,
    "ghcb": F.GHCB_GPA,
    "virt_ext": F.LBR_CONTROL,
    "lbr_ctl": F.LBR_CONTROL,
    "misc_ctl2": F.LBR_CONTROL,
    "next_rip": F.NRIP,
    "avic_backing_page": F.AVIC_BACKING_PAGE,
    "avic_logical_id": F.AVIC_LOGICAL_TABLE,
    "avic_physical_id": F.AVIC_PHYSICAL_TABLE,
    "vmsa_pa": F.VMSA_POINTER,
    "allowed_sev_features": F.ALLOWED_SEV_FEATURES,
    "guest_sev_features": F.GUEST_SEV_FEATURES,
    "cpl": F.CPL,
    "efer": F.EFER,
    "cr0": F.CR0,
    "cr2": F.CR2,
    "cr3": F.CR3,
    "cr4": F.CR4,
    "dr6": F.DR6,
    "dr7": F.DR7,
    "rip": F.RIP,
    "rflags": F.RFLAGS,
    "rsp": F.RSP,
    "rax": F.RAX,
    "s_cet": F.S_CET,
    "ssp": F.SSP,
    "isst_addr": F.ISST_ADDR,
    "star": F.STAR,
    "lstar": F.LSTAR,
    "cstar": F.CSTAR,
    "sfmask": F.SFMASK,
    "kernel_gs_base": F.KERNEL_GS_BASE,
    "sysenter_cs": F.SYSENTER_CS,
    "sysenter_esp": F.SYSENTER_ESP,
    "sysenter_eip": F.SYSENTER_EIP,
    "gpat": F.G_PAT,
    "dbgctl": F.DBGCTL,
    "br_from": F.BR_FROM,
    "br_to": F.BR_TO,
    "excp_from": F.LAST_EXCP_FROM,
    "excp_to": F.LAST_EXCP_TO,
}
DECIMAL = frozenset({F.GUEST_ASID, F.TLB_CONTROL, F.NESTED_CONTROL, F.LBR_CONTROL, F.CPL}) | {
    F.PAUSE_FILTER_COUNT,
    F.PAUSE_FILTER_THRESHOLD,
}
"""Printed as decimal numbers; a value of 16 digits is hexadecimal all the same."""

_HALVES = {
    "event_inj": (F.EVENTINJ, 0),
    "event_inj_err": (F.EVENTINJ, 32),
    "exit_int_info": (F.EXITINTINFO, 0),
    "exit_int_info_err": (F.EXITINTINFO, 32),
}


def read(lines: list[str]) -> list[Dump]:
    """The dumps in `lines`, in their order."""
    dumps = [_dump(block) for block in _blocks(lines)]
    return [dump for dump in dumps if len(dump.state) > 3]


def _blocks(lines: list[str]) -> Iterator[list[str]]:
    block: list[str] = []
    for line in lines:
        if _TITLE in line and block:
            yield block
            block = []
        block.append(line)
    yield block


def _dump(lines: list[str]) -> Dump:
    state: dict[int, int] = {}
    seen: set[str] = set()
    for line in lines:
        for match in _SEGMENT.finditer(line):
            for part, digits in zip(_PARTS, match.groups()[1:], strict=True):
                state[F[f"{match[1].upper()}_{part}"]] = int(digits, 16)
        if "s: " in line and " a: " in line:
            continue
        for match in _PAIR.finditer(line):
            _pair(match, state, seen)
    # Half of a pair of 32-bit lines says nothing of the other half.
    for low, high, field in (
        ("event_inj", "event_inj_err", F.EVENTINJ),
        ("exit_int_info", "exit_int_info_err", F.EXITINTINFO),
    ):
        if low not in seen or high not in seen:
            state.pop(field, None)
    return Dump("Linux KVM VMCB dump (dump_invalid_vmcb)", SVM, state)


def _pair(match: re.Match[str], state: dict[int, int], seen: set[str]) -> None:
    name, digits = match[1], match[2]
    if name == "intercepts":
        _intercepts(match, state)
    elif name in _HALVES:
        field, shift = _HALVES[name]
        seen.add(name)
        state[field] = state.get(field, 0) | (int(digits, 16) & 0xFFFF_FFFF) << shift
    elif name in FIELDS:
        field = FIELDS[name]
        value = _number(digits, field)
        if value is not None:
            state[field] = value & (1 << field.width * 8) - 1


def _number(digits: str, field: F) -> int | None:
    decimal = field in DECIMAL and len(digits) < 16 and not digits.startswith("0x")
    try:
        value = int(digits, 10 if decimal else 16)
    except ValueError:
        return None
    # Older kernels keep 32 bits of the exit code.
    if field is F.EXITCODE and value >> 4 == 0x0FFF_FFFF:
        value |= 0xFFFF_FFFF << 32
    return value


def _intercepts(match: re.Match[str], state: dict[int, int]) -> None:
    """One number of 64 bits (words 3 and 4), or two or three of 32."""
    if match[3] is None:
        value = int(match[2], 16)
        state[F.INTERCEPT_WORD3], state[F.INTERCEPT_WORD4] = value & 0xFFFF_FFFF, value >> 32
        return
    words = (F.INTERCEPT_WORD3, F.INTERCEPT_WORD4, F.INTERCEPT_WORD5)
    for field, digits in zip(words, (match[2], match[3], match[4]), strict=True):
        if digits is not None:
            state[field] = int(digits, 16) & 0xFFFF_FFFF
