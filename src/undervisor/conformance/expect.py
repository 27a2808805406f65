"""What a test expects: values compared, and words for what was seen instead.

A test says what the manual demands through these; the first demand that is not met ends it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import TypeVar

T = TypeVar("T")


class Broken(Exception):
    """The machine under test did something else than the manual says."""


class Lacking(Exception):
    """The machine under test lacks what this test needs; the text says what."""


def words(value: object) -> str:
    """A value as a person reads it: hexadecimal numbers, names of enumerations."""
    match value:
        case Enum():
            return value.name
        case bool() | None:
            return str(value)
        case int():
            return f"{value:#x}" if abs(value) > 9 else str(value)
        case bytes():
            return value.hex(" ") if len(value) <= 32 else f"{value[:32].hex(' ')} ..."
        case tuple() | list():
            return f"({', '.join(words(item) for item in value)})"
        case dict():
            return "{" + ", ".join(f"{words(k)}: {words(v)}" for k, v in value.items()) + "}"
        case _:
            return str(value)


def equal(what: str, got: object, want: object) -> None:
    """`got` is what was seen, `want` what the manual demands; Broken where they differ."""
    if got != want:
        raise Broken(f"{what}: {words(got)}, must be {words(want)}")


def true(what: str, condition: object, *seen: object) -> None:
    """Broken with the sentence `what` and what was seen unless `condition` holds."""
    if not condition:
        raise Broken(what + (f": {', '.join(words(value) for value in seen)}" if seen else ""))


def bits(what: str, got: int, *, ones: int = 0, zeros: int = 0) -> None:
    """Broken where a bit of `ones` is 0 in `got`, or one of `zeros` is 1."""
    if ones & ~got or zeros & got:
        wrong = f"must be 1: {words(ones & ~got)}, must be 0: {words(zeros & got)}"
        raise Broken(f"{what}: {words(got)}; {wrong}")


def each(what: str, cases: Mapping[T, object], want: Callable[[T], object] | object) -> None:
    """Every case's value is the wanted one; Broken names all cases that differ, not the first."""
    wanted = want if callable(want) else lambda case: want
    wrong = [
        f"{words(case)}: {words(got)}, must be {words(wanted(case))}"
        for case, got in cases.items()
        if got != wanted(case)
    ]
    if wrong:
        more = f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise Broken(f"{what}: {len(wrong)} of {len(cases)} wrong: {'; '.join(wrong[:6])}{more}")
