"""Where we are: bare metal or above which hypervisor, in a container, in WSL, in which cloud."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from undervisor.host.access.protocol import Cpuid, Host, Output, Timing
from undervisor.host.fact import Absent, Fact, Known, Unknown, then, value_or
from undervisor.host.facts.kernel import Kernel
from undervisor.host.facts.processor import Processor

SIGNATURES: dict[str, str] = {
    "KVMKVMKVM": "KVM",
    "TCGTCGTCGTCG": "QEMU TCG",
    "Microsoft Hv": "Hyper-V",
    "VMwareVMware": "VMware",
    "XenVMMXenVMM": "Xen",
    "VBoxVBoxVBox": "VirtualBox",
    "bhyve bhyve": "bhyve",
    "ACRNACRNACRN": "ACRN",
    "Jailhouse": "Jailhouse",
    " lrpepyh  vr": "Parallels",
    "prl hyperv": "Parallels",
    "OpenBSDVMM58": "OpenBSD vmm",
    "SRESRESRESRE": "Lockheed Martin LMHS",
    "EVMMEVMMEVMM": "Intel KGT",
    "QNXQVMBSQG": "QNX",
    "Linux KVM Hv": "KVM",
}
"""CPUID.40000000H EBX:ECX:EDX, without the trailing NULs."""

_DMI = ("sys_vendor", "product_name", "product_version", "bios_vendor", "board_vendor")
_DMI_WORDS: tuple[tuple[str, str], ...] = (
    ("QEMU", "KVM or QEMU TCG"),
    ("VMware", "VMware"),
    ("innotek", "VirtualBox"),
    ("VirtualBox", "VirtualBox"),
    ("Xen", "Xen"),
    ("Bochs", "Bochs"),
    ("Parallels", "Parallels"),
    ("BHYVE", "bhyve"),
    ("KVM", "KVM"),
)

_NOTHING = Output(1, "")

AZURE_ASSET_TAG = "7783-7084-3265-9085-8269-3286-77"


@dataclass(frozen=True, slots=True)
class Cloud:
    """A cloud, by what its DMI strings begin with."""

    id: str
    name: str
    field: str
    beginning: str


CLOUDS: tuple[Cloud, ...] = (
    Cloud("aws", "Amazon EC2", "sys_vendor", "Amazon EC2"),
    Cloud("azure", "Microsoft Azure", "chassis_asset_tag", AZURE_ASSET_TAG),
    Cloud("gcp", "Google Compute Engine", "product_name", "Google Compute Engine"),
    Cloud("oracle", "Oracle Cloud", "chassis_asset_tag", "OracleCloud.com"),
    Cloud("alibaba", "Alibaba Cloud", "sys_vendor", "Alibaba Cloud"),
    Cloud("digitalocean", "DigitalOcean", "sys_vendor", "DigitalOcean"),
    Cloud("hetzner", "Hetzner Cloud", "sys_vendor", "Hetzner"),
    Cloud("linode", "Linode", "sys_vendor", "Linode"),
    Cloud("akamai", "Akamai Cloud", "sys_vendor", "Akamai"),
    Cloud("vultr", "Vultr", "sys_vendor", "Vultr"),
    Cloud("scaleway", "Scaleway", "sys_vendor", "Scaleway"),
    Cloud("tencent", "Tencent Cloud", "sys_vendor", "Tencent Cloud"),
    Cloud("upcloud", "UpCloud", "sys_vendor", "UpCloud"),
    Cloud("openstack", "an OpenStack cloud", "product_name", "OpenStack"),
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where the machine stands.

    `hypervisor`: what is directly below; absent on bare metal.  `evidence`: what told so.
    `container`, `wsl`, `confidential`, `cloud`: absent where it is none.
    `kvm_features`: EAX of KVM's paravirtual feature leaf, absent where KVM is not below.
    """

    hypervisor: Fact[str]
    evidence: tuple[str, ...]
    dmi: dict[str, str]
    container: Fact[str]
    wsl: Fact[str]
    confidential: Fact[str]
    cloud: Cloud | None
    timing: Fact[Timing]
    kvm_features: Fact[int]

    @property
    def emulated(self) -> bool:
        """Whether an emulator, not a hypervisor, is below."""
        return value_or(self.hypervisor, "") in ("QEMU TCG", "Bochs")


def signature(registers: Cpuid) -> str:
    """The twelve characters of a CPUID leaf that holds a name in EBX, ECX, EDX."""
    raw = struct.pack("<3I", registers.ebx, registers.ecx, registers.edx)
    return raw.decode("ascii", "replace").rstrip("\0 ")


def _from_cpuid(host: Host) -> tuple[str, str]:
    """Name and evidence by the hypervisor leaves; KVM may hide behind Hyper-V's at the base."""
    for base in (0x40000000, 0x40000100):
        fact = host.cpuid(base)
        if isinstance(fact, Known) and (fact.value.ebx or fact.value.ecx):
            word = signature(fact.value)
            name = SIGNATURES.get(word)
            if word == "Microsoft Hv":
                behind = host.cpuid(0x40000100)
                if isinstance(behind, Known) and signature(behind.value) == "KVMKVMKVM":
                    return "KVM", 'CPUID.40000100H says "KVMKVMKVM", below Hyper-V\'s leaves'
            if name:
                return name, f'CPUID.{base:X}H says "{word}"'
            if re.fullmatch(r"[\x20-\x7e]{3,12}", word):
                return f"a hypervisor that calls itself {word}", f'CPUID.{base:X}H says "{word}"'
    return "", ""


def _candidates(host: Host, kernel: Kernel, dmi: dict[str, str]) -> list[tuple[str, str]]:
    """Names and evidence, the surest first."""
    found = [_from_cpuid(host)]
    detected = kernel.logged(r"Hypervisor detected: ")
    if detected:
        word = detected[-1].partition("Hypervisor detected: ")[2].strip()
        names = {"Microsoft Hyper-V": "Hyper-V", "Xen PV": "Xen", "Xen HVM": "Xen"}
        found.append((names.get(word, word), f'the kernel logged "Hypervisor detected: {word}"'))
    listed = host.run(["lscpu"])
    vendor = re.search(r"^Hypervisor vendor:\s*(.{1,40})$", value_or(listed, _NOTHING).stdout, re.M)
    if vendor:
        names = {"Microsoft": "Hyper-V", "Oracle": "VirtualBox"}
        found.append((names.get(vendor[1], vendor[1]), f"lscpu says {vendor[1]}"))
    for key, value in dmi.items():
        for word, name in _DMI_WORDS:
            if word.lower() in value.lower() and not value.lower().endswith(".metal"):
                found.append((name, f'DMI {key} is "{value}"'))
    return [(name, why) for name, why in found if name]


def _hypervisor(
    host: Host, kernel: Kernel, processor: Processor, dmi: dict[str, str]
) -> tuple[Fact[str], tuple[str, ...]]:
    flag = processor.has("hypervisor") if processor.x86 else None
    evidence: list[str] = []
    if flag is False:
        return Absent("the processor's hypervisor flag"), ("no hypervisor flag",)
    if flag is None and processor.x86 and not isinstance(processor.flags, Known):
        return processor.flags, ()
    candidates = _candidates(host, kernel, dmi) if processor.x86 else []
    if not candidates and not processor.x86:
        return _other_architecture(host)
    if flag:
        evidence.append("the processor shows the hypervisor flag")
    if not candidates:
        return Known("a hypervisor that does not say its name", evidence[0]), tuple(evidence)
    evidence += [why for _, why in candidates]
    return Known(candidates[0][0], candidates[0][1]), tuple(dict.fromkeys(evidence))


def _other_architecture(host: Host) -> tuple[Fact[str], tuple[str, ...]]:
    """Away from x86 there is no CPUID: the device tree and the log have to tell."""
    below = re.search(r"^VM00 Control Program:\s*(\S[^\n]{0,40})", _sysinfo(host), re.M)
    if below:
        program = "KVM" if below[1].startswith("KVM") else below[1].strip()
        return Known(program, "/proc/sysinfo"), (f"/proc/sysinfo: {below[0].strip()}",)
    compatible = host.read_line("/proc/device-tree/hypervisor/compatible")
    if isinstance(compatible, Known):
        return Known(compatible.value, compatible.source), (f"device tree: {compatible.value}",)
    vendor = host.read_line("/sys/class/dmi/id/sys_vendor")
    if isinstance(vendor, Known) and "QEMU" in vendor.value:
        return Known("KVM or QEMU TCG", vendor.source), (f'DMI sys_vendor is "{vendor.value}"',)
    return Absent("device tree and DMI"), ("neither the device tree nor DMI name a hypervisor",)


def _sysinfo(host: Host) -> str:
    """IBM Z tells the levels here; no other architecture has the file."""
    return value_or(host.read_text("/proc/sysinfo"), "")


def _dmi(host: Host) -> dict[str, str]:
    """DMI's strings that are no secrets."""
    found = {}
    for key in (*_DMI, "chassis_asset_tag"):
        value = value_or(host.read_line(f"/sys/class/dmi/id/{key}"), "")
        if value and (key != "chassis_asset_tag" or value in (AZURE_ASSET_TAG, "OracleCloud.com")):
            found[key] = value[:80]
    return found


def _cloud(dmi: dict[str, str]) -> Cloud | None:
    return next((c for c in CLOUDS if dmi.get(c.field, "").startswith(c.beginning)), None)


def _container(host: Host) -> Fact[str]:
    """The container manager.  A marker in an image that was booted as a machine does not count:
    there, process 2 is the kernel's own thread daemon."""
    if value_or(host.read_line("/proc/2/comm"), "") == "kthreadd":
        return Absent("process 2 is kthreadd")
    told = host.read_line("/run/systemd/container")
    if isinstance(told, Known) and told.value:
        return told
    environment = value_or(host.read_text("/proc/1/environ"), "")
    match = re.search(r"(?:^|\0)container=([\w-]{1,32})", environment)
    if match:
        return Known(match[1], "/proc/1/environ")
    for path, name in (("/.dockerenv", "docker"), ("/run/.containerenv", "podman")):
        if value_or(host.exists(path), False):
            return Known(name, path)
    groups = value_or(host.read_text("/proc/1/cgroup"), "")
    match = re.search(r"/(docker|kubepods|lxc|libpod|crio)\b", groups)
    return Known(match[1], "/proc/1/cgroup") if match else Absent("no sign of a container")


def _wsl(kernel: Kernel) -> Fact[str]:
    if not isinstance(kernel.release, Known):
        return kernel.release
    release = kernel.release.value
    if "microsoft" not in release.lower():
        return Absent("kernel release")
    return Known("WSL2" if "WSL2" in release else "WSL1", f"kernel release {release}")


def _confidential(host: Host, kernel: Kernel, processor: Processor) -> Fact[str]:
    if processor.has("tdx_guest") or value_or(host.exists("/dev/tdx_guest"), False):
        return Known("Intel TDX", "tdx_guest")
    lines = kernel.logged(r"Memory Encryption Features active: .*SEV|tdx: Guest detected")
    if lines:
        sev = re.findall(r"SEV(?:-ES|-SNP)?", lines[-1])
        return Known(f"AMD {sev[-1]}" if sev else "Intel TDX", "the kernel log")
    if value_or(host.exists("/dev/sev-guest"), False):
        return Known("AMD SEV-SNP", "/dev/sev-guest")
    return Absent("no sign of SEV or TDX")


def _kvm_features(host: Host, hypervisor: Fact[str]) -> Fact[int]:
    """KVM's feature leaf follows its signature leaf, which Hyper-V's leaves may push up."""
    if value_or(hypervisor, "") != "KVM":
        return Absent("KVM is not below")
    for base in (0x40000000, 0x40000100):
        leaf = host.cpuid(base)
        if isinstance(leaf, Known) and signature(leaf.value) == "KVMKVMKVM":
            return then(host.cpuid(base + 1), lambda registers: registers.eax)
    return Unknown("CPUID", "KVM's leaves were not read", "run it on that machine, or as root")


def place(host: Host, kernel: Kernel, processor: Processor) -> Place:
    """Find out where we are."""
    dmi = _dmi(host) if processor.x86 else {}
    hypervisor, evidence = _hypervisor(host, kernel, processor, dmi)
    return Place(
        hypervisor=hypervisor,
        evidence=evidence,
        dmi=dmi,
        container=_container(host),
        wsl=_wsl(kernel),
        confidential=_confidential(host, kernel, processor),
        cloud=_cloud(dmi),
        timing=host.timing(),
        kvm_features=_kvm_features(host, hypervisor),
    )
