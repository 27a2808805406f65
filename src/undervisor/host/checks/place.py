"""Where we are, and what that place demands before anything above can work."""

from __future__ import annotations

from collections.abc import Iterator

from undervisor.host.checks.finding import Finding, Kind, Layer, Level
from undervisor.host.fact import Absent, Known, value_or
from undervisor.host.facts.machine import Machine

_OK, _NOTE, _WARN = Level.OK, Level.NOTE, Level.WARN
_FAIL, _UNKNOWN = Level.FAIL, Level.UNKNOWN
_L = Layer.PLACE

BARE_METAL = Kind(
    "bare-metal", _L, _OK, "No hypervisor below: this is L0",
    "Nothing virtualizes this machine, so its own firmware and kernel decide about nesting.",
)  # fmt: skip
LPAR = Kind(
    "lpar", _L, _OK, "A logical partition",
    "PR/SM, the firmware's hypervisor, is always below on IBM Z. Counting from it, a KVM host in "
    "an LPAR is the second level and its guests are the third.",
)  # fmt: skip
INSIDE_HYPERVISOR = Kind(
    "inside-hypervisor", _L, _OK, "A hypervisor is below: this is L1 or deeper",
    "This machine is itself a guest. Whether it can run guests with hardware help is decided by "
    "the hypervisor below it. From inside, L1 can't be told from L2.",
)  # fmt: skip
INSIDE_EMULATOR = Kind(
    "inside-emulator", _L, _WARN, "An emulator is below, not a hypervisor",
    "The machine below executes our instructions in software. KVM may work here if the emulator "
    "has SVM (QEMU TCG has, and it has no VMX), but it is not KVM on KVM: guests are slow, and "
    "timing, performance counters and rare features differ from hardware.",
    "Give the guest below hardware acceleration: QEMU -accel kvm, or <domain type='kvm'>; then "
    "check that /dev/kvm of that host is usable (undervisor check there).",
    ("QEMU documentation, Accelerators",),
)  # fmt: skip
HIDDEN_HYPERVISOR = Kind(
    "hidden-hypervisor", _L, _WARN, "CPUID costs as much as a VM exit, yet no hypervisor shows",
    "CPUID always exits from a VMX guest and usually from an SVM guest. Without the hypervisor "
    "flag the kernel believes to be on bare metal, and so do its mitigations and its clock.",
    "If this is a guest, do not hide the hypervisor from it: libvirt <kvm><hidden state='off'/>, "
    "QEMU without kvm=off and without -hypervisor.",
    ("Intel SDM, Instructions That Cause VM Exits Unconditionally",),
)  # fmt: skip
HYPERVISOR_UNKNOWN = Kind(
    "hypervisor-unknown", _L, _UNKNOWN, "Whether a hypervisor is below is not known",
    "The processor's flags could not be read.", "Make /proc/cpuinfo readable.", decides=True,
)  # fmt: skip
WSL = Kind(
    "wsl", _L, _NOTE, "Windows Subsystem for Linux",
    "WSL2 is a guest of Hyper-V with a kernel of Microsoft's that has KVM built in. Module "
    "options have no effect there; %UserProfile%\\.wslconfig decides.",
)  # fmt: skip
WSL1 = Kind(
    "wsl1", _L, _FAIL, "WSL1 has no Linux kernel, so no KVM",
    "WSL1 translates system calls; there is no kernel that could hold KVM.",
    "On Windows: wsl --set-version DISTRIBUTION 2",
)  # fmt: skip
WSL_NESTED_OFF = Kind(
    "wsl-nested-off", _L, _FAIL, "WSL2 does not let guests nest",
    "Either Windows does not give the WSL2 machine the virtualization extension, or KVM, which is "
    "built into its kernel, has nested switched off.",
    "On Windows 11, in %UserProfile%\\.wslconfig below [wsl2]: nestedVirtualization=true and "
    "kernelCommandLine={module}.nested=1; then wsl --shutdown. Where Windows itself is a guest, "
    "its own hypervisor must give it nesting first.",
    ("Microsoft, Advanced settings configuration in WSL",),
)  # fmt: skip
CONTAINER = Kind(
    "container", _L, _NOTE, "Inside a container",
    "A container shares its host's kernel: modules and parameters are the host's, only the device "
    "file and the permissions are the container's.",
)  # fmt: skip
SEV_GUEST = Kind(
    "sev-guest", _L, _FAIL, "A SEV guest can't run guests",
    "In a guest with encrypted memory the hypervisor below can't read the VMCB that we would "
    "write, so SVM is not offered. KVM is not supported inside SEV, SEV-ES and SEV-SNP guests.",
    "Run guests in a machine without memory encryption, or use emulation (QEMU -accel tcg).",
    ("AMD APM, Secure Encrypted Virtualization",),
)  # fmt: skip
TDX_GUEST = Kind(
    "tdx-guest", _L, _FAIL, "A TDX guest can't run guests",
    "The TDX module does not offer VMX to the trust domains that this kernel supports.",
    "Run guests in a machine that is no trust domain, or use emulation (QEMU -accel tcg).",
    ("Intel TDX Module Base Architecture Specification",),
)  # fmt: skip
CLOUD = Kind(
    "cloud", _L, _NOTE, "A cloud machine with nesting",
    "The cloud offers this machine the virtualization extension. Live migration of the machine "
    "and changes of its type are the cloud's to allow; a change of processor vendor can take "
    "nesting away.",
)  # fmt: skip
_CLOUD_MEANING = "The cloud does not offer this machine the virtualization extension. No setting "
_CLOUD_MEANING += "inside the machine changes that, and messages about a BIOS mislead."
CLOUD_NESTING_OFF = {
    "aws": Kind(
        "aws-nesting-off", _L, _FAIL, "This EC2 instance has no nested virtualization",
        _CLOUD_MEANING,
        "Use a .metal instance, or a type of the families that offer nesting as an opt-in CPU "
        "option (C8i, M8i and R8i since February 2026) with that option switched on at launch.",
        ("Amazon EC2 User Guide, nested virtualization",),
    ),
    "azure": Kind(
        "azure-nesting-off", _L, _FAIL, "This Azure machine has no nested virtualization",
        _CLOUD_MEANING,
        "Use a size whose page says that nested virtualization is supported (for example Dsv5, "
        "Esv5), with security type Standard: Trusted Launch and confidential machines block it.",
        ("Azure documentation, virtual machine sizes; Trusted launch",),
    ),
    "gcp": Kind(
        "gcp-nesting-off", _L, _FAIL, "This Compute Engine machine has no nested virtualization",
        _CLOUD_MEANING,
        "Create the machine with advancedMachineFeatures.enableNestedVirtualization=true on an "
        "Intel machine series (for example N1, N2, C3; not E2, not AMD or Arm series), and make "
        "sure that the organization policy compute.disableNestedVirtualization allows it.",
        ("Compute Engine documentation, nested virtualization overview",),
    ),
    "": Kind(
        "cloud-nesting-off", _L, _FAIL, "This cloud machine has no nested virtualization",
        _CLOUD_MEANING,
        "Ask {cloud} for a machine type with nested virtualization (vmx or svm in "
        "/proc/cpuinfo), or use a bare-metal one.",
    ),
}  # fmt: skip
ARM64 = Kind(
    "arm64-nesting", _L, _UNKNOWN, "Nesting on arm64 is not checked",
    "KVM on arm64 can give a guest its own EL2 since the 6.16 kernel, on processors with FEAT_NV2, "
    "when the kernel was started with kvm-arm.mode=nested. /proc/cpuinfo does not show FEAT_NV2.",
    "Look for 'nested' in the kernel's messages about kvm; start with kvm-arm.mode=nested.",
    ("Linux Documentation, kernel-parameters: kvm-arm.mode",), decides=True,
)  # fmt: skip
PPC64 = Kind(
    "ppc64-nesting", _L, _UNKNOWN, "Nesting on ppc64 is not checked",
    "On POWER9 and later, KVM-HV nests: a pseries guest gets it with the machine option "
    "cap-nested-hv=on, a PowerVM partition with a suitable firmware level.",
    "In L0: modprobe kvm_hv nested=1, and -machine pseries,cap-nested-hv=on for L1.",
    ("QEMU documentation, pseries family boards",), decides=True,
)  # fmt: skip
ARCHITECTURE_UNCHECKED = Kind(
    "architecture-unchecked", _L, _UNKNOWN, "Nesting on this architecture is not checked",
    "Only x86 and s390x are checked.", "Read the kernel's documentation of this architecture.",
    decides=True,
)  # fmt: skip

_ARCHITECTURES = {"aarch64": ARM64, "ppc64le": PPC64, "ppc64": PPC64, "x86_64": None, "s390x": None}

EXIT_TICKS = 1000
"""CPUID on bare metal takes 100 to 300 ticks; no known VM exit takes fewer than this."""


def extension_missing(machine: Machine) -> bool:
    """Whether the processor surely lacks the extension that its vendor's KVM needs."""
    extension = machine.processor.extension
    return bool(extension) and machine.processor.has(extension) is False


def explained_by_place(machine: Machine) -> bool:
    """Whether the place alone explains a missing extension."""
    place = machine.place
    if isinstance(place.confidential, Known) or isinstance(place.wsl, Known):
        return True
    return place.cloud is not None and isinstance(place.hypervisor, Known)


def check(machine: Machine) -> Iterator[Finding]:
    """Findings about the place."""
    yield from _below(machine)
    yield from _wrapped(machine)
    yield from _cloud(machine)
    architecture = value_or(machine.processor.architecture, "")
    kind = _ARCHITECTURES.get(architecture, ARCHITECTURE_UNCHECKED)
    if kind and architecture and not machine.processor.x86:
        mode = machine.kernel.parameter("kvm-arm.mode")
        yield kind.found(f"uname -m: {architecture}", mode and f"kvm-arm.mode={mode}")


def _below(machine: Machine) -> Iterator[Finding]:
    hypervisor = machine.place.hypervisor
    if isinstance(hypervisor, Known):
        kind = INSIDE_EMULATOR if machine.place.emulated else INSIDE_HYPERVISOR
        yield kind.found(hypervisor.value, *machine.place.evidence)
    elif isinstance(hypervisor, Absent):
        timing = machine.place.timing
        if isinstance(timing, Known) and exits(timing.value.cpuid_ticks, timing.value.plain_ticks):
            yield HIDDEN_HYPERVISOR.found(f"CPUID took {timing.value.cpuid_ticks} ticks",
                                          f"plain code {timing.value.plain_ticks}")  # fmt: skip
        elif machine.processor.extension == "sie":
            yield LPAR.found("/proc/sysinfo names no VM level")
        else:
            yield BARE_METAL.found(*machine.place.evidence)
    else:
        yield HYPERVISOR_UNKNOWN.found(hypervisor)


def exits(cpuid_ticks: int, plain_ticks: int) -> bool:
    """Whether CPUID left the guest: slow both by itself and against plain code."""
    return cpuid_ticks >= EXIT_TICKS and cpuid_ticks >= 10 * plain_ticks


def _wrapped(machine: Machine) -> Iterator[Finding]:
    place = machine.place
    if isinstance(place.container, Known):
        yield CONTAINER.found(f"{place.container.source}: {place.container.value}")
    if isinstance(place.confidential, Known):
        kind = TDX_GUEST if "TDX" in place.confidential.value else SEV_GUEST
        yield kind.found(f"{place.confidential.source}: {place.confidential.value}")
    if isinstance(place.wsl, Known):
        yield from _wsl(machine, place.wsl)


def _wsl(machine: Machine, wsl: Known[str]) -> Iterator[Finding]:
    if wsl.value == "WSL1":
        yield WSL1.found(wsl.source)
        return
    yield WSL.found(wsl.source)
    module = machine.kvm.expected.replace("_", "-")
    if extension_missing(machine):
        yield WSL_NESTED_OFF.found(f"no {machine.processor.extension} flag", module=module)
    elif value_or(machine.kvm.nested, True) is False:
        yield WSL_NESTED_OFF.found(f"{machine.kvm.expected} nested is off", module=module)


def _cloud(machine: Machine) -> Iterator[Finding]:
    cloud = machine.place.cloud
    if cloud is None or isinstance(machine.place.confidential, Known):
        return
    evidence = f'DMI {cloud.field} is "{machine.place.dmi.get(cloud.field, "")}"'
    if not extension_missing(machine):
        yield CLOUD.found(cloud.name, evidence)
    elif isinstance(machine.place.hypervisor, Known):
        kind = CLOUD_NESTING_OFF.get(cloud.id, CLOUD_NESTING_OFF[""])
        flag = f"no {machine.processor.extension} flag"
        processor = f"processor: {machine.processor.name}" if machine.processor.name else ""
        yield kind.found(evidence, flag, processor, cloud=cloud.name)
