"""What a target's processors say of themselves: abilities that are asked for, not stated."""

from __future__ import annotations

from typing import Final

from undervisor.arch.x86.cpuid import FEATURES, Leaf, features_in, words
from undervisor.errors import GuestDied, TimedOut, UndervisorError
from undervisor.guest.image import Image
from undervisor.guest.probe.client import Batch, Probe
from undervisor.guest.probe.program import LEAST_RAM, program
from undervisor.targets import Job, Running, Target

_TIME: Final = 30.0
_GRACE: Final = 2.0
_WORDS: Final = words(FEATURES)


def features(target: Target) -> frozenset[str]:
    """The names of all CPUID bits that are set, from a machine that is started to ask it.

    UndervisorError where the machine does not come up, with what it said.
    """
    with target.start(Job(Image.parse(program().elf, "probe"), memory=LEAST_RAM)) as running:
        try:
            probe = Probe(running, _TIME)
            probe.wait_for_hello()
            return _ask(probe)
        except (GuestDied, TimedOut) as error:
            raise UndervisorError(
                f"{target.name} does not run the probe: {error.message}", hint=_why(running)
            ) from None


def _why(running: Running) -> str:
    """How a machine ended that does not answer, as far as it has."""
    try:
        end = running.wait(_GRACE)
    except TimedOut:
        return "it still runs and says nothing"
    return " | ".join((end.text, *end.report.strip().splitlines()[-3:]))


def _ask(probe: Probe) -> frozenset[str]:
    batch = Batch()
    most = {first: batch.cpuid(first) for first in (Leaf.VENDOR, Leaf.EXTENDED_VENDOR)}
    asked = {key: batch.cpuid(*key) for key in _WORDS}
    probe.run(batch)
    found = set()
    for (leaf, subleaf), answer in asked.items():
        # A leaf above the highest answers with another one's values.
        first = Leaf(leaf & 0x80000000)
        if leaf <= most[first].value["rax"]:
            registers = (answer.value[name] for name in ("rax", "rbx", "rcx", "rdx"))
            found |= {feature.name for feature in features_in(leaf, subleaf, registers)}
    return frozenset(found)
