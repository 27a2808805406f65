"""A transition between levels as text and as JSON, and which of them to show."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from undervisor.errors import BadInput


class Transition(Protocol):
    """One exit and what came of it; times in virtual nanoseconds."""

    @property
    def time(self) -> int:
        """When."""

    @property
    def vcpu(self) -> int:
        """On which virtual processor."""

    @property
    def level(self) -> int:
        """Which level left the guest: 1 or 2."""

    @property
    def to(self) -> int:
        """Which level goes on."""

    @property
    def reason(self) -> str:
        """Why, in the vendor's words."""

    @property
    def rip(self) -> int:
        """Where the guest was."""

    @property
    def action(self) -> str:
        """What L0 did."""

    @property
    def why(self) -> str:
        """Why it did that."""

    @property
    def detail(self) -> str:
        """What the exit was about."""

    @property
    def ran(self) -> int:
        """How long the guest had run since the machine's last exit."""


def text(transition: Transition) -> str:
    """One line."""
    t = transition
    line = (
        f"{t.time / 1e6:12.6f} ms  vCPU {t.vcpu}  L{t.level} -> L0 -> L{t.to}  "
        f"{t.reason:24} rip {t.rip:#x}"
    )
    if t.detail:
        line += f"  {t.detail}"
    line += f"  => {t.action}"
    return f"{line} ({t.why})" if t.why else line


def document(transition: Transition) -> dict[str, object]:
    """The transition as a JSON document; addresses are hexadecimal strings."""
    t = transition
    return {
        "type": "transition",
        "time_ns": t.time,
        "vcpu": t.vcpu,
        "level": t.level,
        "to": t.to,
        "reason": t.reason,
        "detail": t.detail,
        "rip": f"{t.rip:#x}",
        "action": t.action,
        "why": t.why,
        "ran_ns": t.ran,
    }


def json_line(transition: Transition) -> str:
    """The document on one line."""
    return json.dumps(document(transition))


# -- filters -----------------------------------------------------------------------------------

Accepts = Callable[[Transition], bool]

_NUMBERS: Final[dict[str, Callable[[Transition], int]]] = {
    "level": lambda t: t.level,
    "to": lambda t: t.to,
    "vcpu": lambda t: t.vcpu,
}
_WORDS: Final[dict[str, Callable[[Transition], str]]] = {
    "reason": lambda t: t.reason,
    "action": lambda t: t.action,
    "detail": lambda t: t.detail,
}
_HINT: Final = "for example: level=2,reason=cpuid|hlt,vcpu=0"


@dataclass(frozen=True, slots=True)
class Filter:
    """Terms that must all hold."""

    terms: tuple[Accepts, ...] = ()

    def __call__(self, transition: Transition) -> bool:
        """Whether to show it."""
        return all(term(transition) for term in self.terms)


def parse_filter(texts: Iterable[str]) -> Filter:
    """`level=2,reason=cpuid|hlt`: `,` is and, `|` is or; a word alone is part of the reason."""
    terms: list[Accepts] = []
    for item in (item.strip() for text in texts for item in text.split(",")):
        if not item:
            raise BadInput("an empty term in the trace filter", hint=_HINT)
        name, equals, value = item.partition("=")
        terms.append(_term(name if equals else "reason", value if equals else item))
    return Filter(tuple(terms))


def _term(name: str, value: str) -> Accepts:
    choices = value.lower().split("|")
    if name in _NUMBERS:
        number = _NUMBERS[name]
        try:
            wanted = {int(choice.removeprefix("l")) for choice in choices}
        except ValueError:
            raise BadInput(f"trace filter: {name}={value} is no number", hint=_HINT) from None
        return lambda t: number(t) in wanted
    if name in _WORDS:
        word = _WORDS[name]
        return lambda t: any(choice in word(t).lower() for choice in choices)
    known = ", ".join([*_NUMBERS, *_WORDS])
    raise BadInput(f"trace filter: unknown name {name!r}", hint=f"{known}; {_HINT}")
