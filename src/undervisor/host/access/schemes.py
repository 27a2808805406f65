"""Machines that other packages can open, by the word before the colon: `lab:l1`.

The command line enters them here, because this package may not know the ones above it.
"""

from __future__ import annotations

from collections.abc import Callable

from undervisor.host.access.protocol import Host

OPENERS: dict[str, Callable[[str], Host]] = {}
"""What opens `scheme:rest`, given all of it; BadInput where it can't."""


def opener(name: str) -> Callable[[str], Host] | None:
    """What opens the machine of that name; None where it is none of these."""
    scheme, colon, _ = name.partition(":")
    return OPENERS.get(scheme) if colon else None
