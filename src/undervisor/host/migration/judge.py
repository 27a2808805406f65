"""Hold two machines against the rules and say for each case: safe, safe if, risky or unsafe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from undervisor.arch.vmx.capabilities import VmxMsr
from undervisor.host.checks.cves import CVES, Status, status
from undervisor.host.checks.finding import Finding, Level
from undervisor.host.fact import Fact, Known, value_or
from undervisor.host.facts.machine import Machine
from undervisor.host.facts.version import Flavour
from undervisor.host.migration import rules
from undervisor.host.migration.capabilities import missing_controls, missing_flags
from undervisor.host.migration.rules import Case


class Verdict(Enum):
    """What may be expected of a move."""

    SAFE = "safe"
    SAFE_IF = "safe if"
    RISKY = "risky"
    UNKNOWN = "unknown"
    UNSAFE = "unsafe"


_BY_LEVEL = {
    Level.FAIL: Verdict.UNSAFE,
    Level.UNKNOWN: Verdict.UNKNOWN,
    Level.WARN: Verdict.RISKY,
    Level.NOTE: Verdict.SAFE_IF,
    Level.OK: Verdict.SAFE,
}
_WORST_FIRST = (Level.FAIL, Level.UNKNOWN, Level.WARN, Level.NOTE, Level.OK)


@dataclass(frozen=True, slots=True)
class Side:
    """One machine of a move and what it offers to guests."""

    machine: Machine
    vmx: dict[VmxMsr, Fact[int]]


@dataclass(frozen=True, slots=True)
class Move:
    """The judgement of one case."""

    case: Case
    verdict: Verdict
    findings: tuple[Finding, ...]

    def as_json(self) -> dict[str, Any]:
        """The judgement as JSON has it."""
        return {
            "case": self.case.word,
            "title": self.case.title,
            "verdict": self.verdict.value,
            "findings": [finding.as_json() for finding in self.findings],
        }


def judge(source: Side, destination: Side, case: Case) -> Move:
    """Judge one case; every rule that applies gives a finding, the worst decides."""
    found = tuple(_findings(source, destination, case))
    levels = {finding.kind.level for finding in found}
    worst = next(level for level in _WORST_FIRST if level in levels)
    return Move(case, _BY_LEVEL[worst], found)


def _findings(source: Side, destination: Side, case: Case) -> Iterator[Finding]:
    mine, other = source.machine, destination.machine
    vendors = (mine.processor.extension, other.processor.extension)
    if "" in vendors:
        yield rules.VENDOR_UNKNOWN.found(mine.processor.vendor, other.processor.vendor)
        return
    if vendors[0] != vendors[1]:
        yield rules.VENDORS_DIFFER.found(f"{vendors[0]} here, {vendors[1]} there")
        return
    if case.of_l1:
        yield from _of_l1(mine, other, case)
    else:
        yield rules.L2_MOVES.found(case.title)
    yield from _features(source, destination, case)
    yield from _backwards(mine, other, case)


def _of_l1(mine: Machine, other: Machine, case: Case) -> Iterator[Finding]:
    extension = mine.processor.extension
    for machine in (mine, other):
        if machine.processor.has(extension) is False:
            yield rules.EXTENSION_MISSING.found(f"{machine.name}: no {extension}")
    nested = other.kvm.nested
    if not isinstance(nested, Known):
        yield rules.NESTED_UNKNOWN_THERE.found(nested)
    elif not nested.value:
        yield rules.NESTED_OFF_THERE.found(f"{other.name}: {nested.source} is off")
    if extension == "sie":
        yield rules.Z_MOVES.found(case.title)
        return
    bad = [*_kernels(mine, other, case), *_qemus(mine, other)]
    yield from bad
    if case is Case.L1_CONFIGURED:
        yield rules.MAY_FAIL_LATER.found()
        return
    levels = {finding.kind.level for finding in bad}
    if not levels & {Level.FAIL, Level.UNKNOWN}:
        yield rules.STATE_IS_SAVED.found()
    if extension == "svm" and Level.FAIL not in levels:
        yield rules.DOCUMENT_IS_STALE.found()


def _kernels(mine: Machine, other: Machine, case: Case) -> Iterator[Finding]:
    extension = mine.processor.extension
    for machine in (mine, other):
        version = machine.kernel.version
        if not isinstance(version, Known):
            yield rules.RESTORE_UNSURE.found(f"{machine.name}: {version}")
            continue
        told = f"{machine.name}: kernel {value_or(machine.kernel.release, '')}"
        floor = rules.DOCUMENT_SINCE.get(extension, rules.STATE_SINCE[extension])
        if ".el" in told and version.value < floor:
            yield rules.NUMBER_UNSURE.found(told)
        elif version.value < rules.STATE_SINCE[extension]:
            yield rules.KERNEL_TOO_OLD.found(told)
        elif case is Case.L1_RUNNING:
            if version.value < floor:
                yield rules.KERNEL_BELOW_DOCUMENT.found(told)
            yield from _defects(machine, extension, told)


def _defects(machine: Machine, extension: str, told: str) -> Iterator[Finding]:
    version = machine.kernel.version
    assert isinstance(version, Known)
    wanted = [cve for cve in CVES if cve.id in rules.RESTORE_DEFECTS.get(extension, ())]
    states = {cve.id: status(cve, version.value, machine.kernel.flavour) for cve in wanted}
    broken = [name for name, state in states.items() if state is Status.VULNERABLE]
    unsure = [name for name, state in states.items() if state is Status.UNKNOWN]
    if broken:
        yield rules.RESTORE_DEFECT.found(told, ", ".join(broken))
    if unsure:
        yield rules.RESTORE_UNSURE.found(told, ", ".join(unsure))


def _qemus(mine: Machine, other: Machine) -> Iterator[Finding]:
    floor = rules.QEMU_SINCE[mine.processor.extension]
    unknown = []
    for machine in (mine, other):
        qemu = machine.software.qemu
        if not isinstance(qemu, Known):
            unknown.append(f"{machine.name}: {qemu}")
        elif qemu.value < floor:
            yield rules.QEMU_TOO_OLD.found(f"{machine.name}: QEMU {qemu.value}, needs {floor}")
    if unknown:
        yield rules.QEMU_UNKNOWN_THERE.found(*unknown)


def _features(source: Side, destination: Side, case: Case) -> Iterator[Finding]:
    lost = missing_flags(source.machine, destination.machine)
    if not isinstance(lost, Known):
        yield rules.VENDOR_UNKNOWN.found(lost)
        return
    differences = list(lost.value)
    if not case.of_l1:
        # An L2 that does not nest has no use for its L1's extension.
        differences = [d for d in differences if d.name not in ("vmx", "svm", "sie", "ept", "npt")]
    elif source.machine.processor.extension == "vmx":
        controls, unknown = missing_controls(source.vmx, destination.vmx)
        differences += controls
        if unknown:
            yield rules.CAPABILITIES_UNKNOWN.found(", ".join(unknown))
    if differences:
        yield rules.FEATURES_MISSING.found(*differences[:40])


def _backwards(mine: Machine, other: Machine, case: Case) -> Iterator[Finding]:
    here, there = mine.kernel.version, other.kernel.version
    upstream = Flavour.UPSTREAM
    if case is Case.L1_RUNNING and isinstance(here, Known) and isinstance(there, Known):
        same = (mine.kernel.flavour, other.kernel.flavour) == (upstream, upstream)
        # Point releases of different distributions can't be compared, branches can.
        older = there.value < here.value if same else there.value.branch < here.value.branch
        if older:
            yield rules.KERNEL_GOES_BACK.found(f"{here.value} here, {there.value} there")
    qemu = (mine.software.qemu, other.software.qemu)
    if isinstance(qemu[0], Known) and isinstance(qemu[1], Known):
        if qemu[1].value.branch < qemu[0].value.branch:
            yield rules.QEMU_GOES_BACK.found(f"{qemu[0].value} here, {qemu[1].value} there")
    elif not case.of_l1:
        yield rules.QEMU_UNKNOWN_THERE.found(*(q for q in qemu if not isinstance(q, Known)))
