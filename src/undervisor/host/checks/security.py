"""`check --security`: who can reach the nested code, and which holes it is known to have."""

from __future__ import annotations

from collections.abc import Iterator

from undervisor.host.checks.cves import CVES, RECORDS_OF, Cve, Status, status
from undervisor.host.checks.finding import Finding, Kind, Layer, Level
from undervisor.host.fact import Known, value_or
from undervisor.host.facts.kvm import Presence
from undervisor.host.facts.machine import Machine

_L = Layer.SECURITY

CVE_KINDS: dict[str, Kind] = {
    cve.id: Kind(
        cve.id, _L, Level.FAIL, f"{cve.id}: {cve.what}",
        f"Affects {'VMX' if cve.extension == 'vmx' else 'SVM' if cve.extension else 'VMX and SVM'} "
        f"with nesting on. Fixed in {cve.fixed}"
        + (f" and in the stable releases {', '.join(cve.stable)}." if cve.stable else ".")
        + ("" if cve.listed or cve.stable else " Its record lists no stable releases."),
        "Update the kernel of this machine to a fixed release, or switch nesting off where no "
        "guest needs it: sudo undervisor disable.",
        (f"https://www.cve.org/CVERecord?id={cve.id}",),
    )
    for cve in CVES
}  # fmt: skip
CVES_UNKNOWN = Kind(
    "nested-cves-unknown", _L, Level.UNKNOWN, "Holes that the version can't rule out",
    "Distributions backport fixes without changing the version that the kernel shows, and some "
    "records name no stable releases. So these are neither open nor closed by the number alone.",
    "Look each up in the tracker of the distribution (Debian: security-tracker.debian.org, Ubuntu: "
    "ubuntu.com/security/cves, Red Hat: access.redhat.com/security, SUSE: suse.com/security/cve).",
)  # fmt: skip
CVES_FIXED = Kind(
    "nested-cves-fixed", _L, Level.OK, "All nested vulnerabilities that we know are fixed here",
    f"By the kernel's version, against the CVE records of {RECORDS_OF}.",
)  # fmt: skip
CVES_CLOSED = Kind(
    "nested-cves-unreachable", _L, Level.OK, "Nesting is off: its vulnerabilities can't be reached",
    "Guests have neither VMX nor SVM to attack with.",
)  # fmt: skip
NESTED_UNUSED = Kind(
    "nested-unused", _L, Level.WARN, "Nesting is on, and no guest is given it",
    "Kernels since 4.20 switch nesting on by default. Where nothing uses it, it is only more code "
    "for a guest with a chosen CPU model to attack.",
    "sudo undervisor disable, unless guests outside libvirt need it.",
)  # fmt: skip
OPEN_VULNERABILITIES = Kind(
    "processor-vulnerabilities", _L, Level.WARN, "The kernel calls the processor vulnerable",
    "Files in /sys/devices/system/cpu/vulnerabilities begin with \"Vulnerable\". In a guest this "
    "may only mean that the level below does not pass the mitigation's feature bits on.",
    "Update microcode and kernel, remove mitigations=off; in a guest let the level below pass on "
    "the feature bits (CPU model host-passthrough). Compare L0's files with L1's.",
    ("Linux Documentation, Hardware vulnerabilities",),
)  # fmt: skip
L1TF_OPEN = Kind(
    "l1tf-open", _L, Level.WARN, "L1TF: the L1 data cache is not flushed before guests run",
    "L0 must flush on every switch between L1 and L2, and then tells L1 that it need not "
    "(SKIP_L1DFL_VMENTRY). Without the flush a guest reads what another left in the cache.",
    "Boot with l1tf=flush (or full), or kvm-intel.vmentry_l1d_flush=cond.",
    ("Linux Documentation, L1TF, Nested virtual machines",),
)  # fmt: skip
ITLB_OPEN = Kind(
    "itlb-multihit-open", _L, Level.WARN, "iTLB multihit: huge pages of guests may be executable",
    "A guest can stop the machine. Only L0's split of huge pages protects; L1 is told that it need "
    "not split, and L2's pages are mapped by L0.",
    "kvm.nx_huge_pages=auto (the default) or force.",
    ("Linux Documentation, iTLB multihit",),
)  # fmt: skip
SMT_ON = Kind(
    "smt-on", _L, Level.NOTE, "Simultaneous multithreading is on",
    "Guests of different owners can share a core, and with it its buffers.",
    "Where guests do not trust each other: core scheduling, or nosmt on the kernel command line.",
)  # fmt: skip
DEVICE_OPEN = Kind(
    "device-world-writable", _L, Level.NOTE, "Every user may use /dev/kvm",
    "systemd's default (0666), which some distributions tighten. Every local user can "
    "reach KVM's code and pin memory.",
    "Where local users are not trusted: a udev rule KERNEL==\"kvm\", GROUP=\"kvm\", MODE=\"0660\".",
)  # fmt: skip
NO_MAC = Kind(
    "no-mandatory-access-control", _L, Level.NOTE, "Neither AppArmor nor SELinux is active",
    "libvirt uses them to keep a QEMU that was taken over inside its own files.",
    "Enable the one that the distribution supports (security=apparmor or enforcing=1).",
)  # fmt: skip
NO_LIMITS = Kind(
    "domain-without-limits", _L, Level.NOTE, "Guest hypervisors without resource limits",
    "An L1 can start any number of guests; without limits they take the host's memory and time.",
    "virsh memtune DOMAIN --hard-limit SIZE; virsh schedinfo DOMAIN --set vcpu_quota=...",
)  # fmt: skip
OPEN_NETWORK = Kind(
    "domain-network-open", _L, Level.NOTE, "Guest hypervisors on networks that are not isolated",
    "Their guests reach what the host's network reaches.",
    "Give L1 an isolated libvirt network (one without <forward>), or filter with nwfilter.",
)  # fmt: skip


def check(machine: Machine) -> Iterator[Finding]:
    """Findings about security."""
    present = machine.kvm.presence in (Presence.LOADED, Presence.BUILT_IN)
    if present and machine.processor.x86 and isinstance(machine.kvm.nested, Known):
        if machine.kvm.nested.value:
            yield from _cves(machine)
        else:
            yield CVES_CLOSED.found(machine.kvm.nested.source)
    yield from _use(machine)
    yield from _hardware(machine)
    yield from _access(machine)


def _cves(machine: Machine) -> Iterator[Finding]:
    version = machine.kernel.version
    mine = [cve for cve in CVES if cve.extension in ("", machine.processor.extension)]
    release = f"kernel {value_or(machine.kernel.release, '?')}"
    if not isinstance(version, Known):
        yield CVES_UNKNOWN.found(version)
        return
    groups: dict[Status, list[Cve]] = {state: [] for state in Status}
    for cve in mine:
        groups[status(cve, version.value, machine.kernel.flavour)].append(cve)
    for cve in groups[Status.VULNERABLE]:
        yield CVE_KINDS[cve.id].found(release, f"built from {version.value}")
    if groups[Status.UNKNOWN]:
        names = ", ".join(cve.id for cve in groups[Status.UNKNOWN])
        yield CVES_UNKNOWN.found(f"{release} is {machine.kernel.flavour.value}", names)
    elif not groups[Status.VULNERABLE]:
        yield CVES_FIXED.found(release, f"built from {version.value}")


def _use(machine: Machine) -> Iterator[Finding]:
    flag = machine.processor.extension
    domains, guests = machine.software.domains, machine.software.guests
    nested = value_or(machine.kvm.nested, False)
    if not nested or not isinstance(domains, Known) or not isinstance(guests, Known):
        return
    gives = machine.software.gives
    users = [d for d in domains.value if d.type == "kvm" and gives(d, flag) is not False]
    running = [g for g in guests.value if g.has(flag)]
    if not users and not running:
        yield NESTED_UNUSED.found(f"{len(domains.value)} domains, none is given {flag}")
    without = [d.name for d in users if not (d.memory_limit and d.cpu_limit)]
    if without:
        yield NO_LIMITS.found(", ".join(without[:5]))
    networks = machine.software.networks
    opened = [d.name for d in users if d.bridges or any(not networks.get(n) for n in d.networks)]
    if opened:
        yield OPEN_NETWORK.found(", ".join(opened[:5]))


def _hardware(machine: Machine) -> Iterator[Finding]:
    told = value_or(machine.security.vulnerabilities, {})
    bad = [f"{name}: {text[:100]}" for name, text in told.items() if text.startswith("Vulnerable")]
    if bad:
        yield OPEN_VULNERABILITIES.found(*bad)
    if "VMX: vulnerable" in told.get("l1tf", ""):
        yield L1TF_OPEN.found(f"l1tf: {told['l1tf']}")
    if "KVM: Vulnerable" in told.get("itlb_multihit", ""):
        yield ITLB_OPEN.found(f"itlb_multihit: {told['itlb_multihit']}")
    if value_or(machine.firmware.smt_active, "0") == "1":
        yield SMT_ON.found("/sys/devices/system/cpu/smt/active is 1")


def _access(machine: Machine) -> Iterator[Finding]:
    device = machine.kvm.device
    if isinstance(device, Known) and device.value.mode & 0o002:
        yield DEVICE_OPEN.found(f"/dev/kvm is {device.value.mode:04o}")
    lsm = machine.security.lsm
    if isinstance(lsm, Known):
        active = set(lsm.value.split(",")) & {"apparmor", "selinux"}
        if not active or (active == {"selinux"} and value_or(machine.security.selinux, "") == "0"):
            yield NO_MAC.found(f"/sys/kernel/security/lsm is {lsm.value}")
