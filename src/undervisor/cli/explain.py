"""`undervisor explain`: why a VM entry failed."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from undervisor.cli.printing import console, put, put_json
from undervisor.errors import BadInput, ExitCode
from undervisor.explain import numbers
from undervisor.explain.capability_texts import load_for_rules
from undervisor.explain.diagnosis import Diagnosis, first_with_findings
from undervisor.explain.formats.pairs import number
from undervisor.explain.recognise import read_file
from undervisor.explain.report import diagnosis_data
from undervisor.explain.text import diagnosis_lines

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
    for line in diagnosis_lines(diagnosis, dumps, everything):
        put(out, line.text, indent=line.indent, style=line.style)
