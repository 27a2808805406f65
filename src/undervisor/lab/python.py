"""Python and this toolkit for L1, as archives that are unpacked on top of its image.

It is the interpreter that runs here, with its standard library and what this package requires, as
compiled modules.  Nothing is looked up in a network, and L1 needs no compiler.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Final

from undervisor.errors import BadInput
from undervisor.guest.newc import Archive
from undervisor.lab import vmm
from undervisor.lab.cache import Cache
from undervisor.lab.progress import SILENT, Progress

HOME: Final = "usr/lib/lab-python"
"""The prefix of Python in L1."""
_VERSION: Final = f"python{sys.version_info.major}.{sys.version_info.minor}"
_LIBRARY: Final = f"{HOME}/lib/{_VERSION}"
_SITE: Final = f"{_LIBRARY}/site-packages"

# What a machine that is looked at does not need.
_NOT_STANDARD: Final = frozenset(
    {
        *("__pycache__", "dist-packages", "ensurepip", "idlelib", "lib2to3", "pydoc_data"),
        *("site-packages", "test", "tests", "tkinter", "turtledemo", "unittest", "venv"),
    }
)
_NOT_REQUIRED: Final = {
    "unicorn": "the built-in L0 does not run inside the lab",
    "llvmlite": "nothing is assembled there: 170 MB",
}
_NOT_INSIDE: Final = re.compile(r"pygments/(lexers|styles)/(?!__init__|_mapping|default)")

# In a process of its own with a fixed seed: what `marshal` writes depends on the order of sets and
# on what the interpreter has done before.
_COMPILE: Final = """
import importlib._bootstrap_external as external, sys
for line in sys.stdin.read().splitlines():
    source, name, target = line.split("\\t")
    with open(source, "rb") as file:
        text = file.read()
    try:
        code = compile(text, name, "exec", dont_inherit=True, optimize=0)
    except (SyntaxError, ValueError):
        continue  # templates and samples of wrong Python that some packages carry
    with open(target, "wb") as file:
        file.write(external._code_to_hash_pyc(code, bytes(8), False))
"""

Files = dict[str, Path]
"""Paths in the archive, and the files that go there."""


def archives(cache: Cache, progress: Progress = SILENT) -> tuple[Path, Path]:
    """The interpreter with the packages of others, and this package: it changes more often."""
    own = _own()
    with progress.working("making Python for L1"):
        base = {**_standard(), **dict(_required())}
        return (
            _archive(cache, "python", base, with_interpreter=True),
            _archive(cache, "toolkit", own, with_interpreter=False),
        )


def interpreter(cache: Cache, progress: Progress = SILENT) -> Path:
    """The interpreter with its standard library alone."""
    with progress.working("making Python for L1"):
        return _archive(cache, "interpreter", _standard(), with_interpreter=True)


def _archive(cache: Cache, name: str, members: Files, *, with_interpreter: bool) -> Path:
    sum_ = hashlib.sha256(sys.version.encode())
    for path, source in sorted(members.items()):
        sum_.update(f"{path}\n".encode() + hashlib.sha256(source.read_bytes()).digest())

    def make(place: Path) -> None:
        archive = Archive()
        if with_interpreter:
            _add_interpreter(archive)
        _add_files(archive, members, place.parent)
        place.write_bytes(archive.finish())

    return cache.entry(f"{name}-{sum_.hexdigest()[:16]}.cpio", make)


def _add_interpreter(archive: Archive) -> None:
    """The program under HOME, and commands in /usr/bin that start it."""
    real = Path(sys._base_executable).resolve()  # type: ignore[attr-defined]
    vmm.add_program(archive, real, f"{HOME}/bin/python3")
    start = f"#!/bin/sh\nPYTHONHOME=/{HOME} PYTHONDONTWRITEBYTECODE=1 exec /{HOME}/bin/python3 "
    archive.file("usr/bin/python3", f'{start}"$@"\n'.encode(), program=True)
    archive.file("usr/bin/undervisor", f'{start}-m undervisor "$@"\n'.encode(), program=True)


def _add_files(archive: Archive, members: Files, folder: Path) -> None:
    """Modules compiled, without their sources; everything else as it is."""
    compiled = folder / "compiled"
    compiled.mkdir(exist_ok=True)
    sources = sorted(path for path in members if path.endswith(".py"))
    orders = (f"{members[p]}\t{p}\t{compiled / str(n)}\n" for n, p in enumerate(sources))
    subprocess.run(
        [sys.executable, "-I", "-S", "-c", _COMPILE],
        input="".join(orders).encode(),
        env={"PYTHONHASHSEED": "0"},
        check=True,
        start_new_session=True,  # Ctrl-C is for us, who end it
    )
    for number, path in enumerate(sources):
        made = compiled / str(number)
        if made.exists():
            archive.file(f"{path}c", made.read_bytes())
    for path in sorted(set(members) - set(sources)):
        archive.file(path, members[path].read_bytes())
    _add_libraries(archive, (p for path, p in sorted(members.items()) if ".so" in path))


def _add_libraries(archive: Archive, extensions: Iterable[Path]) -> None:
    for extension in extensions:
        for library in vmm.libraries(extension):
            if str(library) not in archive:
                archive.file(str(library), library.read_bytes(), program=True)


def _standard() -> Files:
    """The standard library with its extension modules."""
    root = Path(sysconfig.get_path("stdlib"))
    found = {}
    for path in root.rglob("*"):
        inside = path.relative_to(root)
        wanted = path.suffix in (".py", ".so") and path.is_file()
        if wanted and not _NOT_STANDARD & set(inside.parts) and "config-3" not in str(inside):
            found[f"{_LIBRARY}/{inside}"] = path
    return found


def _required() -> Iterator[tuple[str, Path]]:
    """The installed files of all packages that this one requires."""
    for name in sorted(_closure("undervisor")):
        for file in metadata.distribution(name).files or ():
            path = Path(str(file.locate()))
            inside = str(file)
            if inside.startswith("..") or "__pycache__" in inside or _NOT_INSIDE.search(inside):
                continue
            if path.is_file() and path.suffix not in (".pyc", ".h", ".pxd", ".pyi", ".c"):
                yield f"{_SITE}/{inside}", path


def _closure(name: str) -> set[str]:
    """The packages behind `name`, without itself, extras and those of `_NOT_REQUIRED`."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        current = waiting.pop()
        try:
            requires = metadata.distribution(current).requires or []
        except metadata.PackageNotFoundError:
            if current == name:
                raise BadInput(f"{name} is not installed as a package") from None
            found.discard(current)  # required under a condition that does not hold here
            continue
        for line in requires:
            match = re.match(r"[A-Za-z0-9._-]+", line)
            needed = re.sub(r"[-_.]+", "-", match[0]).lower() if match else ""
            if needed and "extra ==" not in line and needed not in found | set(_NOT_REQUIRED):
                found.add(needed)
                waiting.append(needed)
    return found


def _own() -> Files:
    """This package, and what says that it is installed."""
    root = Path(__file__).parent.parent
    return {
        f"{_SITE}/undervisor/{path.relative_to(root)}": path
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }
