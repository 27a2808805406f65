"""`undervisor explain`: why a VM entry failed."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from undervisor.cli.printing import console, put, put_json
from undervisor.errors import BadInput, ExitCode
from undervisor.explain import numbers
from undervisor.explain.capability_texts import load_for_rules
from undervisor.explain.diagnosis import (
    AnyRule,
    AnyViolation,
    Diagnosis,
    failure_sentence,
    first_with_findings,
)
from undervisor.explain.dump import Observation, field_name
from undervisor.explain.formats.pairs import number
from undervisor.explain.recognise import read_file
from undervisor.explain.report import diagnosis_data

SHOWN = 4
"""Broken rules, and observations, on the one screen that is shown without --all."""

CapsOption = Annotated[
    str,
    typer.Option(
        "--caps",
        help="Check against this processor: a file that `undervisor caps --json` wrote, `rdmsr -a` "
        "text, vmxcap's text.",
    ),
]


def explain(
    file: Annotated[str, typer.Argument(help="A dump or a log; - is standard input.")] = "",
    caps: CapsOption = "",
    everything: Annotated[
        bool, typer.Option("--all", help="Every broken rule, and the rules not checked.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    vm_instruction_error: Annotated[
        str, typer.Option("--vm-instruction-error", help="Decode a VM-instruction error number.")
    ] = "",
    exit_reason: Annotated[str, typer.Option("--exit-reason", help="Decode an exit reason.")] = "",
    qualification: Annotated[
        str, typer.Option("--qualification", help="Its exit qualification.")
    ] = "",
    control: Annotated[
        str, typer.Option("--control", help="Name the bits of a field: NAME=VALUE.")
    ] = "",
    exit_code: Annotated[str, typer.Option("--exit-code", help="Decode an SVM exit code.")] = "",
    suberror: Annotated[
        str, typer.Option("--suberror", help="Decode a KVM internal error's suberror.")
    ] = "",
) -> None:
    """Say why a VM entry failed, from a dump in any of the usual formats, or decode one number.

    Linux's, Xen's and HAXM's VMCS dumps, Linux's VMCB dump, QEMU's, Bochs's and VirtualBox's logs,
    nested-state blobs, raw VMCBs, JSON and `field = value` text are recognised.

    Exit code 0: nothing is wrong. 1: rules are broken, or the input shows a failure. 2: the input
    can't be read.
    """
    single = _single(vm_instruction_error, exit_reason, qualification, control, exit_code, suberror)
    if single is not None:
        if file:
            raise BadInput("give a file or a number to decode, not both")
        _print_meaning(single, as_json)
        return
    if not file:
        raise BadInput("what is to be explained?", hint="name a file, or - for standard input")
    dumps = read_file(file)
    diagnosis = first_with_findings(dumps, load_for_rules(caps) if caps else None)
    if as_json:
        put_json(diagnosis_data(diagnosis, len(dumps)))
    else:
        print_diagnosis(console(), diagnosis, len(dumps), everything)
    raise typer.Exit(ExitCode.OK if diagnosis.is_clean else ExitCode.NEGATIVE)


def _number(text: str) -> int:
    value = number(text)
    if value is None:
        raise BadInput(f"{text} is not a number", hint="for example 33 or 0x80000021")
    return value


def _single(
    error: str, reason: str, qualification: str, control: str, code: str, suberror: str
) -> numbers.Meaning | None:
    """The meaning of the number that was given, None where none was."""
    given = [text for text in (error, reason, control, code, suberror) if text]
    if len(given) > 1:
        raise BadInput("one number at a time")
    if qualification and not reason:
        raise BadInput("--qualification goes with --exit-reason")
    if error:
        return numbers.vm_instruction_error(_number(error))
    if reason:
        return numbers.exit_reason(
            _number(reason), _number(qualification) if qualification else None
        )
    if control:
        name, sign, value = control.partition("=")
        if not sign:
            raise BadInput("--control wants NAME=VALUE", hint="--control primary=0xb5a06dfa")
        return numbers.control(name.strip(), _number(value))
    if code:
        return numbers.exit_code(_number(code))
    return numbers.suberror(_number(suberror)) if suberror else None


def _print_meaning(meaning: numbers.Meaning, as_json: bool) -> None:
    if as_json:
        put_json(
            {
                "title": meaning.title,
                "sentences": meaning.sentences,
                "bits": [
                    dict(zip(("bits", "value", "name"), row, strict=True)) for row in meaning.bits
                ],
                "remedy": meaning.remedy,
            }
        )
        return
    out = console()
    put(out, meaning.title, style="bold")
    for sentence in meaning.sentences:
        put(out, sentence, indent=2)
    for place, value, name in meaning.bits:
        put(out, f"{place:>5}  {value:<6} {name}", indent=2)
    if meaning.remedy:
        put(out, "→ " + meaning.remedy, indent=2)


def print_diagnosis(out: Console, diagnosis: Diagnosis, dumps: int, everything: bool) -> None:
    """The answer on one screen; all of it with `everything`."""
    dump = diagnosis.dump
    many = f", the one to look at of {dumps}" if dumps > 1 else ""
    put(out, f"{dump.format}{many}: {len(dump.state)} fields", style="bold")
    for note in dump.notes if everything else dump.notes[:3]:
        put(out, note, indent=2, style="dim")
    if diagnosis.failure:
        put(out, failure_sentence(diagnosis.failure), indent=2)
    _print_verdict(out, diagnosis)
    limit = len(diagnosis.broken) if everything else SHOWN
    for place, violation in enumerate(diagnosis.broken[:limit]):
        _print_violation(out, violation, place == 0, diagnosis.capabilities_known)
    if len(diagnosis.broken) > limit:
        rest = ", ".join(v.rule.id for v in diagnosis.broken[limit : limit + 6])
        put(out, f"and {len(diagnosis.broken) - limit} more (--all): {rest}", indent=2)
    shown = diagnosis.observations if everything else diagnosis.observations[:SHOWN]
    for observation in shown:
        _print_observation(out, observation)
    for rule in diagnosis.named if everything else diagnosis.named[:SHOWN]:
        if rule.id not in {v.rule.id for v in diagnosis.broken}:
            _print_named(out, rule)
    _print_rest(out, diagnosis, everything)


def _print_verdict(out: Console, diagnosis: Diagnosis) -> None:
    count = len(diagnosis.broken)
    if count:
        put(out, f"{count} rule{'s' * (count > 1)} broken, the likeliest cause first:", style="red")
    elif diagnosis.checked and diagnosis.is_clean:
        put(out, "no rule is broken", style="green")
    elif diagnosis.checked:
        put(out, "no rule that could be checked is broken, and yet it failed", style="yellow")


def _print_violation(out: Console, violation: AnyViolation, first: bool, known: bool) -> None:
    rule = violation.rule
    put(out, f"{rule.id}: {rule.text}", indent=2, style="bold red" if first else "red")
    vendor = rule.id.split(".")[0]
    values = [
        f"{field_name(int(field), vendor)} = {value:#x}"
        for field, value in zip(rule.reads, violation.values, strict=True)
        if value is not None
    ]
    if values:
        put(out, ", ".join(values), indent=6)
    put(out, f"→ {rule.remedy}", indent=6)
    place = f"{'SDM' if vendor == 'vmx' else 'APM'}, {rule.section}; {rule.outcome.value}"
    if rule.qualification:
        place += f", qualification {rule.qualification}"
    put(out, place, indent=6, style="dim")
    if rule.assumes and not known:
        put(out, f"assumed: {rule.assumes} (give --caps to be sure)", indent=6, style="dim")


def _print_observation(out: Console, observation: Observation) -> None:
    put(out, f"{observation.title}", indent=2, style="yellow")
    put(out, observation.meaning, indent=6)
    for piece in observation.evidence:
        put(out, piece, indent=6, style="dim")
    if observation.remedy:
        put(out, "→ " + observation.remedy, indent=6)


def _print_named(out: Console, rule: AnyRule) -> None:
    put(out, f"named by the log: {rule.id}: {rule.text}", indent=2, style="red")
    put(out, f"→ {rule.remedy}", indent=6)
    fields = ", ".join(field_name(int(field), rule.id.split(".")[0]) for field in rule.reads)
    put(out, f"{rule.section}; look at {fields}", indent=6, style="dim")


def _print_rest(out: Console, diagnosis: Diagnosis, everything: bool) -> None:
    if diagnosis.checked or diagnosis.unchecked:
        text = f"{diagnosis.checked} rules checked, {len(diagnosis.unchecked)} not checked"
        put(out, text + (" for lack of fields:" if diagnosis.unchecked else ""), indent=2)
    if everything:
        for rule in diagnosis.unchecked:
            put(out, f"{rule.id}: lacks {', '.join(diagnosis.missing(rule))}", indent=6)
    elif diagnosis.unchecked:
        lacking: dict[str, int] = {}
        for rule in diagnosis.unchecked:
            for name in diagnosis.missing(rule):
                lacking[name] = lacking.get(name, 0) + 1
        names = sorted(lacking, key=lambda name: -lacking[name])
        more = f" and {len(names) - 6} more (--all)" if len(names) > 6 else ""
        put(out, ", ".join(names[:6]) + more, indent=6, style="dim")
    for text in diagnosis.dump.assumed:
        put(out, f"assumed: {text}", indent=2, style="dim")
    if diagnosis.checked and not diagnosis.capabilities_known:
        put(
            out,
            "assumed: a processor with every current feature (--caps FILE checks against yours)",
            indent=2,
            style="dim",
        )
