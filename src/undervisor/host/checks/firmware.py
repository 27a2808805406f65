"""What the firmware locked or left off; meaningful on bare metal, partly below a hypervisor."""

from __future__ import annotations

from collections.abc import Iterator

from undervisor.arch.x86.msr import FeatureControl, VmCr
from undervisor.host.checks.finding import Finding, Kind, Layer, Level
from undervisor.host.checks.place import explained_by_place, extension_missing
from undervisor.host.fact import Absent, Fact, Known, value_or
from undervisor.host.facts.kvm import Presence
from undervisor.host.facts.machine import Machine
from undervisor.host.facts.version import Version

_L = Layer.FIRMWARE

VMX_OFF = Kind(
    "vmx-off-in-firmware", _L, Level.FAIL, "The firmware switched VMX off",
    "IA32_FEATURE_CONTROL is locked without the bit that allows VMX outside SMX operation. Only "
    "the firmware can change it, before the lock, at the next start.",
    "Enable Intel Virtualization Technology (VT-x, VMX) in the firmware setup, then switch the "
    "machine off and on: some firmware locks only at a cold start.",
    ("Intel SDM, Enabling and Entering VMX Operation",),
)  # fmt: skip
SVM_OFF = Kind(
    "svm-off-in-firmware", _L, Level.FAIL, "The firmware switched SVM off",
    "VM_CR.SVMDIS is set, so that EFER.SVME can't be.",
    "Enable SVM Mode (AMD-V) in the firmware setup, then restart.",
    ("AMD APM, Enabling SVM; VM_CR MSR",),
)  # fmt: skip
ALLOWS = Kind(
    "firmware-allows", _L, Level.OK, "The firmware allows virtualization",
    "Read from the lock register, or shown by a KVM backend that initialized.",
)  # fmt: skip
UNLOCKED = Kind(
    "feature-control-unlocked", _L, Level.NOTE, "IA32_FEATURE_CONTROL is not locked",
    "Linux sets and locks the register by itself. Other L1 hypervisors expect the firmware to "
    "have done it: Windows with virtualization-based security stops at boot without the lock.",
    "In a guest: use a firmware or hypervisor that locks the register (QEMU: the feature is in "
    "etc/msr_feature_control for SeaBIOS and OVMF).",
    ("Intel SDM, Enabling and Entering VMX Operation",),
)  # fmt: skip
FIRMWARE_UNKNOWN = Kind(
    "firmware-unknown", _L, Level.UNKNOWN, "Whether the firmware allows virtualization is unknown",
    "The lock register could not be read, and nothing else tells.",
    "Run it as root with the msr module: sudo modprobe msr; sudo undervisor check", decides=True,
)  # fmt: skip
NX_OFF = Kind(
    "nx-off", _L, Level.WARN, "The execute-disable bit is off",
    "Without NX, KVM does not offer it to guests, and modern guests refuse to start.",
    "Enable Execute Disable (XD, NX) in the firmware setup; remove noexec=off from the kernel "
    "command line.",
)  # fmt: skip
IOMMU_ON = Kind("iommu-on", _L, Level.OK, "An IOMMU is active", "Devices can be given to guests.")
IOMMU_OFF = Kind(
    "iommu-off", _L, Level.NOTE, "No IOMMU is active",
    "Nested KVM works without one. Devices can't be given to L1, and with it not to L2.",
    "If guests need devices: enable VT-d or AMD-Vi in the firmware setup, and intel_iommu=on "
    "(AMD: on by default) on the kernel command line.",
)  # fmt: skip
LOCKDOWN = Kind(
    "lockdown", _L, Level.NOTE, "The kernel is locked down",
    "Under lockdown (as Secure Boot switches it on in many distributions) MSRs can't be read or "
    "written from user space and unsigned modules are refused. KVM itself works.",
    "No change is needed for KVM. Sign modules of your own, or switch Secure Boot off.",
    ("kernel_lockdown(7)",),
)  # fmt: skip

_BIOS_LOG = r"disabled by bios|disabled \(by BIOS\)|VMX \(outside TXT\) disabled"


def switched_off(machine: Machine) -> str:
    """The evidence that the firmware switched the extension off; empty where there is none."""
    control = machine.firmware.feature_control
    if isinstance(control, Known):
        value = FeatureControl(control.value)
        if value.lock and not value.vmx_outside_smx:
            return f"IA32_FEATURE_CONTROL is {control.value:#x}: locked, VMX not allowed"
        return ""
    vm_cr = machine.firmware.vm_cr
    if isinstance(vm_cr, Known):
        return f"VM_CR is {vm_cr.value:#x}: SVMDIS is set" if VmCr(vm_cr.value).svmdis else ""
    logged = machine.kernel.logged(_BIOS_LOG, most=1)
    return f"the kernel logged: {logged[0]}" if logged else ""


def _allowed(machine: Machine) -> str:
    """The evidence that the firmware allows it; empty where there is none."""
    registers: tuple[tuple[str, Fact[int]], ...] = (
        ("IA32_FEATURE_CONTROL", machine.firmware.feature_control),
        ("VM_CR", machine.firmware.vm_cr),
    )
    for name, fact in registers:
        if isinstance(fact, Known):
            return f"{name} is {fact.value:#x}"
    if machine.processor.has(machine.processor.extension):
        if machine.kvm.presence is Presence.LOADED:
            return f"{machine.kvm.expected} is loaded, which it refuses while the firmware forbids"
        since = Version(5, 6) if machine.processor.extension == "vmx" else Version(6, 7)
        version = machine.kernel.version
        if isinstance(version, Known) and version.value >= since:
            flag = machine.processor.extension
            return f"the kernel shows {flag}, which since {since} it hides while it is off"
    return ""


def check(machine: Machine) -> Iterator[Finding]:
    """Findings about the firmware; x86 only."""
    if not machine.processor.x86 or not machine.processor.extension:
        return
    bare = isinstance(machine.place.hypervisor, Absent)
    yield from _extension(machine, bare)
    if bare:
        yield from _tables(machine)
    mode = machine.firmware.lockdown
    if isinstance(mode, Known) and mode.value != "none":
        secure = value_or(machine.firmware.secure_boot, None)
        boot = {True: "Secure Boot is on", False: "Secure Boot is off", None: ""}[secure]
        yield LOCKDOWN.found(f"lockdown is {mode.value}", boot)


def _extension(machine: Machine, bare: bool) -> Iterator[Finding]:
    off = switched_off(machine)
    if off and bare:
        yield (VMX_OFF if machine.processor.extension == "vmx" else SVM_OFF).found(off)
        return
    control = machine.firmware.feature_control
    has = machine.processor.has(machine.processor.extension)
    if isinstance(control, Known) and has and not FeatureControl(control.value).lock:
        yield UNLOCKED.found(f"IA32_FEATURE_CONTROL is {control.value:#x}")
    if not bare:
        return
    allowed = _allowed(machine)
    if allowed:
        yield ALLOWS.found(allowed)
    elif not (extension_missing(machine) and explained_by_place(machine)):
        name = "feature_control" if machine.processor.extension == "vmx" else "vm_cr"
        yield FIRMWARE_UNKNOWN.found(getattr(machine.firmware, name))


def _tables(machine: Machine) -> Iterator[Finding]:
    if machine.processor.has("nx") is False:
        yield NX_OFF.found("no nx flag")
    iommus = machine.firmware.iommus
    if isinstance(iommus, Known) and iommus.value:
        yield IOMMU_ON.found(", ".join(iommus.value[:4]))
    elif isinstance(iommus, Known | Absent):
        names: tuple[str, ...] = value_or(machine.firmware.tables, ())
        tables = {"DMAR", "IVRS"} & set(names)
        told = f"the firmware has a {tables.pop()} table" if tables else "no DMAR or IVRS table"
        known = isinstance(machine.firmware.tables, Known)
        yield IOMMU_OFF.found("/sys/class/iommu is empty", told if known else "")
