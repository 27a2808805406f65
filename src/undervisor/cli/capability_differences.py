"""A comparison of two processors, as text and as JSON."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from undervisor.cli.printing import put, table
from undervisor.explain.comparison import (
    Comparison,
    Difference,
    cpu_option,
    libvirt_lines,
    qemu_switches,
)


def _difference_data(difference: Difference) -> dict[str, str]:
    return {
        "name": difference.feature.manual,
        "where": difference.bit,
        "first": difference.ours,
        "second": difference.theirs,
        "qemu": difference.feature.qemu,
        "cpuinfo": difference.feature.cpuinfo,
        "happens": difference.consequence.happens,
        "remedy": difference.consequence.remedy,
    }


def comparison_data(comparison: Comparison) -> dict[str, Any]:
    """The comparison for JSON."""
    equal, common = qemu_switches(comparison), qemu_switches(comparison, common=True)
    return {
        "first": comparison.first,
        "second": comparison.second,
        "lost": [_difference_data(one) for one in comparison.lost],
        "gained": [_difference_data(one) for one in comparison.gained],
        "widths": [
            {
                "kind": w.kind,
                "first": w.ours,
                "second": w.theirs,
                "happens": w.happens,
                "remedy": w.remedy,
            }
            for w in comparison.widths
        ],
        "not_compared": comparison.unknown,
        "give_to_second": {"qemu": cpu_option(equal), "libvirt": libvirt_lines(equal)},
        "take_from_first": {"qemu": cpu_option(common), "libvirt": libvirt_lines(common)},
    }


def print_comparison(out: Console, comparison: Comparison) -> None:
    """What is lost, what follows, and what to type."""
    put(out, f"{comparison.second}, held against {comparison.first}", style="bold")
    if comparison.is_equal:
        put(out, "no difference in what both report", indent=2, style="green")
    if comparison.lost:
        put(out, f"lacks {len(comparison.lost)}:", indent=2, style="red")
        rows = table("name in the manual", "where", "first", "second", "QEMU")
        for one in comparison.lost:
            rows.add_row(
                f"    {one.feature.manual}", one.bit, one.ours, one.theirs, one.feature.qemu
            )
        out.print(rows)
        _print_consequences(out, comparison)
    for width in comparison.widths:
        put(
            out,
            f"{width.kind} address width: {width.ours} bits and {width.theirs} bits",
            indent=2,
            style="red",
        )
        put(out, width.happens, indent=6)
        put(out, "→ " + width.remedy, indent=6)
    if comparison.gained:
        names = ", ".join(one.feature.qemu or one.feature.manual for one in comparison.gained)
        put(out, f"has more: {names}", indent=2, style="cyan")
    if comparison.unknown:
        put(out, "not compared, because one lacks it: " + ", ".join(comparison.unknown), indent=2)
    _print_lines(out, comparison)


def _print_consequences(out: Console, comparison: Comparison) -> None:
    """What the gravest losses do; the same consequence once."""
    told: set[str] = set()
    for one in comparison.lost:
        if one.consequence.happens in told or len(told) >= 6:
            continue
        told.add(one.consequence.happens)
        put(out, f"{one.feature.manual}: {one.consequence.happens}", indent=2)
        if one.consequence.remedy:
            put(out, "→ " + one.consequence.remedy, indent=6)


def _print_lines(out: Console, comparison: Comparison) -> None:
    equal, common = qemu_switches(comparison), qemu_switches(comparison, common=True)
    if equal:
        put(out, "to give it to the second:", indent=2)
        put(out, "-cpu ...," + cpu_option(equal), indent=6)
        for line in libvirt_lines(equal):
            put(out, line, indent=6)
    if common:
        put(out, "or, for a guest that must run on both:", indent=2)
        put(out, "-cpu ...," + cpu_option(common), indent=6)
        for line in libvirt_lines(common):
            put(out, line, indent=6)
