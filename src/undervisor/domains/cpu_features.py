"""CPU features as guides, /proc/cpuinfo, libvirt and QEMU name them, and which must stay on."""

from __future__ import annotations

import re

from undervisor.domains.safe_xml import parse
from undervisor.errors import BadInput
from undervisor.host.access.protocol import Host
from undervisor.host.fact import Fact, then

VMX_NAMES = {
    "ept": "vmx-ept",
    "ept_ad": "vmx-eptad",
    "vpid": "vmx-vpid",
    "unrestricted_guest": "vmx-unrestricted-guest",
    "flexpriority": "vmx-flexpriority",
    "vnmi": "vmx-vnmi",
    "tpr_shadow": "vmx-flexpriority",
    "shadow_vmcs": "vmx-shadow-vmcs",
    "posted_intr": "vmx-posted-intr",
    "preemption_timer": "vmx-preemption-timer",
    "pml": "vmx-pml",
}
"""Names of /proc/cpuinfo's "vmx flags", which are no names of libvirt's or QEMU's, and theirs.

On AMD `vnmi` is a CPUID feature of that name.
"""

MITIGATIONS = {
    "spec-ctrl": "IBRS, IBPB: a guest kernel's protection against branch target injection",
    "ibrs": "AMD's IBRS, the same",
    "ibpb": "the barrier between a guest's own processes",
    "stibp": "keeps the sibling thread from steering branches",
    "amd-stibp": "AMD's bit for STIBP, the same",
    "ssbd": "speculative store bypass disable",
    "amd-ssbd": "AMD's bit for SSBD, the same",
    "virt-ssbd": "SSBD through the hypervisor",
    "md-clear": "VERW that clears buffers (MDS)",
    "arch-capabilities": "tells the guest which holes it need not close, and which it must",
    "flush-l1d": "L1D flush: an L1 flushes before it enters an L2",
    "pcid": "makes page-table isolation cheap enough to be left on",
    "smep": "no execution of user pages in kernel mode",
    "smap": "no access to user pages from kernel mode",
    "umip": "hides descriptor tables from user mode",
}
"""Features whose removal weakens the guest, and what each is for."""

_VENDORS = {"intel": "vmx", "genuineintel": "vmx", "amd": "svm", "authenticamd": "svm",
            "hygon": "svm", "hygongenuine": "svm"}  # fmt: skip

_MAP = "/usr/share/libvirt/cpu_map/x86_features.xml"


def extension_of(vendor: str) -> str:
    """`vmx` or `svm` by a vendor's name; BadInput for another."""
    extension = _VENDORS.get(vendor.lower())
    if extension is None:
        raise BadInput(f"{vendor!r} is no vendor that we know", hint="intel, amd")
    return extension


def libvirt_name(name: str, extension: str) -> str:
    """The name that libvirt and QEMU have for a feature, be it given in cpuinfo's words.

    Raises BadInput where it can't be a name at all.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name):
        raise BadInput(f"{name!r} is no name of a CPU feature")
    return VMX_NAMES.get(name, name) if extension == "vmx" else name


def known_to_libvirt(host: Host) -> Fact[frozenset[str]]:
    """The features of the libvirt that is installed; it refuses to start a guest with others."""
    return then(host.read_text(_MAP), _names)


def _names(text: str) -> frozenset[str]:
    try:
        root = parse(text, "cpus")
    except BadInput as error:
        raise ValueError(error.message) from error
    found = {f.get("name") or "" for f in root.iter("feature")}
    return frozenset(found | {a.get("name") or "" for a in root.iter("alias")})
