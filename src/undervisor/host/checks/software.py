"""QEMU, libvirt and what they give their guests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from undervisor.host.checks.finding import Finding, Kind, Layer, Level
from undervisor.host.fact import Absent, Known
from undervisor.host.facts.machine import Machine
from undervisor.host.facts.software import Domain, Guest
from undervisor.host.facts.version import Version

_L = Layer.SOFTWARE

QEMU = Kind("qemu", _L, Level.OK, "QEMU is installed", "Its version is what migration depends on.")
QEMU_MISSING = Kind(
    "qemu-missing", _L, Level.NOTE, "No QEMU was found",
    "Other VMMs (Firecracker, Cloud Hypervisor, crosvm) use /dev/kvm without it.",
    "Install it if guests are to be started with QEMU or libvirt (Debian: qemu-system-x86; "
    "Fedora: qemu-kvm).",
)  # fmt: skip
QEMU_OLD = Kind(
    "qemu-old", _L, Level.WARN, "This QEMU can't save nested guests",
    "QEMU learned to save and migrate the nested state of VMX in 4.2 and of SVM in 5.2. Older ones "
    "refuse, or lose the state.",
    "Update QEMU to 4.2 (Intel) or 5.2 (AMD) or later.",
    ("Linux Documentation, Running nested guests with KVM",
     "qemu-devel 2020-11, Set proper nested state format for SVM"),
)  # fmt: skip
QEMU_UNKNOWN = Kind(
    "qemu-unknown", _L, Level.UNKNOWN, "QEMU's version is not known", "It did not say it.",
    "qemu-system-x86_64 --version",
)  # fmt: skip
LIBVIRT = Kind("libvirt", _L, Level.OK, "libvirt is installed", "Its domains were looked at.")
DOMAINS_UNKNOWN = Kind(
    "domains-unknown", _L, Level.UNKNOWN, "libvirt's domains are not known",
    "virsh is installed but could not list them.",
    "Start libvirtd (or virtqemud) and be in the group libvirt: virsh -c qemu:///system list",
)  # fmt: skip
HOST_MODEL = Kind(
    "domain-host-model", _L, Level.NOTE, "host-model may drop the extension",
    "libvirt's host-model picks the nearest named model; on several processors (EPYC among them) "
    "the result lacks svm or vmx, so the guest has no /dev/kvm.",
    "For a guest that is to be an L1: <cpu mode='host-passthrough'/>, or add "
    "<feature policy='require' name='{flag}'/>.",
    ("kubevirt/kubevirt#10508",),
)  # fmt: skip
NAMED_MODEL = Kind(
    "domain-named-model", _L, Level.NOTE, "Domains whose CPU model lacks the extension",
    "A named model (and QEMU's default) has neither vmx nor svm unless the feature is required.",
    "For a guest that is to be an L1: <cpu mode='host-passthrough'/>, or "
    "<feature policy='require' name='{flag}'/>; then stop and start it.",
    ("lago-project/lago#652",),
)  # fmt: skip
DOMAIN_DISABLES = Kind(
    "domain-disables-extension", _L, Level.NOTE, "Domains that switch the extension off",
    "The feature is disabled or forbidden by name, which is right for a guest that is no L1.",
    "For a guest that is to be an L1: remove <feature policy='disable' name='{flag}'/>.",
)  # fmt: skip
LIBVIRT_WITHOUT_KVM = Kind(
    "libvirt-without-kvm", _L, Level.WARN, "libvirt believes that this machine has no KVM",
    "libvirt offers only emulated domains. It asks QEMU once and keeps the answer: after KVM was "
    "repaired, or /dev/kvm was opened to it, the old answer stays until it is asked anew.",
    "sudo systemctl restart libvirtd (or virtqemud); if that is not enough, remove "
    "/var/cache/libvirt/qemu/capabilities first. Is QEMU's user in the group of /dev/kvm?",
)  # fmt: skip
EMULATED = Kind(
    "domain-emulated", _L, Level.WARN, "Domains that run emulated",
    "type='qemu' means TCG: no KVM, whatever the host can.",
    "Set <domain type='kvm'>.",
)  # fmt: skip
GUEST_EMULATED = Kind(
    "guest-emulated", _L, Level.WARN, "Running guests that do not use KVM",
    "Their QEMU neither asks for KVM nor holds a KVM virtual machine: they run under TCG.",
    "Start them with -accel kvm, which fails loudly where KVM is not usable.",
)  # fmt: skip
GUEST_WITHOUT = Kind(
    "guest-without-extension", _L, Level.NOTE, "Running guests whose CPU lacks the extension",
    "They were started by QEMU itself with a named CPU model that does not ask for it.",
    "For a guest that is to be an L1: -cpu host, or -cpu MODEL,+{flag}.",
)  # fmt: skip
ENTRY_FAILED = Kind(
    "entry-failed", _L, Level.WARN, "The processor refused to enter a guest",
    "The message stands for KVM_EXIT_FAIL_ENTRY: the state that L1 wrote breaks a "
    "rule of VM entry, or the level below judges it wrongly. 0x80000021 means invalid guest state; "
    "0x0 and 0x7 in a nested guest point at the level below.",
    "In L1 load kvm_intel with dump_invalid_vmcs=1 (kvm_amd: dump_invalid_vmcb=1), repeat, give "
    "the dump to `undervisor explain`; report it with `undervisor report`.",
    ("Intel SDM, VM-Entry Failures During or After Loading Guest State",),
)  # fmt: skip


def check(machine: Machine) -> Iterator[Finding]:
    """Findings about virtualization software."""
    yield from _qemu(machine)
    software = machine.software
    if isinstance(software.libvirt, Known):
        yield LIBVIRT.found(f"libvirt {software.libvirt.value}")
        known = software.capabilities
        if isinstance(known, Known) and known.value.domain != "kvm":
            yield LIBVIRT_WITHOUT_KVM.found(f"domcapabilities: <domain>{known.value.domain}")
        if isinstance(software.domains, Known):
            yield from _domains(machine, software.domains.value)
        elif not isinstance(software.domains, Absent):
            yield DOMAINS_UNKNOWN.found(software.domains)
    if isinstance(software.guests, Known):
        without = [g for g in software.guests.value if not g.wants_kvm and g.holds_kvm is not True]
        if without:
            yield GUEST_EMULATED.found(*(_named(guest) for guest in without[:5]))
    yield from _guests_without(machine)
    failed = [*software.failed_entries, *machine.kernel.logged(r"KVM: entry failed")]
    if failed:
        yield ENTRY_FAILED.found(*failed)


def _named(guest: Guest) -> str:
    """A guest by its name, where it has one, and its process."""
    number = f"pid {guest.pid}"
    return number if guest.name == number else f"{guest.name} ({number})"


def _guests_without(machine: Machine) -> Iterator[Finding]:
    """Guests that libvirt does not tell about; of the others the domains say it."""
    flag, software = machine.processor.extension, machine.software
    if isinstance(software.domains, Known) or flag not in ("vmx", "svm"):
        return
    guests: tuple[Guest, ...] = software.guests.value if isinstance(software.guests, Known) else ()
    lacking = [g for g in guests if g.wants_kvm and not g.has(flag)]
    if lacking:
        told = (f"{g.name}: -cpu {g.cpu or '(none)'}" for g in lacking[:5])
        yield GUEST_WITHOUT.found(*told, flag=flag)


def _qemu(machine: Machine) -> Iterator[Finding]:
    qemu = machine.software.qemu
    if isinstance(qemu, Absent):
        yield QEMU_MISSING.found()
    elif not isinstance(qemu, Known):
        yield QEMU_UNKNOWN.found(qemu)
    else:
        floor = Version(5, 2) if machine.processor.extension == "svm" else Version(4, 2)
        yield (QEMU_OLD if qemu.value < floor else QEMU).found(f"QEMU {qemu.value}")


def _names(domains: Iterable[Domain]) -> tuple[str, ...]:
    """Domains by name, the model beside it; many are counted."""
    told = [f"{d.name}: {d.model or d.mode or 'no <cpu>'}" for d in domains]
    return (*told[:5], *([f"and {len(told) - 5} more"] if len(told) > 5 else []))


def _domains(machine: Machine, domains: tuple[Domain, ...]) -> Iterator[Finding]:
    flag = machine.processor.extension
    emulated = [d for d in domains if d.type == "qemu"]
    if emulated:
        yield EMULATED.found(*_names(emulated))
    real = [d for d in domains if d.type == "kvm"]
    if not flag or flag == "sie":
        return
    groups = (
        (HOST_MODEL, [d for d in real if machine.software.gives(d, flag) is None]),
        (DOMAIN_DISABLES, [d for d in real if d.features.get(flag) in ("disable", "forbid")]),
        (
            NAMED_MODEL,
            [
                d
                for d in real
                if machine.software.gives(d, flag) is False and flag not in d.features
            ],
        ),
    )
    for kind, found in groups:
        if found:
            yield kind.found(*_names(found), flag=flag)
