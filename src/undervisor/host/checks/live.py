"""`check --live`: what KVM itself answers, and what came of a guest that was run to prove it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from undervisor.host.access.protocol import KvmOffer
from undervisor.host.checks.finding import Finding, Kind, Layer, Level
from undervisor.host.fact import Fact, Known, Unknown
from undervisor.host.facts.machine import Machine

_L = Layer.LIVE


@dataclass(frozen=True, slots=True)
class Proof:
    """What came of a guest on KVM that was to run a guest of its own.

    `vendor` is the extension that it was to use, empty where KVM offers none: then it only had to
    start.  `failed` is the step at which it ended, empty where all succeeded, and `why` the
    reason; `started`: whether it ran at all.  `l2_exit` is the exit that L2 made, as L1 saw it.
    """

    vendor: str
    started: bool
    failed: str = ""
    why: str = ""
    l2_exit: str = ""
    boot_seconds: float = 0.0
    l2_seconds: float = 0.0


NESTED_WORKS = Kind(
    "live-nested-works", _L, Level.OK, "a guest ran a guest of its own",
    "A small guest was started on /dev/kvm, entered VMX operation or enabled SVM, ran an L2 and "
    "got the exit that L2 made, with the value that L2 computed. Nested KVM works: it ran.",
)  # fmt: skip
NESTED_FAILS = Kind(
    "live-nested-fails", _L, Level.FAIL, "a guest could not run a guest of its own",
    "KVM offers the extension, and the guest that was started to use it failed at the step that "
    "the evidence names. What looks right in every other layer does not work.",
    "Look at the kernel's log for what KVM says about it: sudo dmesg | grep -i kvm. `undervisor "
    "test --on kvm` finds which rule of the manual is broken. If this machine is itself a guest, "
    "its own hypervisor runs the L2 and is the first suspect: update it.",
)  # fmt: skip
WITHOUT_NESTING = Kind(
    "live-guest-runs-without-nesting", _L, Level.FAIL, "KVM runs guests that can't nest",
    "A guest ran on /dev/kvm, and KVM offers its guests neither VMX nor SVM.",
    "See the failures of the layers above in this list; where there is none, nested is off: sudo "
    "undervisor enable.",
)  # fmt: skip
GUEST_FAILS = Kind(
    "live-guest-fails", _L, Level.FAIL, "KVM runs no guest",
    "/dev/kvm answers, and the guest that was started on it failed before it said a word.",
    "Look at the kernel's log for what KVM says about it: sudo dmesg | grep -i kvm. Another "
    "program that holds the processor's extension, or too little memory, is the usual reason.",
)  # fmt: skip
OFFERS = Kind(
    "live-kvm-offers", _L, Level.OK, "KVM offers the extension to its guests",
    "KVM_GET_SUPPORTED_CPUID holds the flag, which is the reliable sign of nesting: the capability "
    "KVM_CAP_NESTED_STATE is there on AMD even while nesting is off. No guest was run: the machine "
    "is a recording.",
)  # fmt: skip
OFFERS_NOT = Kind(
    "live-kvm-offers-not", _L, Level.FAIL, "KVM offers its guests no extension",
    "Its guests can't nest, whatever else looks right. No guest was run: the machine is a "
    "recording.",
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
    "Its device can't be asked from here, or what answered made no sense. Over SSH, and in a level "
    "of a lab, Python 3.11 there is enough: the proof is sent along.",
    "Run `undervisor check --live` on that machine itself, or give it Python 3.11 (a lab: "
    "undervisor lab up --with-python).",
)  # fmt: skip


def check(machine: Machine, offer: Fact[KvmOffer], proof: Proof | None = None) -> Iterator[Finding]:
    """What KVM said, held against the processor's extension, or what the guest's run came to."""
    if isinstance(offer, Unknown):
        yield NOT_ASKED.found(offer)
        return
    if not isinstance(offer, Known):
        yield ANSWERS_NOT.found(offer)
        return
    said = offer.value
    told = f"API version {said.api_version}, nested state of {said.nested_state} bytes"
    if proof is not None:
        yield _proved(proof, told)
        return
    flag = machine.processor.extension
    offered = {"vmx": said.vmx, "svm": said.svm}.get(flag, False)
    if offered:
        yield OFFERS.found(f"{flag} is in the CPUID that KVM supports", told)
    else:
        yield OFFERS_NOT.found(
            f"{flag or 'vmx or svm'} is not in the CPUID that KVM supports", told
        )


def _proved(proof: Proof, told: str) -> Finding:
    booted = f"the guest started in {proof.boot_seconds * 1000:.0f} ms"
    step = f"{proof.failed}: {proof.why}"
    if not proof.started:
        return GUEST_FAILS.found(step, told)
    if not proof.vendor:
        return WITHOUT_NESTING.found(
            booted, "vmx and svm are not in the CPUID that KVM supports", told
        )
    if proof.failed:
        return NESTED_FAILS.found(step, booted, f"{proof.vendor} is in its CPUID", told)
    ran = f"L2 ran and left with {proof.l2_exit}, {proof.l2_seconds * 1000:.0f} ms"
    return NESTED_WORKS.found(ran, booted, f"{proof.vendor} is in its CPUID", told)
