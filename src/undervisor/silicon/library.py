"""The Unicorn library: the one release we know, its internal functions, and the check of both.

The wheel exports every internal symbol of the emulator.  `function` binds one; `Library` is opened
once per process and says clearly what is wrong when it is not the library that we know.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from typing import Any

import unicorn
from unicorn.unicorn_py3 import unicorn as binding

from undervisor.errors import SiliconDied

KNOWN_VERSION = (2, 1, 4)
KNOWN_MACHINE = ("Linux", "x86_64")

_POINTER = ctypes.c_void_p
_U32 = ctypes.c_uint32
_U64 = ctypes.c_uint64

# Internal functions that the glue calls: name, result, arguments.
FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "x86_cpu_do_interrupt": (None, (_POINTER,)),
    "do_interrupt_x86_hardirq": (None, (_POINTER, ctypes.c_int, ctypes.c_int)),
    "cpu_vmexit": (None, (_POINTER, _U32, _U64, _POINTER)),
    "helper_read_eflags": (_U64, (_POINTER,)),
    "helper_vmrun": (None, (_POINTER, ctypes.c_int, ctypes.c_int)),
    "tlb_flush": (None, (_POINTER,)),
    "tlb_flush_page": (None, (_POINTER, _U64)),
    "tlb_set_page": (None, (_POINTER, _U64, _U64, ctypes.c_int, ctypes.c_int, _U64)),
    "tb_invalidate_phys_range": (None, (_POINTER, _U64, _U64)),
}


def check_version() -> None:
    """Raise `SiliconDied` unless this is the release and the machine that we know."""
    version = (*unicorn.uc_version()[:2], int(unicorn.__version__.split(".")[2]))
    machine = (platform.system(), platform.machine())
    if version != KNOWN_VERSION or machine != KNOWN_MACHINE:
        found = ".".join(map(str, version)) + " on " + " ".join(machine)
        known = ".".join(map(str, KNOWN_VERSION)) + " on " + " ".join(KNOWN_MACHINE)
        raise SiliconDied(
            f"the installed unicorn is {found}; the silicon is built on {known}",
            hint=f"pip install unicorn=={'.'.join(map(str, KNOWN_VERSION))}",
        )


def symbol(name: str) -> Any:
    """The foreign function `name` of the x86-64 emulator; `SiliconDied` where there is none."""
    try:
        return binding.uclib[f"{name}_x86_64"]
    except AttributeError:
        raise SiliconDied(
            f"the unicorn library has no internal function {name}",
            hint="this wheel is stripped or not ours; reinstall unicorn==2.1.4 from its wheel",
        ) from None


@cache
def function(name: str) -> Any:
    """The internal function `name`, typed as `FUNCTIONS` says."""
    bound = symbol(name)
    bound.restype, bound.argtypes = FUNCTIONS[name]
    return bound


def check_symbols() -> None:
    """Raise `SiliconDied` unless every function that we may ever call is there."""
    for name in FUNCTIONS:
        symbol(name)


def address(name: str) -> int:
    """Where the internal function `name` is in this process."""
    return ctypes.cast(symbol(name), ctypes.c_void_p).value or 0


def api(name: str) -> Any:
    """A function of Unicorn's public C interface, not yet typed."""
    return ctypes.CDLL(binding.uclib._name)[name]
