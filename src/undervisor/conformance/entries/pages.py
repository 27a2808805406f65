"""The page of the recorded comparison: `python -m undervisor.conformance.entries.pages docs`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from undervisor.conformance.entries.comparison import RULES, Column, Comparison, recorded
from undervisor.conformance.entries.session import Result
from undervisor.conformance.entries.settled import settlement

NAME: Final = "rules-compared.md"
_INTRODUCTION: Final = """# The rules, broken on running processors

Each rule of VM entry and VMRUN is broken, alone, in a state that the processor has entered just
before. A small guest hypervisor, the [probe](probe.md), performs the entry, and what happens is
held against what the rule declares: VMfailValid with its error, the VM-entry failure with its exit
reason and qualification, the VMX abort, or VMEXIT_INVALID.

`undervisor rules --on builtin --on bochs --on qemu` does it and prints this table; with
`--on TARGET --cpu MODEL` on any processor. The comparison below was made by that command with
`--json`, is kept in `src/undervisor/data/rules-compared.json`, and this page is generated from it.

"Not applicable" means that no state of the target's processors breaks the rule, or none breaks it
alone; why is said [below](#not-applicable). Nothing is passed over in silence. Of an MSR list one
entry is bad: those of `x2apic` and `smm-only` could not be written by WRMSR or read by RDMSR
either, so that there `writable` or `readable` is broken as well.
"""

_HALF_A_CODE: Final = """One difference is not counted with any rule. EXITCODE is the 64-bit field
at 070H of the VMCB, and VMEXIT_INVALID is -1 (APM, "Layout of VMCB", "SVM Intercept Exit Codes").
QEMU writes FFFFFFFFH and leaves the upper half zero, for every rule that it knows: its refusals are
taken as what they are meant to be."""


def page(comparison: Comparison) -> str:
    """The whole page."""
    parts = [_INTRODUCTION, *_summary(comparison), *_disagreements(comparison)]
    parts += [*_table(comparison), *_reasons(comparison)]
    return "\n".join(parts).rstrip() + "\n"


def _summary(comparison: Comparison) -> Iterator[str]:
    yield "| target | processors | " + " | ".join(result.value for result in Result) + " |"
    yield "|---|---|" + "---|" * len(Result)
    for column in comparison:
        for vendor in RULES:
            counts = [column.count(vendor, result) for result in Result]
            if any(counts):
                cpus = dict.fromkeys(
                    cell.cpu for rule, cell in column.cells.items() if rule in RULES[vendor]
                )
                cells = " | ".join(str(count) for count in counts)
                name = f"{column.target}, {vendor.upper()} ({column.version})"
                yield f"| {name} | {', '.join(f'`{cpu}`' for cpu in cpus)} | {cells} |"
    yield ""
    yield _HALF_A_CODE
    yield ""


def _disagreements(comparison: Comparison) -> Iterator[str]:
    yield "## Disagreements"
    yield ""
    rules = dict.fromkeys(
        rule
        for names in RULES.values()
        for rule in names
        for column in comparison
        if rule in column.cells and column.cells[rule].result is Result.DIFFERS
    )
    for rule in rules:
        yield f"### {rule}"
        yield ""
        for column in comparison:
            cell = column.cells.get(rule)
            if cell is not None and cell.result is Result.DIFFERS:
                words = f"{column.target} (`{cell.cpu}`): {cell.seen}; the rule: {cell.expected}"
                yield f"- {words}"
        yield ""
        yield settlement(rule)
        yield ""


def _table(comparison: Comparison) -> Iterator[str]:
    yield "## Every rule"
    yield ""
    yield "| rule | must | " + " | ".join(column.target for column in comparison) + " |"
    yield "|---|---|" + "---|" * len(comparison)
    for names in RULES.values():
        for rule in names:
            cells = [column.cells.get(rule) for column in comparison]
            expected = next((c.expected for c in cells if c is not None and c.expected), "")
            words = " | ".join(_word(column, rule) for column in comparison)
            yield f"| `{rule}` | {expected} | {words} |"
    yield ""


def _word(column: Column, rule: str) -> str:
    cell = column.cells.get(rule)
    if cell is None:
        return ""
    return f"**{cell.result.value}**" if cell.result is Result.DIFFERS else cell.result.value


def _reasons(comparison: Comparison) -> Iterator[str]:
    yield "## Not applicable"
    yield ""
    for column in comparison:
        found: dict[str, list[str]] = {}
        for rule, cell in column.cells.items():
            if cell.why:
                found.setdefault(cell.why, []).append(rule)
        yield f"### {column.target}"
        yield ""
        for why, rules in found.items():
            yield f"- {why}: {', '.join(f'`{rule}`' for rule in rules)}"
        yield ""


def main(folder: str) -> None:
    """Write the page to `folder`."""
    Path(folder, NAME).write_text(page(recorded()))


if __name__ == "__main__":
    main(sys.argv[1])
