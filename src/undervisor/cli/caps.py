"""`undervisor caps`: what a processor lets a hypervisor do, and what another one lacks."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any

import typer
from rich.console import Console

from undervisor.arch.vmx.capabilities import CURRENT_PROCESSOR, VmxMsr
from undervisor.arch.vmx.controls import CONTROL_WORDS
from undervisor.arch.vmx.fields import VmcsField
from undervisor.cli.capability_differences import comparison_data, print_comparison
from undervisor.cli.capability_sources import read_source
from undervisor.cli.check import SshConfigOption
from undervisor.cli.printing import console, put, put_json, table
from undervisor.errors import BadInput, ExitCode
from undervisor.explain.capabilities import CapabilitySet
from undervisor.explain.comparison import compare
from undervisor.explain.dump import SVM, VMX
from undervisor.explain.features import (
    SHORT,
    SVM_FEATURES,
    VMX_FEATURES,
    Feature,
    Setting,
    control_capability,
    number_of,
    setting,
)
from undervisor.explain.formats.pairs import number
from undervisor.explain.names import vmx_field
from undervisor.explain.numbers import named_bits

_STYLES = {
    Setting.NO: "dim",
    Setting.ALLOWED: "green",
    Setting.YES: "green",
    Setting.FORCED: "yellow",
    Setting.DEFAULT: "cyan",
    Setting.UNKNOWN: "magenta",
}


def caps(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SOURCE] | diff A B [C] | adjust CONTROL VALUE [SOURCE]",
            help="A source is `here`, `msr`, `kvm`, `cpu:MODEL`, `probe:MODEL`, user@host, "
            "`lab:l1`, a recording's folder, a file (JSON, `rdmsr -a` text, vmxcap's text, "
            "VBox.log), or MSRs: `48b=378ef00000000`",
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also what the processor does not have.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ssh_config: SshConfigOption = "",
) -> None:
    """Decode VMX capability MSRs or the SVM leaf; compare machines; adjust a control word.

    `caps diff A B`: what B (an L1, a destination) lacks that A (its L0, the source) has, and the
    QEMU and libvirt lines that make them equal; with C also what C lacks that B has.
    `caps adjust CONTROL VALUE`: the setting that the processor allows nearest to VALUE.

    Exit code 1: the machines differ, or the value is not allowed as it is.
    """
    words = words or []
    first = words[0] if words else ""
    if first == "diff":
        _diff(words[1:], ssh_config, as_json)
    elif first == "adjust":
        _adjust(words[1:], ssh_config, as_json)
    elif len(words) > 1:
        raise BadInput("one source at a time", hint="`caps diff A B` compares two")
    else:
        _show(read_source(first or "here", ssh_config), everything, as_json)


# --- Showing --------------------------------------------------------------------------------------


def _show(found: CapabilitySet, everything: bool, as_json: bool) -> None:
    if as_json:
        put_json({**found.as_json(), "vendor": found.vendor, "features": _rows_data(found)})
        return
    out = console()
    put(out, f"{found.name}: {found.vendor.upper()}", style="bold")
    if found.physical_width:
        put(out, f"{found.physical_width} physical and {found.linear_width} linear address bits")
    for note in found.notes:
        put(out, note, style="dim")
    _show_differences(out, found)
    _show_features(out, found, everything)


def _values(found: CapabilitySet) -> dict[int, int]:
    if found.vendor == SVM and found.svm is not None:
        return dict(enumerate(found.svm))
    return found.msrs


def _features(found: CapabilitySet) -> tuple[Feature, ...]:
    return SVM_FEATURES if found.vendor == SVM else VMX_FEATURES


def _shown_setting(feature: Feature, values: dict[int, int]) -> str:
    if feature.is_number and feature.word is None:
        value = number_of(feature, values)
        return "unknown" if value is None else f"{value:#x}"
    return setting(feature, values).value


def _place(feature: Feature) -> str:
    bits = feature.bits
    return str(bits.lsb) if bits.lsb == bits.msb else f"{bits.msb}:{bits.lsb}"


def _rows_data(found: CapabilitySet) -> list[dict[str, Any]]:
    values = _values(found)
    return [
        {
            "group": feature.group,
            "msr": f"{feature.msr:#x}" if found.vendor == VMX else feature.group,
            "bits": _place(feature),
            "name": feature.manual,
            "setting": _shown_setting(feature, values),
            "qemu": feature.qemu,
            "cpuinfo": feature.cpuinfo,
        }
        for feature in _features(found)
    ]


def _show_features(out: Console, found: CapabilitySet, everything: bool) -> None:
    values = _values(found)
    group = ""
    rows = table("bit", "name in the manual", "setting", "QEMU", "/proc/cpuinfo")
    for feature in _features(found):
        if feature.group != group:
            if group:
                out.print(rows)
            group = feature.group
            put(out, _heading(feature, values), style="bold")
            rows = table("bit", "name in the manual", "setting", "QEMU", "/proc/cpuinfo")
        text = _shown_setting(feature, values)
        if text == Setting.NO.value and not everything:
            continue
        known = Setting._value2member_map_.get(text)
        style = _STYLES.get(known, "") if isinstance(known, Setting) else ""
        rows.add_row(
            f"  {_place(feature)}", feature.manual, text, feature.qemu, feature.cpuinfo, style=style
        )
    out.print(rows)


def _heading(feature: Feature, values: dict[int, int]) -> str:
    if feature not in VMX_FEATURES:
        return f"{feature.group} = {values.get(feature.msr, 0):#x}"
    value = values.get(feature.msr)
    name = VmxMsr(feature.msr).name
    text = f"{feature.group}: {name} ({feature.msr:#x})"
    return f"{text} = {value:#x}" if value is not None else f"{text}: not read"


def _show_differences(out: Console, found: CapabilitySet) -> None:
    if len(found.cpus) > 1:
        differing = found.differing()
        if not differing:
            put(out, f"{len(found.cpus)} processors, all alike")
        for index, values in differing.items():
            put(out, f"the processors differ in {VmxMsr(index).name} ({index:#x}):", style="red")
            for value, cpus in values.items():
                put(out, f"{value:#x} on {_ranges(cpus)}", indent=2)


def _ranges(numbers: list[int]) -> str:
    """1, 2, 3, 5 as "1-3, 5"."""
    parts: list[list[int]] = []
    for cpu in numbers:
        if parts and cpu == parts[-1][1] + 1:
            parts[-1][1] = cpu
        else:
            parts.append([cpu, cpu])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)


# --- Comparing ----------------------------------------------------------------------------------


def _diff(words: list[str], ssh_config: str, as_json: bool) -> None:
    if len(words) not in (2, 3):
        raise BadInput("diff wants two sources, or three", hint="undervisor caps diff L0 L1 [DEST]")
    sets = [read_source(word, ssh_config) for word in words]
    comparisons = [compare(a, b) for a, b in pairwise(sets)]
    if as_json:
        put_json([comparison_data(comparison) for comparison in comparisons])
    else:
        out = console()
        for comparison in comparisons:
            print_comparison(out, comparison)
    equal = all(comparison.is_equal for comparison in comparisons)
    raise typer.Exit(ExitCode.OK if equal else ExitCode.NEGATIVE)


# --- Adjusting ------------------------------------------------------------------------------------


def _adjust(words: list[str], ssh_config: str, as_json: bool) -> None:
    if len(words) not in (2, 3):
        raise BadInput(
            "adjust wants a control and a value", hint="undervisor caps adjust secondary 0x101e"
        )
    field = SHORT.get(words[0].lower()) or vmx_field(words[0])
    if field is None or field not in CONTROL_WORDS:
        raise BadInput(f"{words[0]} is no control word", hint=", ".join(SHORT))
    value = number(words[1])
    word = CONTROL_WORDS[VmcsField(field)]
    if value is None or value < 0 or value >> word.layout.WIDTH:
        raise BadInput(f"{words[1]} is not a value of {word.layout.WIDTH} bits")
    found = read_source(words[2], ssh_config) if len(words) == 3 else _processor_or_assumed()
    capability = control_capability(word, found.msrs)
    if capability is None:
        raise BadInput(f"{found.name} does not say what {words[0]} controls may be")
    adjusted = capability.adjust(value)
    missing, excess = capability.missing(value), capability.excess(value)
    if as_json:
        put_json(
            {
                "control": VmcsField(field).name,
                "value": f"{value:#x}",
                "must_be_one": f"{capability.must_be_one:#x}",
                "may_be_one": f"{capability.may_be_one:#x}",
                "missing": f"{missing:#x}",
                "excess": f"{excess:#x}",
                "adjusted": f"{adjusted:#x}",
            }
        )
    else:
        out = console()
        put(out, f"{VmcsField(field).name} on {found.name}", style="bold")
        for text, bits in (
            ("value", value),
            ("allowed-0: must be 1", capability.must_be_one),
            ("allowed-1: may be 1", capability.may_be_one),
            ("adjusted: (value | allowed-0) & allowed-1", adjusted),
        ):
            put(out, f"{bits:#018x}  {text}", indent=2)
        for title, bits in (("must be 1 and is 0", missing), ("is 1 and may not be", excess)):
            for place, _, name in named_bits(word.layout, bits, word.default1):
                put(out, f"{title}: bit {place}, {name}", indent=2, style="red")
    raise typer.Exit(ExitCode.OK if adjusted == value else ExitCode.NEGATIVE)


def _processor_or_assumed() -> CapabilitySet:
    """This machine, or where it has no VMX a processor that has everything."""
    try:
        found = read_source("here")
    except BadInput:
        found = CapabilitySet("")
    if found.vendor == VMX:
        return found
    return CapabilitySet(
        "an assumed processor with every current feature", [CURRENT_PROCESSOR.to_msrs()]
    )
