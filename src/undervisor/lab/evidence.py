"""The proof that a level runs under the KVM of the level outside: facts, and what follows.

No single fact proves it: a name in CPUID can be chosen, a log can be copied.  That the KVM outside
counts an exit for each CPUID that is executed inside cannot.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from undervisor.errors import GuestDied
from undervisor.host.fact import Known
from undervisor.lab.probe import SAMPLES, Testimony
from undervisor.lab.stack import Lab, Level

KVM_SIGNATURE: Final = "KVMKVMKVM"
EXIT_FACTOR: Final = 10
"""CPUID that exits costs at least this many times a plain instruction: here 80 times the least."""
_COUNTERS: Final = ("exits", "nested_run", "io_exits", "halt_exits", "pf_taken")
_FOLDER: Final = "/sys/kernel/debug/kvm"


@dataclass(frozen=True, slots=True)
class Counted:
    """The counters of a level's KVM before and after the level inside ran `probe`."""

    before: dict[str, int]
    after: dict[str, int]

    def rise(self, name: str) -> int:
        """By how much a counter rose."""
        return self.after.get(name, 0) - self.before.get(name, 0)


@dataclass(frozen=True, slots=True)
class LevelFacts:
    """What a level says of itself; `counted` are its KVM's counters for the level inside it.

    `nested` is the parameter of its KVM module; `hypervisor` what its kernel found below it.
    """

    number: int
    kernel: str
    cpus: int
    testimony: Testimony
    hypervisor: str
    hypervisor_flag: bool
    sys_hypervisor: str
    clocksource: str
    kvm_device: bool
    nested: str
    counted: Counted | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        said = asdict(self)
        if self.counted is not None:
            said["counted"]["rise"] = {name: self.counted.rise(name) for name in _COUNTERS}
        return said


@dataclass(frozen=True, slots=True)
class Claim:
    """One thing that holds of a nested level, or not, and by which evidence."""

    level: int
    name: str
    holds: bool
    evidence: str


@dataclass(frozen=True, slots=True)
class Proof:
    """The facts of all levels and what follows."""

    levels: tuple[LevelFacts, ...]

    @property
    def claims(self) -> tuple[Claim, ...]:
        """Of every level that should run under the KVM of another."""
        return tuple(
            Claim(inner.number, name, *judge(outer, inner))
            for outer, inner in zip(self.levels, self.levels[1:], strict=False)
            for name, judge in CLAIMS.items()
        ) + tuple(_counted_below(self.levels))

    @property
    def proven(self) -> bool:
        """Whether every claim holds, and there is one."""
        return bool(self.claims) and all(claim.holds for claim in self.claims)

    def as_json(self) -> dict[str, Any]:
        """Plain values: the facts, the claims, the verdict."""
        return {
            "levels": [level.as_json() for level in self.levels],
            "claims": [asdict(claim) for claim in self.claims],
            "proven": self.proven,
        }


# -- what follows from the facts -----------------------------------------------------------------

_Judge = Callable[[LevelFacts, LevelFacts], tuple[bool, str]]


def _named(_: LevelFacts, inner: LevelFacts) -> tuple[bool, str]:
    said = inner.testimony
    holds = said.hypervisor_present and said.signature == KVM_SIGNATURE and said.features != 0
    return holds, f"CPUID 40000000H: {said.signature or 'nothing'}, features {said.features:#x}"


def _found(_: LevelFacts, inner: LevelFacts) -> tuple[bool, str]:
    flag = "the flag hypervisor" if inner.hypervisor_flag else "no flag hypervisor"
    holds = inner.hypervisor == "KVM" and inner.hypervisor_flag
    return holds, f"its kernel found {inner.hypervisor or 'none'}, {flag}"


def _offered(outer: LevelFacts, _: LevelFacts) -> tuple[bool, str]:
    there = "has" if outer.kvm_device else "has no"
    return outer.kvm_device, f"L{outer.number} {there} /dev/kvm, nested: {outer.nested or 'none'}"


def _counts(outer: LevelFacts, inner: LevelFacts) -> tuple[bool, str]:
    rise = outer.counted.rise("exits") if outer.counted is not None else 0
    text = f"KVM of L{outer.number} counted {rise:,} exits while L{inner.number} executed "
    return rise >= SAMPLES, f"{text}{SAMPLES} CPUIDs"


def _costs(_: LevelFacts, inner: LevelFacts) -> tuple[bool, str]:
    said = inner.testimony
    holds = said.cpuid_ticks >= EXIT_FACTOR * max(said.plain_ticks, 1)
    return holds, f"CPUID {said.cpuid_ticks:,} ticks, a plain instruction {said.plain_ticks:,}"


CLAIMS: Final[dict[str, _Judge]] = {
    "KVM outside": _offered,
    "KVM by name": _named,
    "KVM to its kernel": _found,
    "exits counted outside": _counts,
    "CPUID exits": _costs,
}


def _counted_below(levels: tuple[LevelFacts, ...]) -> list[Claim]:
    """What L1's KVM counts for L3: entries of a nested guest, which L2 asked for."""
    claims = []
    for outer, middle, inner in zip(levels, levels[1:], levels[2:], strict=False):
        rise = outer.counted.rise("nested_run") if outer.counted is not None else 0
        text = f"KVM of L{outer.number} entered a guest of L{middle.number} {rise:,} times"
        claims.append(Claim(inner.number, "entries counted below", rise > 0, text))
    return claims


# -- gathering -----------------------------------------------------------------------------------


def gather(lab: Lab) -> Proof:
    """Ask every level; the counters of all that are outside are read around each probe."""
    levels: list[LevelFacts] = []
    for number in lab.plan.levels:
        level = lab.level(number)
        outside = [lab.level(n) for n in range(1, number)]
        before = {outer.number: _counters(outer) for outer in outside}
        said = level.host.testimony()
        if not isinstance(said, Known):
            raise GuestDied(f"L{number} does not tell about its processor: {said}")
        # The innermost level's probe is seen by all KVMs outside: it is the one that is kept.
        for outer in outside:
            counted = Counted(before[outer.number], _counters(outer))
            levels[outer.number - 1] = replace(levels[outer.number - 1], counted=counted)
        levels.append(_facts(level, said.value))
    return Proof(tuple(levels))


def _counters(level: Level) -> dict[str, int]:
    said = level.text(f"cd {_FOLDER} && grep -H . {' '.join(_COUNTERS)}")
    return {name: int(value) for name, value in re.findall(r"^(\w+):(\d+)$", said, re.MULTILINE)}


_QUESTIONS: Final = {
    "kernel": "uname -r",
    "cpus": "nproc",
    "hypervisor": "dmesg | sed -n 's/.*Hypervisor detected: //p' | head -n 1",
    "flag": "grep -cw hypervisor /proc/cpuinfo",
    "sys": "ls /sys/hypervisor",
    "clock": "cat /sys/devices/system/clocksource/clocksource0/current_clocksource",
    "device": "[ -c /dev/kvm ] && echo yes",
    "nested": "cat /sys/module/kvm_amd/parameters/nested /sys/module/kvm_intel/parameters/nested",
}


def _facts(level: Level, said: Testimony) -> LevelFacts:
    """All in one request: a process costs tenths of a second three levels deep."""
    script = "; ".join(f'echo "{key}=$({ask})"' for key, ask in _QUESTIONS.items())
    answers = dict(re.findall(r"^(\w+)=(.*)$", level.text(script), re.MULTILINE))
    return LevelFacts(
        number=level.number,
        kernel=answers.get("kernel", ""),
        cpus=int(answers.get("cpus") or 0),
        testimony=said,
        hypervisor=answers.get("hypervisor", ""),
        hypervisor_flag=answers.get("flag", "0") != "0",
        sys_hypervisor=answers.get("sys", ""),
        clocksource=answers.get("clock", ""),
        kvm_device=answers.get("device") == "yes",
        nested=answers.get("nested", ""),
    )
