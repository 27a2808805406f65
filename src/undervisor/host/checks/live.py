"""`check --live`: what KVM itself answers.  An offer is not yet a proof: no guest ran."""

from __future__ import annotations

from collections.abc import Iterator

from undervisor.host.access.protocol import KvmOffer
from undervisor.host.checks.finding import Finding, Kind, Layer, Level
from undervisor.host.fact import Fact, Known, Unknown
from undervisor.host.facts.machine import Machine

_L = Layer.LIVE

OFFERS = Kind(
    "live-kvm-offers", _L, Level.OK, "KVM answers and offers the extension to its guests",
    "KVM_GET_SUPPORTED_CPUID holds the flag, which is the reliable sign of nesting: the capability "
    "KVM_CAP_NESTED_STATE is there on AMD even while nesting is off. No guest was run.",
)  # fmt: skip
OFFERS_NOT = Kind(
    "live-kvm-offers-not", _L, Level.FAIL, "KVM answers and offers its guests no extension",
    "Its guests can't nest, whatever else looks right.",
    "See the failures of the layers above in this list; where there is none, nested is off: sudo "
    "undervisor enable.",
)  # fmt: skip
ANSWERS_NOT = Kind(
    "live-kvm-answers-not", _L, Level.FAIL, "KVM does not answer",
    "/dev/kvm could not be opened, or what opened is not KVM.",
    "See the findings about /dev/kvm and the kernel.",
)  # fmt: skip
NOT_ASKED = Kind(
    "live-kvm-not-asked", _L, Level.UNKNOWN, "KVM could not be asked",
    "Its device can't be asked from here, or what answered made no sense.",
    "Run `undervisor check --live` on that machine itself.",
)  # fmt: skip


def check(machine: Machine, offer: Fact[KvmOffer]) -> Iterator[Finding]:
    """What KVM said, held against the processor's extension."""
    if isinstance(offer, Unknown):
        yield NOT_ASKED.found(offer)
        return
    if not isinstance(offer, Known):
        yield ANSWERS_NOT.found(offer)
        return
    said = offer.value
    flag = machine.processor.extension
    told = f"API version {said.api_version}, nested state of {said.nested_state} bytes"
    offered = {"vmx": said.vmx, "svm": said.svm}.get(flag, False)
    if offered:
        yield OFFERS.found(f"{flag} is in the CPUID that KVM supports", told)
    else:
        yield OFFERS_NOT.found(
            f"{flag or 'vmx or svm'} is not in the CPUID that KVM supports", told
        )
