"""The agent as one file: for a Linux that has Python 3.11 or newer and nothing of ours.

    python3 agent.pyz /dev/vport0p1

What the agent imports of this package, and what that imports, is found by reading the sources; the
same sources give the same bytes.  Beside each source lies its bytecode for the Python that runs
here: in an emulated L1 compiling takes seconds.  Another Python passes it over.
"""

from __future__ import annotations

import ast
import importlib.util
import io
import marshal
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

PACKAGE: Final = "undervisor"
AGENT: Final = "undervisor.targets.kvm.agent"
_ROOT: Final = Path(__file__).parents[3]
_MAIN: Final = f"import sys\nfrom {AGENT} import main\nmain(sys.argv[1:])\n"
_MOMENT: Final = (1980, 1, 1, 0, 0, 0)
"""The time of every member: the earliest that the format has."""


def agent() -> bytes:
    """The archive; a Python runs it as it runs a script."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(_closure(AGENT)):
            name, source = str(path.relative_to(_ROOT)), path.read_bytes()
            archive.writestr(zipfile.ZipInfo(name, _MOMENT), source)
            archive.writestr(zipfile.ZipInfo(f"{name}c", _MOMENT), _bytecode(source, name))
        archive.writestr(zipfile.ZipInfo("__main__.py", _MOMENT), _MAIN)
    return buffer.getvalue()


def _bytecode(source: bytes, name: str) -> bytes:
    """A hash-based .pyc that is not checked (PEP 552)."""
    header = importlib.util.MAGIC_NUMBER + struct.pack("<I", 1) + importlib.util.source_hash(source)
    code = compile(source, name, "exec", dont_inherit=True)
    # Version 2 of the format has no references to earlier objects, which differ from run to run.
    return header + marshal.dumps(code, 2)


def _closure(module: str) -> set[Path]:
    """The files that importing `module` reads, packages on the way included."""
    found: set[Path] = set()
    waiting = [module]
    while waiting:
        for path in _files(waiting.pop()):
            if path not in found:
                found.add(path)
                waiting += _imports(path)
    return found


def _files(name: str) -> Iterator[Path]:
    """The files of a dotted name, which may end in something that a module defines."""
    folder = _ROOT
    for part in name.split("."):
        if (folder / f"{part}.py").exists():
            yield folder / f"{part}.py"
            return
        folder /= part
        if not (folder / "__init__.py").exists():
            return
        yield folder / "__init__.py"


def _imports(path: Path) -> Iterator[str]:
    """The names of ours that a module imports when it is imported: not those for types alone."""
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
