"""What is known about a machine, and in which way something is not known.

Known(value)   read, with its source
Absent         looked, and it is not there (ENOENT, ENOTDIR, ENXIO, ENODEV)
Denied         it may be there, but this user may not look (EACCES, EPERM)
Unknown        looking failed or was not possible: why, and what would make it known
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class Known(Generic[T]):
    """A fact and where it was read."""

    value: T
    source: str = ""


@dataclass(frozen=True, slots=True)
class Absent:
    """The thing is not there; `source` is where we looked."""

    source: str

    def __str__(self) -> str:
        return f"{self.source}: not there"


@dataclass(frozen=True, slots=True)
class Denied:
    """This user may not look."""

    source: str
    how_to_know: str = "run it as root"

    def __str__(self) -> str:
        return f"{self.source}: permission denied; {self.how_to_know}"


@dataclass(frozen=True, slots=True)
class Unknown:
    """Looking failed (`code` is the errno's name) or was not possible."""

    source: str
    why: str
    how_to_know: str = ""
    code: str = ""

    def __str__(self) -> str:
        return f"{self.source}: {self.why}" + (f"; {self.how_to_know}" if self.how_to_know else "")


Missing: TypeAlias = Absent | Denied | Unknown
Fact: TypeAlias = Known[T] | Absent | Denied | Unknown

_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ENXIO, errno.ENODEV}
_DENIED = {errno.EACCES, errno.EPERM}


def from_errno(number: int, source: str) -> Missing:
    """The fact behind an errno."""
    if number in _ABSENT:
        return Absent(source)
    if number in _DENIED:
        return Denied(source)
    return Unknown(source, os.strerror(number), code=errno.errorcode.get(number, str(number)))


def value_or(fact: Fact[T], default: U) -> T | U:
    """The value, or `default` where there is none for whatever reason."""
    return fact.value if isinstance(fact, Known) else default


def then(fact: Fact[T], convert: Callable[[T], U]) -> Fact[U]:
    """`convert` applied to a known value; anything else unchanged; a value that `convert` refuses
    with ValueError is unknown."""
    if not isinstance(fact, Known):
        return fact
    try:
        return Known(convert(fact.value), fact.source)
    except ValueError as error:
        return Unknown(fact.source, f"cannot be understood: {error}")


def unknowable(fact: Fact[T]) -> Denied | Unknown | None:
    """`fact` if it is one that more privilege or another try could still tell; else None."""
    return fact if isinstance(fact, Denied | Unknown) else None
