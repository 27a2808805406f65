"""No process of ours outlives the one that it works for."""

from __future__ import annotations

import ctypes
import os
import signal
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_libc: Final = ctypes.CDLL(None, use_errno=True)


def die_with(parent: int) -> None:
    """In a child: the kernel kills this process when the thread of `parent` that made it ends.

    `parent` is its process number, taken before the fork.  A parent that died before the kernel
    knew is found out here, and the process ends.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
