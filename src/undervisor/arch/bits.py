"""Registers as declarations: `Register` and `Bits`, the only metaprogramming of the package.

    class FeatureControl(Register):
        lock = Bits(0)
        vmx_outside_smx = Bits(2)

A register value *is* an `int`, immutable, and its fields read as attributes.  Bits that no field
declares are reserved.  A declaration with overlapping or too wide fields fails at import.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, ClassVar, Self, TypeVar

Members = TypeVar("Members", bound=type[Enum])


def plain_members(enumeration: Members) -> Members:
    """Make reading a member through its class a plain look-up, as it is from Python 3.12 on.

    Before, it runs a descriptor written in Python, which the tables of the manuals feel: hot
    paths name their members a million times a second.
    """
    for name, member in enumeration.__members__.items():
        type.__setattr__(enumeration, name, member)
    return enumeration


class Bits:
    """An inclusive bit range `msb:lsb`, written as the manual writes it.

    `about` is the manual's name for the field, where the attribute's name is not enough.
    """

    __slots__ = ("about", "lsb", "mask", "msb", "name")

    def __init__(self, msb: int, lsb: int | None = None, about: str = "") -> None:
        self.msb = msb
        self.lsb = msb if lsb is None else lsb
        if self.lsb < 0 or self.msb < self.lsb:
            raise TypeError(f"bits {self.msb}:{self.lsb} are not a range")
        self.mask = ((1 << (self.msb - self.lsb + 1)) - 1) << self.lsb
        self.about = about
        self.name = ""

    def __set_name__(self, owner: type[Register], name: str) -> None:
        self.name = name

    def __get__(self, register: Register | None, owner: type[Register]) -> int:
        """The field's value in `register`; on the class itself, the field's mask."""
        return self.mask if register is None else (register & self.mask) >> self.lsb


class Register(int):
    """An immutable register value; undeclared bits are reserved."""

    WIDTH: ClassVar[int] = 64
    FIELDS: ClassVar[dict[str, Bits]] = {}
    DECLARED: ClassVar[int] = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.FIELDS = cls.FIELDS | {k: v for k, v in vars(cls).items() if isinstance(v, Bits)}
        used = 0
        for name, bits in cls.FIELDS.items():
            if bits.msb >= cls.WIDTH or used & bits.mask:
                where = f"{cls.__name__}.{name}: bits {bits.msb}:{bits.lsb}"
                raise TypeError(f"{where} overlap or exceed {cls.WIDTH}")
            used |= bits.mask
        cls.DECLARED = used

    @classmethod
    def reserved(cls) -> int:
        """The mask of all bits that no field declares."""
        return ((1 << cls.WIDTH) - 1) & ~cls.DECLARED

    @classmethod
    def of(cls, **fields: int) -> Self:
        """The value with `fields` set and all other bits clear."""
        return cls(0).replace(**fields)

    def replace(self, **fields: int) -> Self:
        """The same value with `fields` changed; ValueError where one does not fit."""
        value = int(self)
        for name, new in fields.items():
            bits = self.FIELDS[name]
            if new & ~(bits.mask >> bits.lsb):
                raise ValueError(
                    f"{type(self).__name__}.{name}: {new:#x} does not fit in {bits.msb}:{bits.lsb}"
                )
            value = value & ~bits.mask | new << bits.lsb
        return type(self)(value)

    def names(self) -> list[str]:
        """The names of the fields that are not zero, lowest bit first."""
        return [name for name, bits in self.FIELDS.items() if self & bits.mask]

    def __repr__(self) -> str:
        on = " ".join(
            f"{n}={(self & b.mask) >> b.lsb:#x}" for n, b in self.FIELDS.items() if self & b.mask
        )
        return f"{type(self).__name__}({int(self):#x}{' ' if on else ''}{on})"
