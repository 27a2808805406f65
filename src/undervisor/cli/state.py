"""`undervisor state`: what is in a nested-state blob, and what differs between two."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from undervisor.cli.explain import CapsOption, print_diagnosis
from undervisor.cli.printing import console, put, put_json
from undervisor.errors import BadInput, ExitCode
from undervisor.explain.capability_texts import load_for_rules
from undervisor.explain.diagnosis import diagnose
from undervisor.explain.dump import field_name
from undervisor.explain.formats import nested_state
from undervisor.explain.formats.nested_state import NestedState
from undervisor.explain.report import diagnosis_data

LIMIT = 1 << 20
"""Bytes of a blob; KVM's are at most 8320."""


def state(
    file: Annotated[str, typer.Argument(help="A blob that KVM_GET_NESTED_STATE returned.")],
    other: Annotated[str, typer.Argument(help="Another one, to compare with.")] = "",
    caps: CapsOption = "",
    everything: Annotated[bool, typer.Option("--all", help="Every field.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Decode, validate and compare nested-state blobs (VMX and SVM).

    Exit code 0: valid, or equal. 1: something is wrong with it, or the two differ. 2: not a blob.
    """
    first = load(file)
    if other:
        _compare(first, load(other), file, other, as_json)
        return
    dump = nested_state.read(Path(file).read_bytes())[0]
    diagnosis = diagnose(dump, load_for_rules(caps) if caps else None)
    if as_json:
        put_json({**_data(first), "diagnosis": diagnosis_data(diagnosis)})
    else:
        out = console()
        _print_header(out, first)
        if dump.state:
            print_diagnosis(out, diagnosis, 1, everything)
        if everything:
            _print_fields(out, first)
    good = diagnosis.is_clean and not first.problems
    raise typer.Exit(ExitCode.OK if good else ExitCode.NEGATIVE)


def load(path: str) -> NestedState:
    """The blob in a file; BadInput where it is none."""
    try:
        with Path(path).open("rb") as file:
            raw = file.read(LIMIT + 1)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise BadInput(f"{path!r}: {error}") from None
    if len(raw) > LIMIT or not nested_state.looks_like(raw):
        raise BadInput(
            f"{path} is not a nested-state blob",
            hint="the header has 128 bytes and says 128, 4224 or 8320 for the whole",
        )
    return nested_state.decode(raw)


def _flags(found: NestedState) -> list[str]:
    return [bits.about for bits in type(found.flags).FIELDS.values() if found.flags & bits.mask]


def _data(found: NestedState) -> dict[str, Any]:
    return {
        "vendor": found.vendor,
        "size": found.size,
        "flags": _flags(found),
        "header": {name: f"{value:#x}" for name, value in found.header.items()},
        "problems": found.problems,
    }


def _print_header(out: Console, found: NestedState) -> None:
    put(out, f"nested state, {found.vendor.upper()} format, {found.size} bytes", style="bold")
    for text in _flags(found):
        put(out, text, indent=2)
    for name, value in found.header.items():
        put(out, f"{name} = {value:#x}", indent=2)
    for problem in found.problems:
        put(out, f"problem: {problem}", indent=2, style="red")


def _print_fields(out: Console, found: NestedState) -> None:
    for field, value in found.state().items():
        put(out, f"{field_name(field, found.vendor)} = {value:#x}", indent=2)


def _compare(first: NestedState, second: NestedState, one: str, two: str, as_json: bool) -> None:
    if first.vendor != second.vendor:
        raise BadInput(f"{one} is of {first.vendor.upper()} and {two} of {second.vendor.upper()}")
    rows = [
        (name, first.header[name], second.header[name])
        for name in first.header
        if first.header[name] != second.header[name]
    ]
    if first.flags != second.flags:
        rows.insert(0, ("flags", int(first.flags), int(second.flags)))
    if first.size != second.size:
        rows.insert(0, ("size", first.size, second.size))
    mine, other = first.state(), second.state()
    rows += [
        (field_name(field, first.vendor), mine[field], other[field])
        for field in mine
        if field in other and mine[field] != other[field]
    ]
    if first.shadow != second.shadow:
        rows.append(("shadow vmcs12", len(first.shadow), len(second.shadow)))
    if as_json:
        put_json([{"name": n, "first": hex(a), "second": hex(b)} for n, a, b in rows])
    else:
        out = console()
        put(out, f"{len(rows)} differences" if rows else "no difference", style="bold")
        for name, a, b in rows:
            put(out, f"{name}: {a:#x} and {b:#x}", indent=2)
    raise typer.Exit(ExitCode.NEGATIVE if rows else ExitCode.OK)
