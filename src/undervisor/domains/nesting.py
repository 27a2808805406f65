"""What a domain lacks to be an L1, why, and the definition that lacks nothing.

What an operator's whole machine is told by `undervisor check` is here told about one definition, in
the same words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from undervisor.domains.cpu_features import libvirt_name
from undervisor.domains.host_topology import HostTopology
from undervisor.domains.libvirt_xml import DomainXml
from undervisor.domains.limits import Problem, Weight
from undervisor.domains.model import Guest, Mode, Policy
from undervisor.host.checks import software
from undervisor.host.checks.finding import Kind
from undervisor.host.facts.software import parse_domain

_QEMU_ADDRESS_BITS = 40
"""What QEMU's named models report unless told otherwise."""

_PARTS = {
    "vmx-ept": "L1's KVM falls back to shadow paging: slow, and known to be broken here and there",
    "vmx-vpid": "each switch between L1 and L2 flushes the TLB",
    "vmx-unrestricted-guest": "L2's real mode is emulated by L1",
    "vmx-shadow-vmcs": "each VMREAD and VMWRITE of L1 may exit to L0",
    "vmx-xsaves": "an L2 that uses XSAVES gets #UD",
    "npt": "L1's KVM falls back to shadow paging: slow, and known to be broken here and there",
    "nrip-save": "L1 must decode each instruction that exits",
    "vgif": "each CLGI and STGI exits",
    "v-vmsave-vmload": "each VMLOAD and VMSAVE exits",
}
"""Sub-features, and what their absence costs."""


@dataclass(frozen=True, slots=True)
class View:
    """What is known besides the document: the extension of the host's vendor, the policies of
    host-model there, the names that libvirt knows; None where it is not known."""

    extension: str
    host_model: Mapping[str, str] | None = None
    host: HostTopology | None = None
    known: frozenset[str] | None = None


def lacks(document: DomainXml, view: View) -> tuple[Problem, ...]:
    """Everything that keeps the guest from being a good L1; `refused` where it can't be one."""
    return tuple(problem for check in CHECKS for problem in check(document, view))


def able(guest: Guest, view: View) -> Guest:
    """The guest that lacks nothing of it."""
    cpu = guest.cpu
    for name, policy in cpu.features:
        proper = libvirt_name(name, view.extension)
        if proper != name:
            unknown = view.known is not None and proper not in view.known
            cpu = cpu.with_feature(name, None)
            cpu = cpu if unknown and policy.gives else cpu.with_feature(proper, policy)
    for name, policy in cpu.features:
        if name in _PARTS and not policy.gives:
            cpu = cpu.with_feature(name, None)
    if cpu.mode is Mode.DEFAULT:
        cpu = replace(cpu, mode=Mode.PASSTHROUGH, check="none")
    cpu = cpu.with_feature(view.extension, Policy.REQUIRE)
    return replace(guest, type="kvm", cpu=cpu)


def _from_kind(kind: Kind, weight: Weight, what: str, **words: str) -> Problem:
    remedy = kind.remedy.format(**words)
    return Problem(kind.id, weight, f"{what}: {kind.meaning}", remedy)


def _extension(document: DomainXml, view: View) -> Iterator[Problem]:
    guest = document.guest
    flag = view.extension
    gives = parse_domain(document.text).gives(flag, view.host_model)
    if gives:
        return
    called = guest.cpu.model or guest.cpu.mode or "no <cpu>"
    policy = guest.cpu.policy(flag)
    if gives is None:
        yield _from_kind(software.HOST_MODEL, Weight.WARN, f"{called} may drop {flag}", flag=flag)
    elif policy is not None:
        kind = software.DOMAIN_DISABLES
        yield _from_kind(kind, Weight.REFUSED, f"{flag} is {policy.value}d", flag=flag)
    elif guest.cpu.mode is Mode.HOST_MODEL:
        kind = software.HOST_MODEL
        yield _from_kind(kind, Weight.REFUSED, f"host-model here drops {flag}", flag=flag)
    else:
        kind = software.NAMED_MODEL
        yield _from_kind(kind, Weight.REFUSED, f"{called} gives no {flag}", flag=flag)


def _emulated(document: DomainXml, view: View) -> Iterator[Problem]:
    if document.guest.type != "qemu":
        return
    if view.extension == "vmx":
        yield _from_kind(software.EMULATED, Weight.REFUSED, "TCG emulates no VMX")
    else:
        yield _from_kind(software.EMULATED, Weight.WARN, "TCG emulates SVM, slowly")


def _names(document: DomainXml, view: View) -> Iterator[Problem]:
    for name, _ in document.guest.cpu.features:
        proper = libvirt_name(name, view.extension)
        if proper != name and (view.known is None or name not in view.known):
            comes = "it comes with vmx on host-passthrough; remove it, or "
            yield Problem(
                "feature-misnamed",
                Weight.REFUSED,
                f"{name} is a word of /proc/cpuinfo: libvirt takes the definition and refuses the "
                f'start, "unknown CPU feature: {name}"',
                f"{comes}write {proper}, where libvirt knows that (10.1 and later)",
            )
        elif view.known is not None and name not in view.known and not name.startswith("vmx-"):
            yield Problem(
                "feature-unknown",
                Weight.REFUSED,
                f"libvirt here knows no feature {name}: it refuses the start",
                "correct or remove it",
            )
        elif view.known is not None and name not in view.known:
            yield Problem(
                "feature-too-new",
                Weight.REFUSED,
                f"libvirt here is too old for {name}: it refuses the start",
                "remove it: host-passthrough gives it anyway; or update libvirt to 10.1",
            )


def _parts(document: DomainXml, view: View) -> Iterator[Problem]:
    for name, policy in document.guest.cpu.features:
        if name in _PARTS and not policy.gives:
            yield Problem(
                "sub-feature-off", Weight.WARN, f"{name} is {policy.value}d: {_PARTS[name]}",
                f"remove <feature policy='{policy.value}' name='{name}'/>",
            )  # fmt: skip


def _address_width(document: DomainXml, view: View) -> Iterator[Problem]:
    guest, host = document.guest, view.host
    bits = 0 if host is None else host.address_bits
    named = guest.cpu.mode in (Mode.CUSTOM, Mode.DEFAULT) and guest.cpu.address_bits is None
    if named and bits and bits != _QEMU_ADDRESS_BITS:
        yield Problem(
            "address-width", Weight.NOTE,
            f"a named model reports {_QEMU_ADDRESS_BITS} bits of physical address, the host has "
            f"{bits}: an L1 that checks addresses by that width is misled",
            f"--workaround phys-bits={min(bits, _QEMU_ADDRESS_BITS)} where that is less, or "
            "--workaround host-phys-bits",
        )  # fmt: skip


def _movable(document: DomainXml, view: View) -> Iterator[Problem]:
    if document.guest.migratable is False:
        yield Problem(
            "not-migratable", Weight.NOTE, "migratable='off': it can be neither moved nor saved",
            "right for speed; else remove it",
        )  # fmt: skip


CHECKS: tuple[Callable[[DomainXml, View], Iterator[Problem]], ...] = (
    _emulated, _extension, _names, _parts, _address_width, _movable,
)  # fmt: skip
