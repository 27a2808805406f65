"""VBox.log: status codes, HM error numbers, the failed entry's numbers, the guest's registers.

VirtualBox checks the guest state itself after VM-entry failure 33 and logs the number of the first
check that fails ("HM error"); these numbers are its own and mean the rules listed here.
"""

from __future__ import annotations

import re

from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.vmx.fields import guest_segment
from undervisor.explain.dump import VMX, Dump, Failure, Observation

MARKERS = (b"VERR_VMX", b"VINF_VMX", b"VERR_HM", b"VMX_IGS", b"HM error", b"VERR_SVM")

_STATUS = re.compile(r"\b(V(?:ERR|INF)_(?:VMX|HM|SVM|EM|NEM)_[A-Z0-9_]{2,60})")
_HM_ERROR = re.compile(r"HM error\s*=\s*(?:0x([0-9a-fA-F]+)|(\d+))")
_ERROR = re.compile(r"[Ii]nstr(?:uction)?[ -]?[Ee]rror\D{0,12}?(0x[0-9a-fA-F]+|\d+)")
_REASON = re.compile(r"[Ee]xit[ -]?[Rr]eason\D{0,12}?(0x[0-9a-fA-F]+|\d+)")
_SEGMENT = re.compile(
    r"(?<!\w)(cs|ds|es|fs|gs|ss|tr|ldtr)\s*=\s*\{([0-9a-fA-F]{4}) base=([0-9a-fA-F]{8,16}) "
    r"limit=([0-9a-fA-F]{8}) flags=([0-9a-fA-F]{8})\}"
)
_TABLE = re.compile(r"(?<!\w)([gi]dtr)=([0-9a-fA-F]{8,16}):([0-9a-fA-F]{4})")
_NAMED = re.compile(r"(?<!\w)(cr0|cr3|cr4|dr7|rip|eip|rsp|esp|eflags)=([0-9a-fA-F]{8,16})\b")
_SYSENTER = re.compile(
    r"SysEnter=\{cs=([0-9a-fA-F]{4,16}) eip=([0-9a-fA-F]{8,16}) esp=([0-9a-fA-F]{8,16})\}"
)
_REGISTERS = {
    "cr0": F.GUEST_CR0,
    "cr3": F.GUEST_CR3,
    "cr4": F.GUEST_CR4,
    "dr7": F.GUEST_DR7,
    "rip": F.GUEST_RIP,
    "eip": F.GUEST_RIP,
    "rsp": F.GUEST_RSP,
    "esp": F.GUEST_RSP,
    "eflags": F.GUEST_RFLAGS,
}
_IGNORED = F.GUEST_CR0, F.GUEST_CR4
"""The log has the guest's view of these, not the VMCS fields, in which VirtualBox forces bits."""

_SIX = ("cs", "ss", "ds", "es", "fs", "gs")


def _segment_rows(first: int, register: str, kinds: str) -> dict[int, str]:
    return {
        first + n: " ".join(f"{register}.{name}" for name in kind.split())
        for n, kind in enumerate(kinds.split(";"))
    }


def _data_rows() -> dict[int, str]:
    kinds = "accessed;present;dpl;reserved-low reserved-high;granularity-byte granularity-page;"
    rows: dict[int, str] = {}
    for n, register in enumerate(("ds", "es", "fs", "gs")):
        rows |= _segment_rows(530 + 6 * n, register, kinds + "readable")
    return rows


# VirtualBox's number -> our rules (ids without "vmx.", more than one where either may be meant).
HM_ERRORS: dict[int, str] = {
    502: "guest.cr0.must-be-one",
    503: "guest.cr0.may-be-one",
    504: "guest.cr0.pg-without-pe",
    505: "guest.cr4.must-be-one",
    506: "guest.cr4.may-be-one",
    507: "guest.debugctl",
    508: "guest.ia32e.pg",
    509: "guest.ia32e.pae",
    510: "guest.pcide",
    511: "guest.dr7",
    512: "guest.perf-global-ctrl",
    513: "guest.efer.reserved",
    514: "guest.efer.lma",
    515: "guest.efer.lme",
    **_segment_rows(
        516, "cs", "present;reserved-low reserved-high;granularity-byte granularity-page;type"
    ),
    520: "guest.cs.dpl",
    521: "guest.cs.dpl-conforming",
    522: "guest.cs.type",
    523: "guest.ss.rpl",
    524: "guest.ss.dpl",
    525: "guest.ss.dpl-zero",
    526: "guest.ss.type",
    527: "guest.ss.present",
    528: "guest.ss.reserved-low ss.reserved-high",
    529: "guest.ss.granularity-byte ss.granularity-page",
    **_data_rows(),
    **{
        554 + 3 * n + m: f"guest.{register}.{kind}-vm86"
        for n, register in enumerate(_SIX)
        for m, kind in enumerate(("base", "limit", "rights"))
    },
    572: "guest.cs.base-high",
    573: "guest.ss.base-high",
    574: "guest.ds.base-high",
    575: "guest.es.base-high",
    576: "guest.sysenter-esp",
    577: "guest.sysenter-eip",
    578: "guest.pat",
    579: "guest.pat",
    580: "guest.gdtr.base",
    581: "guest.idtr.base",
    582: "guest.gdtr.limit",
    583: "guest.idtr.limit",
    584: "guest.rip.canonical",
    585: "guest.rflags.reserved",
    586: "guest.rflags.bit-1",
    587: "guest.rflags.vm-ia32e",
    588: "guest.rflags.if",
    589: "guest.activity.range",
    590: "guest.activity.hlt-dpl",
    591: "guest.activity.blocking",
    592: "guest.activity.wait-for-sipi-event",
    593: "guest.interruptibility.reserved",
    594: "guest.interruptibility.sti-and-mov-ss",
    595: "guest.interruptibility.sti-if",
    596: "guest.interruptibility.external-sti interruptibility.external-mov-ss",
    597: "guest.interruptibility.nmi-mov-ss",
    598: "guest.interruptibility.smi",
    599: "guest.interruptibility.smm",
    600: "guest.interruptibility.nmi-sti",
    601: "guest.interruptibility.virtual-nmi",
    602: "guest.pending-debug.reserved",
    603: "guest.pending-debug.reserved",
    604: "guest.pending-debug.bs-missing",
    605: "guest.pending-debug.bs-excess",
    606: "guest.link.aligned link.width",
    607: "guest.tr.ti",
    608: "guest.ldtr.ti",
    609: "guest.tr.base-canonical",
    610: "guest.fs.base-canonical",
    611: "guest.gs.base-canonical",
    612: "guest.ldtr.base-canonical",
    613: "guest.tr.usable",
    614: "guest.tr.s",
    615: "guest.tr.present",
    616: "guest.tr.reserved-low tr.reserved-high",
    617: "guest.tr.granularity-byte tr.granularity-page",
    618: "guest.tr.type",
    619: "guest.tr.type",
    620: "guest.cs.s",
    621: "guest.cs.dpl",
    623: "guest.pdpte0.ept pdpte1.ept pdpte2.ept pdpte3.ept",
    624: "guest.link.shadow",
    625: "guest.link.revision",
}

STATUSES: dict[str, tuple[str, str]] = {
    "VERR_VMX_INVALID_GUEST_STATE": (
        "VM exit 33: the processor refused the guest state",
        "look at the HM error number and the registers in the same log",
    ),
    "VERR_VMX_UNABLE_TO_START_VM": (
        "VMLAUNCH failed with a VM-instruction error",
        "find the instruction error in the same log: 7 means controls, 8 host state",
    ),
    "VERR_VMX_UNABLE_TO_RESUME_VM": (
        "VMRESUME failed with a VM-instruction error",
        "find the instruction error in the same log",
    ),
    "VERR_VMX_INVALID_VMCS_PTR": (
        "there was no current VMCS",
        "another hypervisor on the host may have taken VMX away; only one can run at a time",
    ),
    "VERR_VMX_INVALID_VMCS_FIELD": (
        "VMREAD or VMWRITE of a field that this processor does not have",
        "if the host itself is a guest, its hypervisor hides a VMX feature: compare with caps",
    ),
    "VERR_VMX_NO_VMX": (
        "the processor does not report VMX",
        "if the host itself is a guest, its hypervisor must offer nested virtualization",
    ),
    "VERR_VMX_IN_VMX_ROOT_MODE": (
        "another hypervisor already runs in VMX root operation",
        "stop the other one (on Linux: modprobe -r kvm_intel)",
    ),
    "VERR_VMX_MSR_ALL_VMX_DISABLED": (
        "firmware has locked VMX off in IA32_FEATURE_CONTROL",
        "switch VT-x on in the firmware's set-up",
    ),
    "VERR_VMX_MSR_LOCKED_OR_DISABLED": (
        "firmware has locked VMX off in IA32_FEATURE_CONTROL",
        "switch VT-x on in the firmware's set-up",
    ),
    "VERR_VMX_UNEXPECTED_EXIT": ("a VM exit that VirtualBox does not handle", ""),
    "VERR_SVM_NO_SVM": (
        "the processor does not report SVM",
        "if the host itself is a guest, its hypervisor must offer nested virtualization",
    ),
    "VERR_SVM_IN_USE": (
        "another hypervisor already uses SVM",
        "stop the other one (on Linux: modprobe -r kvm_amd)",
    ),
    "VERR_SVM_DISABLED": (
        "firmware has switched SVM off (VM_CR.SVMDIS)",
        "switch SVM on in the firmware's set-up",
    ),
}


def rules_of(number: int) -> list[str]:
    """The ids of the rules that an HM error number means."""
    names = HM_ERRORS.get(number, "").split()
    return [f"vmx.guest.{name.removeprefix('guest.')}" for name in names]


def read(lines: list[str]) -> list[Dump]:
    """What the log says of a failed entry."""
    statuses: dict[str, None] = {}
    dump = Dump("VirtualBox log", VMX)
    numbers: dict[str, int] = {}
    for line in lines:
        statuses.update(dict.fromkeys(_STATUS.findall(line)))
        for name, shape in (("hm", _HM_ERROR), ("error", _ERROR), ("reason", _REASON)):
            match = shape.search(line)
            if match:
                text = next(group for group in match.groups() if group)
                base = 16 if name == "hm" and match[1] else 0
                numbers[name] = int(text, base) if base or not text.isdigit() else int(text)
        _registers(line, dump.state)
    known = [name for name in statuses if not name.startswith("VINF") or "VMX" in name]
    if not known and "hm" not in numbers:
        return []
    _conclude(dump, known, numbers)
    return [dump]


def _registers(line: str, state: dict[int, int]) -> None:
    for name, selector, base, limit, flags in _SEGMENT.findall(line):
        register = name.upper()
        state[guest_segment(register, "SELECTOR")] = int(selector, 16)
        state[guest_segment(register, "BASE")] = int(base, 16)
        state[guest_segment(register, "LIMIT")] = int(limit, 16)
        state[guest_segment(register, "ACCESS_RIGHTS")] = int(flags, 16)
    for name, base, limit in _TABLE.findall(line):
        state[F[f"GUEST_{name.upper()}_BASE"]] = int(base, 16)
        state[F[f"GUEST_{name.upper()}_LIMIT"]] = int(limit, 16)
    for name, digits in _NAMED.findall(line):
        if _REGISTERS[name] not in _IGNORED:
            state[_REGISTERS[name]] = int(digits, 16)
    match = _SYSENTER.search(line)
    if match:
        fields = (F.GUEST_SYSENTER_CS, F.GUEST_SYSENTER_EIP, F.GUEST_SYSENTER_ESP)
        for field, digits in zip(fields, match.groups(), strict=True):
            state[field] = int(digits, 16) & field.mask


def _conclude(dump: Dump, statuses: list[str], numbers: dict[str, int]) -> None:
    for status in statuses:
        meaning, remedy = STATUSES.get(status, ("a status code of VirtualBox", ""))
        weight = 6 if status.startswith("VERR") and status in STATUSES else 1
        dump.observations.append(
            Observation(
                f"virtualbox.{status.lower()}",
                status,
                meaning,
                remedy,
                weight=weight,
                bad=status.startswith("VERR"),
            )
        )
    number = numbers.get("hm")
    if number is not None:
        dump.named = rules_of(number)
        dump.observations.append(
            Observation(
                "virtualbox.hm-error",
                f"HM error {number}",
                "VirtualBox's own number for the first of its checks that failed"
                if dump.named
                else "VirtualBox's own checks gave no rule for it",
                weight=5,
            )
        )
    if "error" in numbers and 0 < numbers["error"] < 64:
        dump.failure = Failure(error=numbers["error"])
    elif "VERR_VMX_INVALID_GUEST_STATE" in statuses:
        dump.failure = Failure(reason=0x8000_0021)
    elif "reason" in numbers:
        dump.failure = Failure(reason=numbers["reason"] & 0xFFFF_FFFF)
