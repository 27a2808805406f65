"""Plain text of `field = value` and JSON, in any order and any style of names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

from undervisor.errors import BadInput
from undervisor.explain.dump import SVM, SVM_WIDTHS, VMX, VMX_WIDTHS, Dump
from undervisor.explain.names import NAME_LIMIT, is_high_half, svm_field, vmx_field

DEPTH = 6
"""How deep JSON objects may be nested."""

_VALUE = re.compile(
    r"(?:==|:=|=>|->|=|:)\s{0,40}(0x[0-9a-fA-F_`']{1,24}|[0-9a-fA-F][0-9a-fA-F_`']{0,23}h?)\b"
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_ .\-/\[\]()>]{0,100}\Z")
_CLEAN = str.maketrans("", "", "_`'")
_LEAST = 1


def number(text: str) -> int | None:
    """The number that a person wrote.

    0x and a trailing h are hexadecimal; so are digits above 9, and 8 or more digits with a leading
    zero.  Anything else is decimal.
    """
    digits = text.strip().translate(_CLEAN).lower()
    try:
        if digits.startswith(("0x", "-")):
            return int(digits, 0)
        if digits.endswith("h"):
            return int(digits[:-1], 16)
        if re.search("[a-f]", digits) or (len(digits) >= 8 and digits[0] == "0"):
            return int(digits, 16)
        if len(digits) == 16:
            return int(digits, 16)
        return int(digits, 10)
    except ValueError:
        return None


def read(lines: list[str]) -> list[Dump]:
    """One dump of all pairs whose name is a field's."""
    pairs = []
    for line in lines:
        if line.lstrip().startswith(("#", "//")):
            continue
        end = 0
        for match in _VALUE.finditer(line):
            name = _NAME.search(line[max(end, match.start() - NAME_LIMIT) : match.start()].strip())
            end = match.end()
            value = number(match[1])
            if value is not None and name is not None:
                pairs.append((name[0], value))
    dump = _from_pairs(pairs, "field = value text")
    return [dump] if len(dump.state) >= _LEAST else []


def read_json(text: str) -> list[Dump]:
    """The dump in a JSON document; nothing where it is not JSON or has no field's name."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return []
    vendor = document.get("vendor", "") if isinstance(document, dict) else ""
    pairs, msrs = [], {}
    for path, value in _leaves(document, (), 0):
        if path and path[0] in ("capabilities", "msrs"):
            index = number(path[-1])
            if index is not None:
                msrs[index] = value
        else:
            pairs.append((" ".join(p for p in path if p not in ("fields", "state")), value))
    dump = _from_pairs(pairs, "JSON", vendor if vendor in (VMX, SVM) else "")
    dump.msrs = msrs
    return [dump] if dump.state else []


def _leaves(
    value: object, path: tuple[str, ...], depth: int
) -> Iterator[tuple[tuple[str, ...], int]]:
    """Paths and numbers of a document."""
    if depth > DEPTH:
        raise BadInput(f"the JSON is nested deeper than {DEPTH} levels")
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, (*path, str(name)), depth + 1)
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from _leaves(inner, (*path, str(place)), depth + 1)
    elif isinstance(value, bool):
        yield path, int(value)
    elif isinstance(value, int):
        yield path, value
    elif isinstance(value, str):
        found = number(value) if re.fullmatch(r"-?[0-9a-fA-FxX_`'h]{1,26}", value) else None
        if found is not None:
            yield path, found


def _from_pairs(pairs: list[tuple[str, int]], name: str, vendor: str = "") -> Dump:
    """The state of the vendor to whose names the pairs fit better."""
    states = {v: _state(pairs, *how) for v, how in _HOW.items()}
    best = vendor or max(states, key=lambda v: len(states[v][0]))
    state, notes = states[best]
    dump = Dump(name, best if state else "", state)
    dump.notes = notes
    return dump


def _vmx_mask(field: int) -> int:
    return (1 << VMX_WIDTHS.get(field, 64)) - 1


def _svm_mask(field: int) -> int:
    return (1 << SVM_WIDTHS[field]) - 1


_HOW: dict[str, tuple[Callable[[str], int | None], Callable[[int], int]]] = {
    VMX: (vmx_field, _vmx_mask),
    SVM: (svm_field, _svm_mask),
}


def _state(
    pairs: list[tuple[str, int]],
    find: Callable[[str], int | None],
    mask: Callable[[int], int],
) -> tuple[dict[int, int], list[str]]:
    state: dict[int, int] = {}
    high: dict[int, int] = {}
    notes: list[str] = []
    for name, value in pairs:
        half = is_high_half(name) if find is vmx_field else None
        if half is not None:
            high[half] = value & 0xFFFF_FFFF
            continue
        field = find(name)
        if field is None:
            continue
        if value & ~mask(field) and value >= 0:
            notes.append(f"{name}: {value:#x} does not fit in the field; its low bits are taken")
        if field in state and state[field] != value & mask(field):
            notes.append(f"{name}: given more than once; the last value counts")
        state[field] = value & mask(field)
    for field, upper in high.items():
        if field in state:
            state[field] = state[field] & 0xFFFF_FFFF | upper << 32
    return state, notes[:20]
