"""Capabilities from a saved text: JSON, `rdmsr -a`, vmxcap, VBox.log, lines of `MSR value`."""

from __future__ import annotations

import json
import re
from pathlib import Path

from undervisor.arch.svm.capabilities import SvmCapabilities
from undervisor.arch.vmx.capabilities import VmxCapabilities, VmxMsr
from undervisor.arch.vmx.controls import CONTROL_WORDS
from undervisor.errors import BadInput
from undervisor.explain.capabilities import MOST, MSRS, CapabilitySet
from undervisor.explain.dump import SVM
from undervisor.explain.formats.pairs import number

LIMIT = 8 << 20
"""Bytes of a file of capabilities."""


def load(path: str) -> CapabilitySet:
    """The capabilities in a file; BadInput where there are none."""
    try:
        with Path(path).open("rb") as file:
            raw = file.read(LIMIT + 1)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise BadInput(f"{path!r}: {error}") from None
    if len(raw) > LIMIT:
        raise BadInput(f"{path}: longer than {LIMIT >> 20} MiB; that is no file of capabilities")
    return parse(raw.decode("utf-8", "replace"), path)


def load_for_rules(path: str) -> VmxCapabilities | SvmCapabilities:
    """The capabilities in a file, as the rules want them; BadInput where it has too little."""
    found = load(path)
    capabilities = found.for_vmrun() if found.vendor == SVM else found.vmx()
    if capabilities is None:
        raise BadInput(
            f"{path}: MSR 0x480, IA32_VMX_BASIC, is not in it", hint="`undervisor caps --json`"
        )
    return capabilities


def parse(text: str, name: str) -> CapabilitySet:
    """The capabilities in a text of any kind that is known."""
    found = _from_json(text, name) if text.lstrip()[:1] in "{[" else None
    found = found or _from_msr_lines(text, name) or _from_vmxcap(text, name)
    if found is None:
        raise BadInput(
            f"{name}: no capabilities are in it",
            hint="known: `undervisor caps --json`, `rdmsr -a 0x480` and so on, vmxcap's text, "
            "VBox.log, lines of `0x480: 0x...`",
        )
    return found


def msr_index(name: str) -> int | None:
    """A capability MSR's number from its name or number; None for any other."""
    word = name.strip()[:60]
    upper = word.upper().removeprefix("MSR_")
    for candidate in (upper, f"IA32_{upper}", upper.replace("MSR", "IA32", 1)):
        if candidate in VmxMsr.__members__:
            return int(VmxMsr[candidate])
    digits = upper.removeprefix("0X")
    try:
        index = int(digits, 16)
    except ValueError:
        return None
    return index if index in MSRS else None


# --- JSON -----------------------------------------------------------------------------------------


def _from_json(text: str, name: str) -> CapabilitySet | None:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(data, list):
        data = {"cpus": data}
    if not isinstance(data, dict):
        return None
    found = CapabilitySet(str(data.get("name") or name)[:200])
    cpus = data.get("cpus")
    blocks = cpus if isinstance(cpus, list) else [data.get("msrs", data)]
    for block in blocks[:MOST]:
        msrs = _json_msrs(block)
        if msrs:
            found.cpus.append(msrs)
    leaf = data.get("svm")
    if isinstance(leaf, dict):
        eax, ebx, ecx, edx = (_json_number(leaf.get(r)) or 0 for r in ("eax", "ebx", "ecx", "edx"))
        found.svm = (eax, ebx, ecx, edx)
    found.physical_width = _width(data.get("physical_address_width"), 32, 52)
    found.linear_width = _width(data.get("linear_address_width"), 32, 64)
    cpuid = data.get("cpuid")
    if isinstance(cpuid, dict):
        found.cpuid = {str(k)[:60]: bool(v) for k, v in list(cpuid.items())[:1000]}
    return found if found.vendor or found.physical_width else None


def _width(value: object, least: int, most: int) -> int:
    found = _json_number(value) or 0
    return found if least <= found <= most else 0


def _json_number(value: object) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    return number(value) if isinstance(value, str) and len(value) <= 26 else None


def _json_msrs(block: object) -> dict[int, int]:
    if not isinstance(block, dict):
        return {}
    msrs = {}
    for key, value in list(block.items())[:MOST]:
        index, content = msr_index(str(key)), _json_number(value)
        if index is not None and content is not None and 0 <= content < 1 << 64:
            msrs[index] = content
    return msrs


# --- Lines of MSRs --------------------------------------------------------------------------------

_MSR_LINE = re.compile(
    r"(?:msr|MSR|rdmsr)?\s*[\[(]?\b((?:0x|0X)?(?:3[aA]|4[89][0-9a-fA-F])|"
    r"(?:MSR_)?(?:IA32_)?(?:VMX|FEATURE)_[A-Z0-9_]+)\b[\])]?h?\s*(?:[:=]|\s)\s*"
    r"\b((?:0x|0X)?[0-9a-fA-F_]{1,20})h?\b"
)
_RDMSR_COMMAND = re.compile(r"rdmsr\b[^\n]*?\b((?:0x)?(?:3[aA]|4[89][0-9a-fA-F])|\d{2,4})\s*$")
_CPU = re.compile(r"^\s*(?:cpu|CPU|processor)\s*[#:]?\s*(\d{1,4})\s*[:.]?\s*(.*)$")
_BARE = re.compile(r"^\s*(?:0x)?([0-9a-fA-F]{1,16})\s*$")


def _from_msr_lines(text: str, name: str) -> CapabilitySet | None:
    """`0x480: 0x...`, `IA32_VMX_BASIC = ...`, or `rdmsr -a 0x480` with a line per processor."""
    cpus: list[dict[int, int]] = []
    cpu, index, place = 0, None, 0

    def put(number: int, msr: int, value: int) -> None:
        while len(cpus) <= number < MOST:
            cpus.append({})
        if number < MOST:
            cpus[number].setdefault(msr, value)

    for line in text.splitlines()[:200_000]:
        line = line[:300]
        command = _RDMSR_COMMAND.search(line)
        if command:
            index, place = msr_index(command[1]), 0
            if index is None and command[1].isdigit() and int(command[1]) in MSRS:
                index = int(command[1])
            continue
        match = _CPU.match(line)
        if match:
            cpu, line = int(match[1]), match[2]
        bare = _BARE.match(line)
        if bare and index is not None:
            put(cpu if match else place, index, int(bare[1], 16))
            place += 1
            continue
        pair = _MSR_LINE.search(line)
        if pair:
            msr = msr_index(pair[1])
            value = _hex(pair[2])
            if msr is not None and value is not None:
                put(cpu, msr, value)
    cpus = [msrs for msrs in cpus if msrs]
    if not any(len(msrs) > 0 and set(msrs) - {VmxMsr.IA32_FEATURE_CONTROL} for msrs in cpus):
        return None
    return CapabilitySet(name, cpus)


def _hex(digits: str) -> int | None:
    """MSR values are always written in hexadecimal."""
    try:
        value = int(digits.replace("_", "").lower().removeprefix("0x"), 16)
    except ValueError:
        return None
    return value if value < 1 << 64 else None


# --- vmxcap ---------------------------------------------------------------------------------------

_VMXCAP_GROUPS: dict[str, int] = {
    "basic vmx information": VmxMsr.IA32_VMX_BASIC,
    "pin-based controls": VmxMsr.IA32_VMX_PINBASED_CTLS,
    "primary processor-based controls": VmxMsr.IA32_VMX_PROCBASED_CTLS,
    "secondary processor-based controls": VmxMsr.IA32_VMX_PROCBASED_CTLS2,
    "tertiary processor-based controls": VmxMsr.IA32_VMX_PROCBASED_CTLS3,
    "vm-exit controls": VmxMsr.IA32_VMX_EXIT_CTLS,
    "vm-entry controls": VmxMsr.IA32_VMX_ENTRY_CTLS,
    "miscellaneous data": VmxMsr.IA32_VMX_MISC,
    "vpid and ept capabilities": VmxMsr.IA32_VMX_EPT_VPID_CAP,
    "vm functions": VmxMsr.IA32_VMX_VMFUNC,
}
# vmxcap's own words where they are not the manual's: -> bit of the group's control word.
_VMXCAP_WORDS: dict[tuple[int, str], int] = {
    (0x482, "activate secondary control"): 31,
    (0x48B, "apic register emulation"): 8,
    (0x48B, "virtual interrupt delivery"): 9,
    (0x48B, "conceal non-root operation from pt"): 19,
    (0x48B, "mode-based execute control (xs/xu)"): 22,
    (0x48B, "sub-page write permissions"): 23,
    (0x48B, "gpa translation for pt"): 24,
    (0x48B, "tsc scaling"): 25,
    (0x48B, "user wait and pause"): 26,
    (0x48B, "enclv exiting"): 28,
    (0x482, "interrupt window exiting"): 2,
    (0x481, "external interrupt exiting"): 0,
    (0x492, "enable ipi virtualization"): 4,
    (0x483, "conceal vm exits from pt"): 24,
    (0x484, "conceal vm entries from pt"): 17,
}
_VMXCAP_LINE = re.compile(r"^\s+(\S.{0,60}?)\s{1,}(yes|no|default|forced)\s*$")
_VMXCAP_HEX = re.compile(r"^\s+Hex: 0x([0-9a-fA-F]{1,16})\s*$")


def _control_words() -> dict[tuple[int, str], int]:
    words = dict(_VMXCAP_WORDS)
    for word in CONTROL_WORDS.values():
        for bits in word.layout.FIELDS.values():
            words.setdefault((word.msr, bits.about.lower()), bits.lsb)
    return words


def _from_vmxcap(text: str, name: str) -> CapabilitySet | None:
    """vmxcap prints controls as words; from them the MSRs follow, but for bits that it lacks."""
    words, group = _control_words(), 0
    msrs: dict[int, int] = {}
    low: dict[int, int] = {}
    high: dict[int, int] = {}
    for line in text.splitlines()[:20_000]:
        line = line[:200]
        title = line.strip().lower()
        if title in _VMXCAP_GROUPS:
            group = _VMXCAP_GROUPS[title]
            continue
        value = _VMXCAP_HEX.match(line)
        if value and group:
            msrs[group] = int(value[1], 16)
            continue
        row = _VMXCAP_LINE.match(line)
        if row and group:
            bit = words.get((group, row[1].strip().lower()))
            if bit is not None:
                state = row[2]
                high[group] = high.get(group, 0) | (state != "no") << bit
                low[group] = low.get(group, 0) | (state == "forced") << bit
    if not high:
        return None
    for word in CONTROL_WORDS.values():
        if word.msr not in high:
            continue
        if word.flexible:
            msrs[word.msr] = high[word.msr]
            continue
        # The default1 bits that vmxcap does not list are forced on every processor.
        hidden = word.default1 & ~word.layout.DECLARED
        must, may = low[word.msr] | hidden, high[word.msr] | word.default1
        msrs[word.msr] = may << 32 | must | word.default1
        if word.true_msr is not None and msrs.get(VmxMsr.IA32_VMX_BASIC, 0) >> 55 & 1:
            msrs[word.true_msr] = may << 32 | must
    found = CapabilitySet(name, [msrs])
    found.notes.append("vmxcap names only the bits of its time; the others are taken as absent")
    return found
