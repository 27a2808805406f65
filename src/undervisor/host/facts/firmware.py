"""What the firmware decided before the kernel started: locks, switches, tables."""

from __future__ import annotations

import re
from dataclasses import dataclass

from undervisor.host.access.protocol import Host
from undervisor.host.fact import Fact, Unknown, then
from undervisor.host.facts.processor import Processor

IA32_FEATURE_CONTROL = 0x3A
"""SDM, "Enabling and Entering VMX Operation": bit 0 locks, bit 2 allows VMX outside SMX."""

VM_CR = 0xC0010114
"""APM, "VM_CR MSR": bit 3 LOCK, bit 4 SVMDIS."""

_SECURE_BOOT = "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"


@dataclass(frozen=True, slots=True)
class Firmware:
    """The firmware's traces."""

    feature_control: Fact[int]
    vm_cr: Fact[int]
    secure_boot: Fact[bool]
    lockdown: Fact[str]
    iommus: Fact[tuple[str, ...]]
    tables: Fact[tuple[str, ...]]
    smt_active: Fact[str]
    smt_control: Fact[str]


def _secure_boot(raw: bytes) -> bool:
    if len(raw) != 5:
        raise ValueError(f"the SecureBoot variable has {len(raw)} bytes instead of 5")
    return raw[4] == 1


def _lockdown(text: str) -> str:
    match = re.search(r"\[(\w+)\]", text)
    if not match:
        raise ValueError(f"no chosen mode in {text[:60]!r}")
    return match[1]


def firmware(host: Host, processor: Processor) -> Firmware:
    """Read the firmware's traces; the MSRs only where the processor's vendor has them."""
    extension = processor.extension
    other: Unknown = Unknown("MSR", "another vendor's")
    return Firmware(
        feature_control=host.msr(IA32_FEATURE_CONTROL) if extension == "vmx" else other,
        vm_cr=host.msr(VM_CR) if extension == "svm" else other,
        secure_boot=then(host.read_bytes(_SECURE_BOOT, 64), _secure_boot),
        lockdown=then(host.read_line("/sys/kernel/security/lockdown"), _lockdown),
        iommus=host.listdir("/sys/class/iommu"),
        tables=host.listdir("/sys/firmware/acpi/tables"),
        smt_active=host.read_line("/sys/devices/system/cpu/smt/active"),
        smt_control=host.read_line("/sys/devices/system/cpu/smt/control"),
    )
