"""A diagnosis in words: the lines that `undervisor explain`, the shell and test reports print."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from undervisor.explain.diagnosis import AnyRule, AnyViolation, Diagnosis, failure_sentence
from undervisor.explain.dump import Observation, field_name

SHOWN = 4
"""Broken rules, and observations, that fit on one screen."""


@dataclass(frozen=True, slots=True)
class Line:
    """A paragraph; `style` is in the words of rich, for a terminal with colours."""

    text: str
    indent: int = 0
    style: str = ""

    def __str__(self) -> str:
        return " " * self.indent + self.text


def violation_lines(violation: AnyViolation, first: bool, known: bool) -> Iterator[Line]:
    """A broken rule: what it says, the values, what to change, and where the manual says it.

    `first`: the likeliest cause.  `known`: the processor's capabilities were given.
    """
    rule = violation.rule
    yield Line(f"{rule.id}: {rule.text}", 2, "bold red" if first else "red")
    vendor = rule.id.split(".")[0]
    values = [
        f"{field_name(int(field), vendor)} = {value:#x}"
        for field, value in zip(rule.reads, violation.values, strict=True)
        if value is not None
    ]
    if values:
        yield Line(", ".join(values), 6)
    yield Line(f"→ {rule.remedy}", 6)
    place = f"{'SDM' if vendor == 'vmx' else 'APM'}, {rule.section}; {rule.outcome.value}"
    if rule.qualification:
        place += f", qualification {rule.qualification}"
    yield Line(place, 6, "dim")
    if rule.assumes and not known:
        yield Line(f"assumed: {rule.assumes} (give --caps to be sure)", 6, "dim")


def verdict_lines(diagnosis: Diagnosis, everything: bool) -> Iterator[Line]:
    """How the entry ended, and the broken rules."""
    if diagnosis.failure:
        yield Line(failure_sentence(diagnosis.failure), 2)
    count = len(diagnosis.broken)
    if count:
        yield Line(f"{count} rule{'s' * (count > 1)} broken, the likeliest cause first:", 0, "red")
    elif diagnosis.checked and diagnosis.is_clean:
        yield Line("no rule is broken", 0, "green")
    elif diagnosis.checked:
        yield Line("no rule that could be checked is broken, and yet it failed", 0, "yellow")
    limit = count if everything else SHOWN
    for place, violation in enumerate(diagnosis.broken[:limit]):
        yield from violation_lines(violation, place == 0, diagnosis.capabilities_known)
    if count > limit:
        rest = ", ".join(v.rule.id for v in diagnosis.broken[limit : limit + 6])
        yield Line(f"and {count - limit} more (--all): {rest}", 2)


def diagnosis_lines(diagnosis: Diagnosis, dumps: int, everything: bool) -> Iterator[Line]:
    """The answer on one screen; all of it with `everything`.  `dumps`: how many the input has."""
    dump = diagnosis.dump
    many = f", the one to look at of {dumps}" if dumps > 1 else ""
    yield Line(f"{dump.format}{many}: {len(dump.state)} fields", 0, "bold")
    for note in dump.notes if everything else dump.notes[:3]:
        yield Line(note, 2, "dim")
    yield from verdict_lines(diagnosis, everything)
    shown = diagnosis.observations if everything else diagnosis.observations[:SHOWN]
    for observation in shown:
        yield from _observation(observation)
    broken = {violation.rule.id for violation in diagnosis.broken}
    for rule in diagnosis.named if everything else diagnosis.named[:SHOWN]:
        if rule.id not in broken:
            yield from _named(rule)
    yield from _rest(diagnosis, everything)


def _observation(observation: Observation) -> Iterator[Line]:
    yield Line(observation.title, 2, "yellow")
    yield Line(observation.meaning, 6)
    for piece in observation.evidence:
        yield Line(piece, 6, "dim")
    if observation.remedy:
        yield Line("→ " + observation.remedy, 6)


def _named(rule: AnyRule) -> Iterator[Line]:
    yield Line(f"named by the log: {rule.id}: {rule.text}", 2, "red")
    yield Line(f"→ {rule.remedy}", 6)
    fields = ", ".join(field_name(int(field), rule.id.split(".")[0]) for field in rule.reads)
    yield Line(f"{rule.section}; look at {fields}", 6, "dim")


def _rest(diagnosis: Diagnosis, everything: bool) -> Iterator[Line]:
    """What was not checked, and what was taken for granted."""
    if diagnosis.checked or diagnosis.unchecked:
        text = f"{diagnosis.checked} rules checked, {len(diagnosis.unchecked)} not checked"
        yield Line(text + (" for lack of fields:" if diagnosis.unchecked else ""), 2)
    if everything:
        for rule in diagnosis.unchecked:
            yield Line(f"{rule.id}: lacks {', '.join(diagnosis.missing(rule))}", 6)
    elif diagnosis.unchecked:
        yield Line(_lacking(diagnosis), 6, "dim")
    for text in diagnosis.dump.assumed:
        yield Line(f"assumed: {text}", 2, "dim")
    if diagnosis.checked and not diagnosis.capabilities_known:
        everywhere = "a processor with every current feature (--caps FILE checks against yours)"
        yield Line(f"assumed: {everywhere}", 2, "dim")


def _lacking(diagnosis: Diagnosis) -> str:
    """The missing fields that most rules wait for."""
    lacking: dict[str, int] = {}
    for rule in diagnosis.unchecked:
        for name in diagnosis.missing(rule):
            lacking[name] = lacking.get(name, 0) + 1
    names = sorted(lacking, key=lambda name: -lacking[name])
    more = f" and {len(names) - 6} more (--all)" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more
