"""`undervisor rules`: every rule of VM entry that the explainer and the L0 know."""

from __future__ import annotations

import fnmatch
from typing import Annotated

import typer

from undervisor.cli.printing import console, put, put_json
from undervisor.errors import BadInput
from undervisor.explain.diagnosis import ALL_RULES, AnyRule
from undervisor.explain.dump import field_name
from undervisor.explain.report import rule_data


def rules(
    pattern: Annotated[
        str,
        typer.Argument(help="Part of an id, a pattern with *, a field's name, or a word."),
    ] = "",
    count: Annotated[bool, typer.Option("--count", help="Only how many there are.")] = False,
    on: Annotated[
        list[str] | None,
        typer.Option("--on", help="Break them on this target: builtin, bochs, qemu; repeatable."),
    ] = None,
    cpu: Annotated[
        list[str] | None,
        typer.Option("--cpu", help="A CPU model of the target; repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the rules of VM entry and VMRUN: id, words, section, what happens, what to change.

    With --on, each is broken in a running guest hypervisor, and what the target does is held
    against the rule. Exit code 0: every target agrees. 1: one differs.
    """
    found = [rule for rule in ALL_RULES.values() if matches(rule, pattern)]
    if on or cpu:
        if not found:
            raise BadInput(f"no rule matches {pattern!r}", hint="`undervisor rules` lists all")
        from undervisor.cli.rules_on import compare

        ids = [rule.id for rule in found]
        raise typer.Exit(compare(ids, on or ["builtin"], cpu or [], as_json=as_json))
    if count:
        numbers = {vendor: sum(r.id.startswith(vendor) for r in found) for vendor in ("vmx", "svm")}
        if as_json:
            put_json(numbers)
        else:
            print(f"{numbers['vmx']} VMX rules\n{numbers['svm']} SVM rules")
        return
    if as_json:
        put_json([rule_data(rule) for rule in found])
        return
    if not found:
        raise BadInput(f"no rule matches {pattern!r}", hint="`undervisor rules` lists all")
    out = console()
    section = ""
    whole = len(found) <= 12
    for rule in found:
        if rule.section != section:
            section = rule.section
            put(out, section, style="bold")
        put(out, f"{rule.id}: {rule.text}", indent=2)
        if whole:
            vendor = rule.id.split(".")[0]
            names = ", ".join(field_name(int(field), vendor) for field in rule.reads)
            put(out, f"reads {names}", indent=6, style="dim")
            put(out, f"broken: {rule.outcome.value}", indent=6, style="dim")
            if rule.assumes:
                put(out, f"assumes {rule.assumes}", indent=6, style="dim")
            put(out, f"→ {rule.remedy}", indent=6)


def matches(rule: AnyRule, pattern: str) -> bool:
    """Whether the rule is meant by `pattern`."""
    if not pattern:
        return True
    wanted = pattern.lower()
    if any(sign in wanted for sign in "*?["):
        return fnmatch.fnmatchcase(rule.id, wanted)
    vendor = rule.id.split(".")[0]
    names = (field_name(int(field), vendor).lower() for field in rule.reads)
    return wanted in rule.id or wanted in names or wanted in rule.text.lower()
