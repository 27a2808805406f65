"""QEMU and libvirt on the machine, the domains they define and the guests that run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lxml import etree

from undervisor.host.access.protocol import Host, Output
from undervisor.host.fact import Absent, Denied, Fact, Known, Unknown, then, value_or
from undervisor.host.facts.version import Version, parse_version

QEMU_BINARIES = ("qemu-system-{arch}", "qemu-system-{arch}-microvm", "/usr/libexec/qemu-kvm", "kvm")
"""Where distributions put QEMU, the first that answers counts."""

DOMAIN_LIMIT = 200
"""Domains to look at; more are counted, not read."""

ENTRY_FAILED = r"KVM: entry failed, hardware error|KVM_EXIT_FAIL_ENTRY"


@dataclass(frozen=True, slots=True)
class Domain:
    """What libvirt's XML says about a guest, as far as nesting goes."""

    name: str
    type: str
    mode: str
    model: str
    features: dict[str, str]
    memory_limit: bool
    cpu_limit: bool
    networks: tuple[str, ...]
    bridges: tuple[str, ...]

    def gives(self, flag: str, host_model: Mapping[str, str] | None = None) -> bool | None:
        """Whether its guest gets `flag`; None where the model decides and we can't tell.

        `host_model` are the feature policies that libvirt's host-model has on this machine.
        """
        policy = self.features.get(flag)
        if policy in ("require", "force"):
            return True
        if policy in ("disable", "forbid"):
            return False
        if self.mode in ("host-passthrough", "maximum"):
            return True
        if self.mode == "host-model":
            known = {"require": True, "disable": False}
            return known.get((host_model or {}).get(flag, ""))
        return False


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What libvirt says it can give: the domain type (kvm or qemu) and host-model's features."""

    domain: str
    host_model: dict[str, str]


@dataclass(frozen=True, slots=True)
class Guest:
    """A running QEMU: what its command line asks for, and whether it holds /dev/kvm's file."""

    pid: int
    name: str
    cpu: str
    wants_kvm: bool
    holds_kvm: bool | None

    def has(self, flag: str) -> bool:
        """Whether its -cpu option gives it `flag`."""
        words = self.cpu.split(",")
        if f"-{flag}" in words or f"{flag}=off" in words:
            return False
        return words[0] in ("host", "max") or bool({f"+{flag}", f"{flag}=on", flag} & set(words))


@dataclass(frozen=True, slots=True)
class Software:
    """Versions, domains and running guests."""

    qemu: Fact[Version]
    libvirt: Fact[Version]
    domains: Fact[tuple[Domain, ...]]
    networks: dict[str, bool] = field(default_factory=dict)
    guests: Fact[tuple[Guest, ...]] = field(default_factory=lambda: Absent("qemu"))
    failed_entries: tuple[str, ...] = ()
    capabilities: Fact[Capabilities] = field(default_factory=lambda: Absent("virsh"))

    def gives(self, domain: Domain, flag: str) -> bool | None:
        """Whether a domain's guest gets `flag`, with what libvirt says about host-model."""
        known = self.capabilities
        return domain.gives(flag, known.value.host_model if isinstance(known, Known) else None)


def parse_xml(text: str) -> etree._Element:
    """XML without entities, network or huge trees; ValueError where it is none."""
    parser = etree.XMLParser(resolve_entities=False, no_network=True, huge_tree=False)
    try:
        return etree.fromstring(text.encode(), parser)
    except etree.XMLSyntaxError as error:
        raise ValueError(str(error)[:200]) from error


def parse_domain(text: str) -> Domain:
    """The nesting side of a domain's XML."""
    root = parse_xml(text)
    if root.tag != "domain":
        raise ValueError(f"<{str(root.tag)[:40]}> is not a domain")
    cpu = root.find("cpu")
    features = {} if cpu is None else {
        f.get("name", ""): f.get("policy", "require") for f in cpu.findall("feature")
    }  # fmt: skip
    sources = root.findall("devices/interface/source")
    return Domain(
        name=(root.findtext("name") or "?")[:80],
        type=root.get("type", ""),
        mode=""
        if cpu is None
        else cpu.get("mode", "custom" if cpu.find("model") is not None else ""),
        model="" if cpu is None else (cpu.findtext("model") or "").strip(),
        features=features,
        memory_limit=root.find("memtune/hard_limit") is not None,
        cpu_limit=any(
            root.find(f"cputune/{tag}") is not None for tag in ("quota", "shares", "vcpupin")
        ),
        networks=tuple(n for s in sources if (n := s.get("network"))),
        bridges=tuple(b for s in sources if (b := s.get("bridge") or s.get("dev"))),
    )


def parse_capabilities(text: str) -> Capabilities:
    """The document of `virsh domcapabilities`."""
    root = parse_xml(text)
    if root.tag != "domainCapabilities":
        raise ValueError(f"<{str(root.tag)[:40]}> are no domain capabilities")
    features = root.findall("cpu/mode[@name='host-model']/feature")
    policies = {f.get("name", ""): f.get("policy", "") for f in features}
    return Capabilities((root.findtext("domain") or "").strip(), policies)


def _isolated(text: str) -> bool:
    """A libvirt network without <forward> reaches nothing outside."""
    return parse_xml(text).find("forward") is None


def split_command(command: str) -> list[str]:
    """The words of a command line as ps prints it, which is ambiguous where words hold spaces."""
    try:
        return shlex.split(command)
    except ValueError:
        return command.split()


def parse_guest(pid: int, words: list[str]) -> Guest | None:
    """A QEMU command line; None where it is another program."""
    program = words[0].rsplit("/", 1)[-1] if words else ""
    if not re.fullmatch(r"qemu-system-\w+(-microvm)?|qemu-kvm|kvm", program):
        return None
    options = dict(zip(words[1:], [*words[2:], ""], strict=True))
    accel = f"{options.get('-accel', '')} {options.get('-machine', '')} {options.get('-M', '')}"
    wants = "-enable-kvm" in options or re.search(r"(?:^|accel=|:)kvm\b", accel) is not None
    name = re.sub(r"^guest=|,.*$", "", options.get("-name", f"pid {pid}"))
    return Guest(pid, name[:80], options.get("-cpu", "")[:2000], wants or program == "kvm", None)


def _holds_kvm(host: Host, pid: int) -> bool | None:
    fact = host.run(["ls", "-l", f"/proc/{pid}/fd"])
    if not isinstance(fact, Known) or fact.value.status:
        return None
    return "anon_inode:kvm-vm" in fact.value.stdout or "/dev/kvm" in fact.value.stdout


def processes(host: Host) -> Fact[Output]:
    """Process numbers and command lines, from procps or else from BusyBox's ps."""
    fact = host.run(["ps", "-eww", "-o", "pid=", "-o", "args="])
    if isinstance(fact, Known) and fact.value.status:
        return host.run(["ps", "-o", "pid,args"])
    return fact


def _guest(host: Host, pid: int, words: list[str]) -> Guest | None:
    """One guest; its own list of words is exact, where ps may cut the line at a terminal's end."""
    raw = host.read_bytes(f"/proc/{pid}/cmdline")
    if isinstance(raw, Known) and raw.value:
        words = raw.value.decode("utf-8", "replace").rstrip("\0").split("\0")
    guest = parse_guest(pid, words)
    return replace(guest, holds_kvm=_holds_kvm(host, pid)) if guest else None


def _guests(host: Host) -> Fact[tuple[Guest, ...]]:
    fact = processes(host)
    if isinstance(fact, Known) and fact.value.status:
        return Unknown("ps", fact.value.stderr.strip()[:100] or "failed")
    found = []
    for line in value_or(fact, _NOTHING).stdout.splitlines():
        pid, _, command = line.strip().partition(" ")
        if pid.isdigit() and len(pid) < 9 and parse_guest(int(pid), split_command(command)):
            guest = _guest(host, int(pid), split_command(command))
            if guest:
                found.append(guest)
    return then(fact, lambda _: tuple(found))


_NOTHING = Output(1, "")


def _version(host: Host, argv: list[str]) -> Fact[Version]:
    fact = host.run(argv)
    if isinstance(fact, Known) and fact.value.status:
        return Unknown(argv[0], f"status {fact.value.status}")
    return then(fact, lambda output: parse_version(output.stdout))


def _qemu(host: Host, architecture: str) -> Fact[Version]:
    names = [binary.format(arch=architecture) for binary in QEMU_BINARIES]
    facts = [_version(host, [name, "--version"]) for name in names]
    # The first that tells its version; else the first that is there and does not.
    for kind in (Known, Unknown, Denied):
        for fact in facts:
            if isinstance(fact, kind):
                return fact
    return Absent(", ".join(names))


def _virsh(host: Host, *words: str) -> Fact[str]:
    fact = host.run(["virsh", "-r", "-c", "qemu:///system", *words])
    if isinstance(fact, Known) and fact.value.status:
        lines = fact.value.stderr.strip().splitlines()
        return Unknown("virsh", lines[-1][:200] if lines else f"status {fact.value.status}")
    return then(fact, lambda output: output.stdout)


def _domains(host: Host) -> Fact[tuple[Domain, ...]]:
    names = _virsh(host, "list", "--all", "--name")
    if not isinstance(names, Known):
        return names
    found = []
    for name in [n.strip() for n in names.value.splitlines() if n.strip()][:DOMAIN_LIMIT]:
        domain = then(_virsh(host, "dumpxml", "--", name), parse_domain)
        if isinstance(domain, Known):
            found.append(domain.value)
    return Known(tuple(found), names.source)


def _capabilities(host: Host, libvirt: Fact[Version]) -> Fact[Capabilities]:
    if not isinstance(libvirt, Known):
        return Absent("virsh")
    return then(_virsh(host, "domcapabilities"), parse_capabilities)


def _networks(host: Host, domains: Fact[tuple[Domain, ...]]) -> dict[str, bool]:
    """Networks that domains use, and whether each is isolated."""
    names = dict.fromkeys(name for domain in value_or(domains, ()) for name in domain.networks)
    told = {name: then(_virsh(host, "net-dumpxml", "--", name), _isolated) for name in names}
    return {name: fact.value for name, fact in told.items() if isinstance(fact, Known)}


def _failed_entries(host: Host) -> tuple[str, ...]:
    """Lines in libvirt's logs of guests that the processor refused to enter."""
    folder = "/var/log/libvirt/qemu"
    found: list[str] = []
    for name in value_or(host.listdir(folder), ())[:50]:
        if name.endswith(".log"):
            text = value_or(host.read_text(f"{folder}/{name}"), "")
            found += [f"{name}: {line.strip()[:160]}" for line in text.splitlines()
                      if re.search(ENTRY_FAILED, line[:1000])]  # fmt: skip
    return tuple(found[-3:])


def software(host: Host, architecture: str) -> Software:
    """Read the facts of virtualization software."""
    libvirt = _version(host, ["virsh", "--version"])
    domains: Fact[tuple[Domain, ...]] = Absent("virsh")
    if isinstance(libvirt, Known):
        domains = _domains(host)
    return Software(
        qemu=_qemu(host, architecture or "x86_64"),
        libvirt=libvirt,
        domains=domains,
        networks=_networks(host, domains),
        guests=_guests(host),
        failed_entries=_failed_entries(host),
        capabilities=_capabilities(host, libvirt),
    )
