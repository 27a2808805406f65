"""Kernel modules: which ones a module needs, in the order in which they load.

A module says it itself, in its section `.modinfo` (`depends=kvm,irqbypass`); no depmod is run.
"""

from __future__ import annotations

import gzip
import lzma
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from undervisor.errors import BadInput

_DEPENDS = re.compile(rb"(?:^|\0)depends=([^\0]*)\0")
_UNPACK: Mapping[str, Callable[[bytes], bytes]] = {
    ".ko": lambda data: data,
    ".ko.xz": lzma.decompress,
    ".ko.gz": gzip.decompress,
}


def canonical(name: str) -> str:
    """`kvm-amd` and `kvm_amd` are one module."""
    return name.replace("-", "_")


def find(root: Path) -> dict[str, Path]:
    """Every module below `root` by its name; BadInput where there is none to be read."""
    found = {
        canonical(path.name.split(".ko")[0]): path
        for path in sorted(root.rglob("*.ko*"))
        if path.is_file()
    }
    if not found:
        raise BadInput(f"no kernel modules below {root}", hint="it should hold kernel/.../*.ko")
    return found


def read(path: Path) -> bytes:
    """The module, unpacked."""
    kind = path.name[path.name.index(".ko") :]
    if kind not in _UNPACK:
        raise BadInput(
            f"{path} is compressed as {kind}, which can't be unpacked here",
            hint="unpack the modules: `zstd -d --rm FILE`",
        )
    try:
        return _UNPACK[kind](path.read_bytes())
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise BadInput(f"cannot read {path}: {error}") from None


def depends(module: bytes) -> tuple[str, ...]:
    """The modules that `module` names as those it needs."""
    found = _DEPENDS.search(module)
    names = found[1].decode("ascii", "replace").split(",") if found else []
    return tuple(canonical(name) for name in names if name)


def in_order(available: Mapping[str, Path], wanted: Iterable[str]) -> dict[str, bytes]:
    """Modules by name in an order in which each may be loaded.

    A wanted module that is not `available` is left out: it is built into this kernel, or this
    kernel does not have it, and what it would do tells which.
    """
    ordered: dict[str, bytes] = {}

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in ordered or name not in available:
            return
        if name in above:
            raise BadInput(f"modules need each other: {' -> '.join((*above, name))}")
        data = read(available[name])
        for needed in depends(data):
            visit(needed, (*above, name))
        ordered[name] = data

    for name in wanted:
        visit(canonical(name), ())
    return ordered
