"""A diagnosis as JSON-ready data."""

from __future__ import annotations

from typing import Any

from undervisor.explain.diagnosis import AnyRule, AnyViolation, Diagnosis, failure_sentence
from undervisor.explain.dump import Observation, field_name


def rule_data(rule: AnyRule) -> dict[str, Any]:
    """A rule without its predicate."""
    vendor = rule.id.split(".")[0]
    return {
        "id": rule.id,
        "text": rule.text,
        "section": rule.section,
        "fields": [field_name(int(field), vendor) for field in rule.reads],
        "outcome": rule.outcome.value,
        "qualification": rule.qualification,
        "remedy": rule.remedy,
        "assumes": rule.assumes,
    }


def violation_data(violation: AnyViolation) -> dict[str, Any]:
    """A broken rule with the values that broke it; a value that is only partly known is null."""
    data = rule_data(violation.rule)
    data["values"] = {
        name: None if value is None else f"{value:#x}"
        for name, value in zip(data.pop("fields"), violation.values, strict=True)
    }
    return data


def observation_data(observation: Observation) -> dict[str, Any]:
    """An observation."""
    return {
        "id": observation.id,
        "title": observation.title,
        "meaning": observation.meaning,
        "remedy": observation.remedy,
        "evidence": list(observation.evidence),
    }


def diagnosis_data(diagnosis: Diagnosis, dumps: int = 1) -> dict[str, Any]:
    """The whole diagnosis."""
    dump = diagnosis.dump
    return {
        "format": dump.format,
        "vendor": dump.vendor,
        "dumps": dumps,
        "clean": diagnosis.is_clean,
        "failure": failure_sentence(diagnosis.failure) if diagnosis.failure else None,
        "broken": [violation_data(violation) for violation in diagnosis.broken],
        "named": [rule_data(rule) for rule in diagnosis.named],
        "observations": [observation_data(one) for one in diagnosis.observations],
        "checked": diagnosis.checked,
        "not_checked": [
            {"id": rule.id, "missing": diagnosis.missing(rule)} for rule in diagnosis.unchecked
        ],
        "assumed": dump.assumed,
        "capabilities": "given"
        if diagnosis.capabilities_known
        else "assumed: a processor with every feature that current ones have",
        "notes": dump.notes,
        "fields": {
            field_name(field, dump.vendor): f"{value:#x}" for field, value in dump.state.items()
        },
    }
