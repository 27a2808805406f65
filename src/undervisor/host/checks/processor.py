"""The processor: the extension itself, and the features that L1 will lack."""

from __future__ import annotations

from collections.abc import Iterator

from undervisor.host.checks.finding import Finding, Kind, Layer, Level
from undervisor.host.checks.firmware import switched_off
from undervisor.host.checks.place import explained_by_place, extension_missing
from undervisor.host.fact import Absent, Known, value_or
from undervisor.host.facts.machine import Machine

_L = Layer.PROCESSOR

FLAG = Kind(
    "virtualization-flag", _L, Level.OK, "The processor has the virtualization extension",
    "The kernel shows the flag vmx, svm or sie.",
)  # fmt: skip
NONE = Kind(
    "no-virtualization", _L, Level.FAIL, "The processor shows no virtualization extension",
    "On bare metal the flag is missing because the processor has no such extension or because the "
    "firmware switched it off and the kernel hides it.",
    "Enable Intel VT-x or AMD SVM Mode in the firmware setup. If there is no such entry, the "
    "processor model has none: look it up at its vendor.",
)  # fmt: skip
_HOW = {
    "KVM": "In the KVM host: undervisor check there; nested on (undervisor enable), and for this "
    "guest CPU model host-passthrough (QEMU -cpu host), or a named model with the {flag} feature "
    "required: <feature policy='require' name='{flag}'/>. Then stop and start the guest: a reboot "
    "inside keeps the old CPU.",
    "QEMU TCG": "QEMU's emulation has no VMX. For an emulated SVM: -cpu max or -cpu EPYC,+svm. For "
    "hardware nesting use -accel kvm.",
    "VMware": 'In the .vmx file: vhv.enable = "TRUE" (Expose hardware assisted virtualization to '
    "the guest OS), with virtualization-based security of the host off.",
    "Hyper-V": "On the host, with the machine off: Set-VMProcessor -VMName NAME "
    "-ExposeVirtualizationExtensions $true",
    "VirtualBox": "VBoxManage modifyvm NAME --nested-hw-virt on",
    "Xen": "nestedhvm=1 in the domain's configuration (experimental in Xen).",
    "Parallels": "prlctl set NAME --nested-virt on",
}

L0_HIDES = Kind(
    "l0-hides-virtualization", _L, Level.FAIL, "The hypervisor below hides the extension",
    "The layer to change is the one below: this guest's CPU model there lacks the extension, or "
    "nested is off there. Nothing in this machine can change it; a module that fails to load and a "
    "missing /dev/kvm are consequences.",
    "{how}",
    ("Linux Documentation, Running nested guests with KVM",),
    variants=tuple(_HOW.items()),
)  # fmt: skip
SIE_MISSING = Kind(
    "sie-missing", _L, Level.FAIL, "This machine has no SIE",
    "Without the interpretive-execution facility KVM can't run. In an LPAR it is always there; a "
    "KVM guest gets it only while nested is on in its host.",
    "In the host below: modprobe kvm nested=1 (hpage must be 0), and a guest CPU with sie "
    "(host-model or host-passthrough).",
    ("Linux Documentation, Running nested guests with KVM (s390x)",),
)  # fmt: skip
FLAGS_UNKNOWN = Kind(
    "flags-unknown", _L, Level.UNKNOWN, "The processor's flags could not be read",
    "/proc/cpuinfo is missing, unreadable or not in a form that we know.",
    "Make /proc/cpuinfo readable.", decides=True,
)  # fmt: skip
EPT_MISSING = Kind(
    "ept-missing", _L, Level.WARN, "The processor shows no nested paging",
    "Without it every guest page-table change exits. Nested guests are then many times slower, "
    "and some L1 hypervisors (Hyper-V, and VMMs that need unrestricted guests) refuse to run.",
    "On bare metal the processor is too old. In a guest, let the hypervisor below pass ept or npt "
    "on: CPU model host-passthrough, and kvm_intel ept=1 or kvm_amd npt=1 there.",
)  # fmt: skip
FEATURES_MISSING = Kind(
    "features-missing", _L, Level.NOTE, "Features that speed up or complete nesting are missing",
    "L1's hypervisor works without them, with more exits or with fewer guest modes.",
    "In a guest: CPU model host-passthrough below, and a newer kernel there.",
    ("Linux Documentation, KVM module parameters",),
)  # fmt: skip

_FEATURES = {
    "vmx": ("vpid", "vnmi", "flexpriority", "unrestricted_guest"),
    "svm": ("nrip_save", "flushbyasid", "decodeassists", "vgif", "v_vmsave_vmload"),
}
_NAMES = {"flushbyasid": "flush by ASID", "v_vmsave_vmload": "virtual VMLOAD and VMSAVE"}


def how_below(machine: Machine) -> str:
    """What to do in the hypervisor below so that it passes the extension on."""
    name = value_or(machine.place.hypervisor, "")
    text = _HOW.get(
        name.split(" or ")[0], "Switch nested virtualization on in {name} for this guest."
    )
    return text.format(flag=machine.processor.extension, name=name)


def check(machine: Machine) -> Iterator[Finding]:
    """Findings about the processor."""
    processor = machine.processor
    if not isinstance(processor.flags, Known):
        yield FLAGS_UNKNOWN.found(processor.flags)
        return
    if not processor.extension:
        if processor.x86:
            yield FLAGS_UNKNOWN.found(f"unknown vendor {value_or(processor.vendor, '?')!r:.60}")
        return
    if extension_missing(machine):
        yield from _missing(machine)
        return
    count = f"on {processor.count} processors" if processor.count else ""
    yield FLAG.found(processor.extension, processor.name, count)
    if processor.x86:
        yield from _features(machine)


def _missing(machine: Machine) -> Iterator[Finding]:
    processor = machine.processor
    evidence = (f"no {processor.extension} flag", processor.name and f"processor: {processor.name}")
    if processor.extension == "sie":
        yield SIE_MISSING.found(*evidence)
    elif explained_by_place(machine):
        return
    elif isinstance(machine.place.hypervisor, Absent):
        if not switched_off(machine):
            yield NONE.found(*evidence)
    else:
        yield L0_HIDES.found(*evidence, how=how_below(machine))


def _features(machine: Machine) -> Iterator[Finding]:
    processor = machine.processor
    paging = {"vmx": "ept", "svm": "npt"}[processor.extension]
    if processor.has(paging) is False:
        yield EPT_MISSING.found(f"no {paging} flag")
    told = processor.vmx_flags or processor.extension == "svm"
    wanted = [f for f in _FEATURES[processor.extension] if told or f != "unrestricted_guest"]
    lacking = [_NAMES.get(f, f) for f in wanted if processor.has(f) is False]
    if lacking:
        yield FEATURES_MISSING.found("missing: " + ", ".join(lacking))
