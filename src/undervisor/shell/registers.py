"""L2's general registers, kept between its runs as a hypervisor keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from undervisor.guest.probe.answers import ALL
from undervisor.shell.values import Hex, register_words

MASK: Final = (1 << 64) - 1


class Registers:
    """`regs.rbx` is what L2 is entered with, and after an exit what L2 left.

    RSP is in the VMCS or VMCB; with SVM so is RAX, and what is here is not used.
    """

    def __init__(self) -> None:
        self._values = dict.fromkeys(ALL, 0)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Hex: ...

    def __setattr__(self, name: str, value: object) -> None:
        """A register; AttributeError for a name that is none."""
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        elif name not in ALL:
            raise AttributeError(f"no register {name}: {', '.join(ALL)}")
        elif not isinstance(value, int):
            raise TypeError(f"{name} is a number, not {value!r}")
        else:
            self._values[name] = value & MASK

    def update(self, registers: Mapping[str, int]) -> None:
        """Set several."""
        for name, value in registers.items():
            setattr(self, name, value)

    def as_dict(self) -> dict[str, int]:
        """All of them."""
        return dict(self._values)

    def __repr__(self) -> str:
        return register_words(self._values, ALL)


def _register(name: str) -> property:
    return property(lambda registers: Hex(registers._values[name]), doc=f"L2's {name.upper()}")


for _name in ALL:
    # On the class: completion must find them without reading them.
    setattr(Registers, _name, _register(_name))
