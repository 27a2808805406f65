"""Values of which only some bits are known, and what a rule says of a state that holds them.

A dump never holds every field.  A rule that would read a missing one is evaluated along every way
that the unknown bits can turn a decision: if all ways agree, the answer does not depend on what is
missing; if they differ, or if the rule does something with the value that can't be followed, the
rule counts as not checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, cast

from undervisor.arch.rules import Capabilities, Field, Rule, Verdict, Violation

WAYS = 128
"""How many ways through a rule are followed before it counts as not checked."""

Value = TypeVar("Value", bound="int | Partial")


class Choices:
    """The decisions taken on one way through a rule: `path` first, then always false."""

    __slots__ = ("_path", "taken")

    def __init__(self, path: tuple[bool, ...]) -> None:
        self._path = path
        self.taken: list[bool] = []

    def next(self) -> bool:
        """The next decision."""
        number = len(self.taken)
        answer = self._path[number] if number < len(self._path) else False
        self.taken.append(answer)
        return answer


class Partial:
    """An integer with unknown bits: `known` masks the bits of `value` that are known.

    Only what rules of entry do with values is here; anything else is a TypeError.
    """

    __slots__ = ("choices", "known", "value")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, value: int, known: int, choices: Choices) -> None:
        self.value = value & known
        self.known = known
        self.choices = choices

    def _made(self, value: int, known: int) -> int | Partial:
        return value if known == -1 else Partial(value, known, self.choices)

    def __and__(self, other: int | Partial) -> int | Partial:
        v, k = _parts(other)
        zeros = (self.known & ~self.value) | (k & ~v)
        return self._made(self.value & v, self.known & k | zeros)

    def __or__(self, other: int | Partial) -> int | Partial:
        v, k = _parts(other)
        return self._made(self.value | v, self.known & k | self.value | v)

    def __xor__(self, other: int | Partial) -> int | Partial:
        v, k = _parts(other)
        return self._made(self.value ^ v, self.known & k)

    __rand__, __ror__, __rxor__ = __and__, __or__, __xor__

    def __invert__(self) -> int | Partial:
        return self._made(~self.value, self.known)

    def __rshift__(self, count: int) -> int | Partial:
        return self._made(self.value >> count, self.known >> count)

    def __lshift__(self, count: int) -> int | Partial:
        return self._made(self.value << count, self.known << count | ((1 << count) - 1))

    def __add__(self, other: int | Partial) -> Partial:
        _parts(other)
        return Partial(0, 0, self.choices)

    __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __add__

    def __bool__(self) -> bool:
        return True if self.value else self.choices.next()

    def __eq__(self, other: object) -> bool:
        v, k = _parts(other)
        if (self.value ^ v) & self.known & k:
            return False
        return self.choices.next()

    def _bounds(self) -> tuple[int, int] | None:
        """The least and the greatest value, None where they are not bounded."""
        if self.known >= 0 or self.value < 0:
            return None
        return self.value, self.value | ~self.known

    def _compare(self, other: int | Partial, sure: bool, below: bool) -> bool:
        """Whether self < other (`below`) or self <= other; `sure` negates the answer."""
        v, k = _parts(other)
        bounds = self._bounds()
        if bounds is not None and k == -1:
            low, high = bounds
            if high < v or (not below and high == v):
                return not sure
            if low > v or (below and low == v):
                return sure
        return self.choices.next()

    def __lt__(self, other: int | Partial) -> bool:
        return self._compare(other, sure=False, below=True)

    def __le__(self, other: int | Partial) -> bool:
        return self._compare(other, sure=False, below=False)

    def __ge__(self, other: int | Partial) -> bool:
        return self._compare(other, sure=True, below=True)

    def __gt__(self, other: int | Partial) -> bool:
        return self._compare(other, sure=True, below=False)


def _parts(value: object) -> tuple[int, int]:
    if isinstance(value, Partial):
        return value.value, value.known
    if isinstance(value, int):
        return value, -1
    raise TypeError(f"{type(value).__name__} is not a number")


class _Guess(Mapping[int, "int | Partial"]):
    """A state in which every missing field is there, with no bit known within its width."""

    def __init__(
        self,
        state: Mapping[int, int],
        partial: Mapping[int, tuple[int, int]],
        widths: Mapping[int, int],
        choices: Choices,
    ) -> None:
        self._state, self._partial, self._widths = state, partial, widths
        self._choices = choices

    def __getitem__(self, field: int) -> int | Partial:
        if field in self._state:
            return self._state[field]
        value, known = self._partial.get(field, (0, 0))
        width = self._widths.get(field, 64)
        return Partial(value, known | -1 << width, self._choices)

    def __iter__(self) -> Iterator[int]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def weigh(
    rule: Rule[Field, Capabilities],
    state: Mapping[Field, int],
    partial: Mapping[int, tuple[int, int]],
    widths: Mapping[int, int],
    capabilities: Capabilities,
) -> bool | None:
    """Whether `rule` holds whatever the missing bits are: True, False, or None: it depends."""
    answers: set[bool] = set()
    pending: list[tuple[bool, ...]] = [()]
    for _ in range(WAYS):
        if not pending:
            return answers.pop()
        path = pending.pop()
        choices = Choices(path)
        guess: Any = _Guess(cast(Mapping[int, int], state), partial, widths, choices)
        try:
            answers.add(bool(rule.holds(guess, capabilities)))
        except (TypeError, KeyError, ValueError, AttributeError):
            return None
        if len(answers) > 1:
            return None
        for number in range(len(path), len(choices.taken)):
            pending.append((*choices.taken[:number], not choices.taken[number]))
    return None


def judge_partly(
    rules: tuple[Rule[Field, Capabilities], ...],
    state: Mapping[Field, int],
    partial: Mapping[int, tuple[int, int]],
    widths: Mapping[int, int],
    capabilities: Capabilities,
) -> Verdict[Field, Capabilities]:
    """As `arch.rules.judge`, for a state with missing fields and partly known ones."""
    broken, unchecked = [], []
    for rule in rules:
        if all(field in state for field in rule.reads):
            try:
                answer: bool | None = bool(rule.holds(state, capabilities))
            except KeyError:
                answer = weigh(rule, state, partial, widths, capabilities)
        else:
            answer = weigh(rule, state, partial, widths, capabilities)
        if answer is None:
            unchecked.append(rule)
        elif not answer:
            broken.append(Violation(rule, tuple(state.get(field) for field in rule.reads)))
    return Verdict(broken, unchecked)
