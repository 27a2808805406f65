"""CPU models as QEMU's users write them: `intel,+pcid,-xsave,vmx-ept=off,phys-bits=39`.

Beside features: `phys-bits`, `family`, `model` and `stepping` with a number, `model-id` with the
brand string.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import lru_cache
from typing import Final

from undervisor.arch.x86.cpuid import ALIASES, DYNAMIC
from undervisor.errors import BadInput
from undervisor.hypervisor.models.catalog import ROWS, build
from undervisor.hypervisor.models.dependencies import NEEDS, ONLY, consistent
from undervisor.hypervisor.models.model import CpuModel
from undervisor.hypervisor.models.support import FOREIGN, SUPPORTED, UNSUPPORTED

LONGEST: Final = 4096
"""Characters of a specification; longer ones are refused."""

PHYS_BITS: Final = range(32, 41)
"""Physical-address widths that the silicon's paging can serve."""

NUMBERS: Final[dict[str, range]] = {
    "phys-bits": PHYS_BITS,
    "family": range(0x10F),
    "model": range(0x100),
    "stepping": range(0x10),
}
"""Options with a number, and the numbers that can be had."""

BRAND: Final = "model-id"
BRAND_LENGTH: Final = 47

_SWITCH: Final = {"on": True, "off": False, "yes": True, "no": False, "true": True, "false": False}

SPELLINGS: Final[dict[str, str]] = {
    **ALIASES,
    "vmx-invept-single-context-noglobals": "vmx-invvpid-single-context-noglobals",
    "vmx-enable-user-wait-pause": "vmx-user-wait-pause",
}
"""Names that other tools use for a feature of ours."""

_REFUSED: Final = UNSUPPORTED | FOREIGN
_KNOWN: Final = SUPPORTED | _REFUSED.keys() | DYNAMIC


@dataclass(slots=True)
class Overrides:
    """What a specification asks for beyond the model's name."""

    on: dict[str, None] = field(default_factory=dict)
    off: dict[str, None] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    brand: str | None = None


@lru_cache(maxsize=64)
def named(spec: str) -> CpuModel:
    """The CPU model that `spec` describes; BadInput where there is none such."""
    if len(spec) > LONGEST:
        raise BadInput(f"CPU model is {len(spec)} characters long; at most {LONGEST} are read")
    name, *items = (part.strip() for part in spec.split(","))
    if name not in ROWS:
        raise BadInput(f"unknown CPU model {_show(name)}", hint=_nearest(name, ROWS))
    model = build(name)
    if not items:
        return model
    return _apply(model, spec, _parse(items))


def names() -> list[str]:
    """The named models."""
    return list(ROWS)


def _parse(items: Iterable[str]) -> Overrides:
    """`+feature`, `-feature`, `feature=on`, `feature` and `phys-bits=N`."""
    wanted = Overrides()
    for item in items:
        name, equals, value = item.partition("=")
        if not item:
            raise BadInput("empty item in the CPU model", hint="write +feature or feature=on")
        if equals and name in NUMBERS:
            wanted.numbers[name] = _number(name, value)
            continue
        if equals and name == BRAND:
            wanted.brand = _brand(value)
            continue
        if item[0] in "+-" and equals:
            raise BadInput(f"{_show(item)} has both a sign and a value", hint="use one of them")
        switch = item[0] != "-" if not equals else _SWITCH.get(value.lower())
        if switch is None:
            raise BadInput(f"{_show(item)} is neither on nor off", hint="write =on or =off")
        _record(wanted, _feature(name.lstrip("+-") if not equals else name), switch)
    return wanted


def _record(wanted: Overrides, name: str, switch: bool) -> None:
    """Note one switch; refuse what contradicts an earlier one or can't be had."""
    mine, other = (wanted.on, wanted.off) if switch else (wanted.off, wanted.on)
    if name in other:
        raise BadInput(f"CPU feature {name} is switched both on and off")
    if switch and name in _REFUSED:
        raise BadInput(
            f"CPU feature {name} can't be offered: {_REFUSED[name]}",
            hint=_nearest(name, SUPPORTED),
        )
    if switch and name in DYNAMIC:
        raise BadInput(f"CPU feature {name} mirrors the machine's state and can't be switched on")
    mine[name] = None


def _feature(text: str) -> str:
    """The feature that `text` names, in our spelling."""
    for name in (text, text.lower(), text.lower().replace("_", "-")):
        name = SPELLINGS.get(name, name)
        if name in _KNOWN:
            return name
    raise BadInput(f"unknown CPU feature {_show(text)}", hint=_nearest(text, SUPPORTED))


def _number(name: str, text: str) -> int:
    """The value of an option with a number, decimal or hexadecimal."""
    allowed = NUMBERS[name]
    if re.fullmatch(r"\d{1,3}|0[xX][0-9a-fA-F]{1,3}", text, re.ASCII):
        value = int(text, 16 if text[:2] in ("0x", "0X") else 10)
        if value in allowed:
            return value
    hint = f"{allowed[0]} to {allowed[-1]} can"
    raise BadInput(f"{name}={_show(text)} can't be had", hint=hint)


def _brand(text: str) -> str:
    """The value of model-id."""
    if len(text) <= BRAND_LENGTH and text.isascii() and text.isprintable():
        return text
    hint = f"at most {BRAND_LENGTH} printable ASCII characters can"
    raise BadInput(f"{BRAND}={_show(text)} can't be had", hint=hint)


def _apply(model: CpuModel, spec: str, wanted: Overrides) -> CpuModel:
    """The model with the overrides; what depends on a dropped feature goes with it."""
    for name in wanted.on:
        if ONLY.get(name, model.vendor) is not model.vendor:
            raise BadInput(
                f"CPU feature {name} is not of {model.vendor.value} processors, as {model.name} is",
                hint=f"use a model of {ONLY[name].value}",
            )
    asked = (model.features | wanted.on.keys()) - wanted.off.keys()
    features = consistent(asked)
    for name in wanted.on:
        if name not in features:
            _refuse(name, asked, wanted)
    numbers, who = wanted.numbers, model.identity
    identity = replace(
        who,
        family=numbers.get("family", who.family),
        model=numbers.get("model", who.model),
        stepping=numbers.get("stepping", who.stepping),
        brand=who.brand if wanted.brand is None else wanted.brand,
    )
    return replace(
        model,
        spec=spec,
        features=features,
        identity=identity.reaching(features),
        physical_width=numbers.get("phys-bits", model.physical_width),
    )


def _refuse(name: str, asked: frozenset[str], wanted: Overrides) -> None:
    """Say what a feature that was switched on lacks."""
    lacking = sorted(_closure(name) - asked)
    off = [other for other in lacking if other in wanted.off]
    if off:
        raise BadInput(f"CPU feature {name} needs {', '.join(off)}, which is switched off")
    more = ",".join(f"+{other}" for other in lacking)
    raise BadInput(f"CPU feature {name} needs {', '.join(lacking)}", hint=f"add {more}")


def _closure(name: str) -> frozenset[str]:
    """Everything that a feature needs, directly or not."""
    found: set[str] = set()
    todo = [name]
    while todo:
        for other in NEEDS.get(todo.pop(), frozenset()) - found:
            found.add(other)
            todo.append(other)
    return frozenset(found - {name})


def _nearest(text: str, candidates: Iterable[str]) -> str:
    """A hint with the names that look most like `text`."""
    close = get_close_matches(text[:64].lower(), sorted(candidates), n=3, cutoff=0.5)
    return f"nearest: {', '.join(close)}" if close else "none is near; the manual lists them"


def _show(text: str) -> str:
    """Hostile text on one short line."""
    return repr(text if len(text) <= 40 else text[:37] + "...")
