"""What `undervisor test` writes to files."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from undervisor.errors import BadInput

if TYPE_CHECKING:
    from undervisor.conformance.runner import Result


def write_pages(folder: Path, found: Sequence[Result]) -> None:
    """The table, a page for each disagreement, the record; what was not run is kept from there."""
    from undervisor.cli.versions import version_of
    from undervisor.conformance.compare import compare
    from undervisor.conformance.record import NAME, Record, from_json, renewed

    comparison = compare(found)
    command = shlex.join(["undervisor", *sys.argv[1:]])
    versions = {column: version_of(column) for column in comparison.columns}
    record = Record(comparison, command, versions)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / NAME).exists():
            text = (folder / NAME).read_text(encoding="utf-8")
            record = renewed(from_json(text, without_gone=True), record, str(folder))
        made = dict(record.files())
        for old in folder.glob("*.md"):
            if old.name not in made and old.name.startswith(("vmx.", "svm.")):
                old.unlink()
    except OSError as error:
        raise BadInput(f"{folder} cannot be used: {error.strerror}") from None
    for name, text in made.items():
        write(folder / name, text, tell=False)
    print(f"written: {len(made)} files in {folder}", file=sys.stderr)


def write(path: Path, text: str, *, tell: bool = True) -> None:
    """The whole file or none of it."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise BadInput(f"{path} cannot be written: {error.strerror}") from None
    if tell:
        print(f"written: {path}", file=sys.stderr)
