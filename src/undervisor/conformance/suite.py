"""Guest tests as declarations: what each stands on, what it needs, and how all are found."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, Final, TypeVar

from undervisor.errors import BadInput

VENDORS: Final = ("vmx", "svm")
SECONDS: Final = 20.0
"""The time that a test has on the built-in L0, unless it says more; targets multiply it."""

Function = TypeVar("Function", bound=Callable[..., None])


@dataclass(frozen=True, slots=True)
class Need:
    """Something that the machine under test must have: `present` asks the machine itself."""

    name: str
    present: Callable[[Any], bool] = field(compare=False)


@dataclass(frozen=True, slots=True)
class GuestTest:
    """One test: `id` is vendor, aspect and name; `case` is the parameter of one of several.

    `refs` are the manual's sections that it stands on, `title` what they demand, `cpus` how many
    processors it uses, `seconds` how long it may take.
    """

    id: str
    vendor: str
    aspect: str
    title: str
    refs: tuple[str, ...]
    function: Callable[..., None] = field(compare=False)
    case: object = field(default=None, compare=False)
    has_case: bool = False
    cpus: int = 1
    needs: tuple[Need, ...] = ()
    seconds: float = SECONDS

    def run(self, lab: object) -> None:
        """Run it in `lab`; returns where the machine did all that is demanded."""
        if self.has_case:
            self.function(lab, self.case)
        else:
            self.function(lab)


_DECLARED: Final[list[GuestTest]] = []


def guest_test(
    *refs: str,
    needs: Iterable[Need] = (),
    cpus: int | Callable[[Any], int] = 1,
    cases: Mapping[str, object] | None = None,
    seconds: float = SECONDS,
) -> Callable[[Function], Function]:
    """Declare the decorated function as a test; with `cases`, one for each, named `name[case]`.

    `refs`: titles of the manual's sections, with the manual in front ("SDM: ...", "APM: ...").
    `cpus`: processors needed, or a function of the case.
    """

    def declare(function: Function) -> Function:
        *_, vendor, aspect = "", *function.__module__.split(".")
        name = f"{vendor}.{aspect}.{function.__name__}"
        title = " ".join((function.__doc__ or "").split("\n\n")[0].split())
        if not refs or not title:
            raise TypeError(f"{name}: a guest test names its sections and says what they demand")
        for case_name, case in (cases or {"": None}).items():
            _DECLARED.append(
                GuestTest(
                    f"{name}[{case_name}]" if case_name else name,
                    vendor,
                    aspect,
                    title,
                    refs,
                    function,
                    case,
                    cases is not None,
                    cpus(case) if callable(cpus) else cpus,
                    tuple(needs),
                    seconds,
                )
            )
        return function

    return declare


@lru_cache(maxsize=1)
def all_tests() -> tuple[GuestTest, ...]:
    """Every test, in the order of the modules and, in each, of the source."""
    for vendor in VENDORS:
        package = importlib.import_module(f"undervisor.conformance.{vendor}")
        for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
            importlib.import_module(f"undervisor.conformance.{vendor}.{module.name}")
    order = {vendor: number for number, vendor in enumerate(VENDORS)}
    tests = sorted(_DECLARED, key=lambda test: (order[test.vendor], test.aspect))
    twice = {test.id for test in tests if sum(other.id == test.id for other in tests) > 1}
    if twice:
        raise TypeError(f"declared twice: {', '.join(sorted(twice))}")
    return tuple(tests)


def select(patterns: Iterable[str] = ()) -> tuple[GuestTest, ...]:
    """The tests whose id contains, or matches with wildcards, one of `patterns`; all without.

    BadInput for a pattern that matches none.
    """
    wanted = list(patterns)
    if not wanted:
        return all_tests()
    chosen = set()
    for pattern in wanted:
        found = {test.id for test in all_tests() if _matches(test.id, pattern)}
        if not found:
            raise BadInput(
                f"no test matches {pattern!r}", hint="`undervisor test --list` shows all of them"
            )
        chosen |= found
    return tuple(test for test in all_tests() if test.id in chosen)


def _matches(name: str, pattern: str) -> bool:
    # Brackets are part of the names of cases, not sets of characters.
    literal = pattern.replace("[", "[[]")
    return pattern in name or fnmatchcase(name, literal) or fnmatchcase(name, f"*{literal}*")
