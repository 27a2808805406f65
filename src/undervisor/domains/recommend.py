"""Which CPU an L1 shall have: the host's own, or a named model that other hosts have too."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from undervisor.domains.model import Cpu, Mode, Policy
from undervisor.errors import BadInput
from undervisor.host.fact import Known, value_or
from undervisor.host.facts.processor import Processor


class Need(StrEnum):
    """What an operator wants of the guest."""

    SPEED = "speed"
    MIGRATION = "migration"
    HERE = "here"


MEANING = {
    Need.SPEED: "every feature of this host, also those that can't be migrated",
    Need.MIGRATION: "the guest, with or without its L2 guests, moves between hosts that differ",
    Need.HERE: "neither: it runs here, may be saved and moves only to an equal host",
}


@dataclass(frozen=True, slots=True)
class Recommendation:
    """A CPU and the reasons for it."""

    cpu: Cpu
    why: tuple[str, ...]


# (vendor's extension, family, models): the name without its variants of TSX and IBRS.
_MODELS: tuple[tuple[str, int, frozenset[int], str], ...] = (
    ("vmx", 6, frozenset({26, 30, 31, 46}), "Nehalem"),
    ("vmx", 6, frozenset({37, 44, 47}), "Westmere"),
    ("vmx", 6, frozenset({42, 45}), "SandyBridge"),
    ("vmx", 6, frozenset({58, 62}), "IvyBridge"),
    ("vmx", 6, frozenset({60, 63, 69, 70}), "Haswell"),
    ("vmx", 6, frozenset({61, 71, 79, 86}), "Broadwell"),
    ("vmx", 6, frozenset({78, 94, 142, 158, 165, 166}), "Skylake-Client"),
    ("vmx", 6, frozenset({85}), "Skylake-Server"),
    ("vmx", 6, frozenset({106, 108}), "Icelake-Server"),
    ("vmx", 6, frozenset({143, 207}), "Icelake-Server"),  # the newest that every QEMU knows
    ("svm", 23, frozenset(range(0x30)), "EPYC"),
    ("svm", 23, frozenset(range(0x30, 0x100)), "EPYC-Rome"),
    ("svm", 25, frozenset(range(0x100)), "EPYC-Milan"),
    ("svm", 26, frozenset(range(0x100)), "EPYC-Milan"),  # the newest that every QEMU knows
)
_WITH_IBRS = ("Nehalem", "Westmere", "SandyBridge", "IvyBridge", "Haswell", "Broadwell",
              "Skylake-Client", "Skylake-Server")  # fmt: skip
_WITH_TSX = ("Haswell", "Broadwell", "Skylake-Client", "Skylake-Server", "Icelake-Server")
_TSX_ONLY_WITH_IBRS = ("Skylake-Client", "Skylake-Server")
"""Of these QEMU has no variant without TSX that lacks IBRS."""


def named_model(processor: Processor) -> str:
    """QEMU's model that is nearest below this processor; empty where we know none."""
    here = (processor.extension, processor.family)
    names = [n for e, f, models, n in _MODELS if (e, f) == here and processor.model in models]
    if not names:
        return ""
    name = names[0]
    tsx = processor.has("rtm")
    ibrs = name in _WITH_IBRS and processor.has("ibrs")
    without_tsx = name in _WITH_TSX and not tsx
    if without_tsx and name in _TSX_ONLY_WITH_IBRS:
        return f"{name}-noTSX-IBRS" if ibrs else ""
    return name + ("-noTSX" if without_tsx else "") + ("-IBRS" if ibrs else "")


def required(extension: str) -> tuple[tuple[str, Policy], ...]:
    """The extension asked for by name; on s390x host-passthrough has it, and takes no names."""
    return () if extension == "sie" else ((extension, Policy.REQUIRE),)


def recommend(need: Need, extension: str, processor: Processor | None = None) -> Recommendation:
    """The CPU for an L1; BadInput where it takes a name that we can't tell.

    `processor` is that of the weakest host that the guest may run on.
    """
    if need is Need.MIGRATION:
        return _named(extension, processor)
    cpu = Cpu(
        mode=Mode.PASSTHROUGH,
        check="none",
        migratable=False if need is Need.SPEED else None,
        features=required(extension),
    )
    why = [
        f"host-passthrough: L1 sees the whole processor, {extension} and its sub-features included",
        f"{extension} required by name: the start fails loudly where the host does not have it",
    ]
    why.append(
        "migratable=off: also what can't be migrated (invtsc); the guest can't be saved or moved"
        if need is Need.SPEED
        else "it can move to a host with the same processor, microcode, kernel and QEMU only"
    )
    return Recommendation(cpu, tuple(why))


def _named(extension: str, processor: Processor | None) -> Recommendation:
    model = named_model(processor) if processor is not None else ""
    if not model or processor is None or processor.extension != extension:
        what = "this machine's processor" if processor is None else _called(processor)
        raise BadInput(
            f"no named model is known for {what}",
            hint="name the model that all hosts have: --cpu MODEL (virsh cpu-models x86_64)",
        )
    cpu = Cpu(
        mode=Mode.CUSTOM,
        model=model,
        match="exact",
        fallback="forbid",
        features=required(extension),
    )
    return Recommendation(
        cpu,
        (
            f"{model}: a named model is the same on every host; this one is nearest below "
            f"{_called(processor)}. Every host of the guest must have it: virsh "
            "hypervisor-cpu-compare there",
            f"{extension} required: named models do not give it under KVM unless asked",
            "fallback forbidden: libvirt must not put a lesser model in its place",
            "the sub-features of the extension follow the kernel and QEMU of each host: compare "
            "with `undervisor caps diff`, judge with `undervisor migrate`",
        ),
    )


def _called(processor: Processor) -> str:
    vendor = value_or(processor.vendor, "?") if isinstance(processor.vendor, Known) else "?"
    named = processor.name or vendor
    return f"{named} (family {processor.family}, model {processor.model})"
