"""Named ways around what a level below does wrong, each with its reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from undervisor.domains.model import AddressBits, Guest, Policy
from undervisor.errors import BadInput

_WIDTHS = range(32, 53)
"""Physical-address widths that CPUID.80000008H can report and processors have."""


@dataclass(frozen=True, slots=True)
class Workaround:
    """`takes` says what the value is: empty for none, in brackets where it may be left out."""

    name: str
    what: str
    why: str
    takes: str
    apply: Callable[[Guest, str], Guest]


def _without(feature: str) -> Callable[[Guest, str], Guest]:
    def apply(guest: Guest, value: str) -> Guest:
        return replace(guest, cpu=guest.cpu.with_feature(feature, Policy.DISABLE))

    return apply


def _width(text: str) -> int:
    if not text.isdigit() or len(text) > 2 or int(text) not in _WIDTHS:
        raise BadInput(f"{text!r} is no physical-address width", hint="32 to 52 bits")
    return int(text)


def _phys_bits(guest: Guest, value: str) -> Guest:
    return replace(guest, cpu=replace(guest.cpu, address_bits=AddressBits(False, _width(value))))


def _host_phys_bits(guest: Guest, value: str) -> Guest:
    limit = _width(value) if value else 0
    return replace(guest, cpu=replace(guest.cpu, address_bits=AddressBits(True, limit=limit)))


WORKAROUNDS = {
    w.name: w
    for w in (
        Workaround(
            "xsaves", "the guest has no XSAVES and XRSTORS",
            "Where L0 withholds the VM-execution control \"enable XSAVES/XRSTORS\" although it "
            "gives the instructions, a system that an L1 hypervisor takes over while it runs gets "
            "#UD from the XSAVES that it had chosen at its start. Without the feature it never "
            "chooses it. XSAVE itself needs no control, so this is enough.",
            "", _without("xsaves"),
        ),
        Workaround(
            "xsave", "the guest has no XSAVE at all, hence no AVX",
            "As with xsaves, for L1 hypervisors that handle no extended state at all. It costs AVX "
            "and all that needs it; try xsaves first.",
            "", _without("xsave"),
        ),
        Workaround(
            "phys-bits", "the guest sees physical addresses of BITS bits",
            "QEMU's named models say 40 bits, whatever the host has. An L1 that checks its VMCS or "
            "its page tables by that width then accepts addresses that the processor refuses, or "
            "refuses what it accepts. BITS must not be more than the host's.",
            "BITS", _phys_bits,
        ),
        Workaround(
            "host-phys-bits", "the guest sees the host's physical-address width, at most BITS",
            "QEMU's named models say 40 bits; host-passthrough has the host's width by itself. "
            "Where the guest moves between hosts of different widths set BITS to the smallest.",
            "[BITS]", _host_phys_bits,
        ),
    )
}  # fmt: skip
"""By their names."""


def work_around(guest: Guest, word: str) -> tuple[Guest, str]:
    """Apply `NAME` or `NAME=VALUE`: the guest, and why.  Raises BadInput."""
    name, equals, value = word.partition("=")
    found = WORKAROUNDS.get(name)
    if found is None:
        raise BadInput(f"there is no workaround {name!r}", hint=", ".join(WORKAROUNDS))
    optional = found.takes.startswith("[")
    if (equals and not value) or (bool(value) != bool(found.takes) and not optional):
        form = f"{name}={found.takes}" if found.takes else name
        raise BadInput(f"{word!r} is not how this workaround is named", hint=form)
    return found.apply(guest, value), f"{found.what}: {found.why}"
