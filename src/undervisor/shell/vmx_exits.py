"""A VM exit, or a VM entry that failed, as a value that says what happened."""

from __future__ import annotations

from typing import Final

from undervisor.arch.vmx.checks.inputs import EntryInput, refresh_inputs
from undervisor.arch.vmx.controls import ExitReasonField
from undervisor.arch.vmx.exit_information import (
    INSTRUCTION_INFORMATION,
    PLAIN_QUALIFICATIONS,
    QUALIFICATIONS,
)
from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.errors import BadInput
from undervisor.explain import numbers
from undervisor.explain.diagnosis import Diagnosis, diagnose
from undervisor.explain.dump import VMX, Dump, Failure
from undervisor.explain.text import verdict_lines
from undervisor.guest.probe.answers import L2Run, VmxOutcome
from undervisor.shell.bench import Bench
from undervisor.shell.capabilities import from_probe
from undervisor.shell.values import Hex, Shown, register_words
from undervisor.shell.vmcs import Vmcs

_VALID: Final = 1 << 31
_CHECKS: Final = (7, 8)
_EVENTS: Final = (
    (F.EXIT_INTERRUPTION_INFORMATION, F.EXIT_INTERRUPTION_ERROR_CODE, "interruption information"),
    (F.IDT_VECTORING_INFORMATION, F.IDT_VECTORING_ERROR_CODE, "IDT-vectoring information"),
)
_ADDRESSED: Final = {ExitReason.EPT_VIOLATION, ExitReason.EPT_MISCONFIGURATION}


class VmxExit(Shown):
    """`entered`: L2 ran.  `reason` is the basic exit reason; `qualification`, `registers`, `rip`.

    An entry that failed has a `diagnosis` where rules of VM entry decide it, or an `error`.
    """

    def __init__(
        self,
        text: str,
        fields: dict[int, int],
        *,
        entered: bool,
        error: int = 0,
        diagnosis: Diagnosis | None = None,
    ) -> None:
        super().__init__(text)
        self.entered, self.error, self.diagnosis = entered, error, diagnosis
        self.fields = fields
        number = ExitReasonField(fields.get(F.EXIT_REASON, 0))
        self.reason = _reason(number.basic) if not error else None
        self.qualification = Hex(fields.get(F.EXIT_QUALIFICATION, 0))
        self.rip = Hex(fields.get(F.GUEST_RIP, 0))

    @property
    def broken(self) -> list[str]:
        """The ids of the rules that the entry broke."""
        return [v.rule.id for v in self.diagnosis.broken] if self.diagnosis else []

    def __bool__(self) -> bool:
        return self.entered


def _reason(number: int) -> ExitReason | int:
    try:
        return ExitReason(number)
    except ValueError:
        return number


def exit_of(bench: Bench, vmcs: Vmcs, run: L2Run) -> VmxExit:
    """What came of an entry."""
    if run.result.outcome is VmxOutcome.FAIL_INVALID:
        return VmxExit("VMfailInvalid: there is no current VMCS (vmx.ptrld())", {}, entered=False)
    fields = vmcs.values()
    error = run.result.error
    if error:
        if error in _CHECKS:
            return _failed(bench, fields, Failure(error=error), error)
        return VmxExit(
            _meaning(numbers.vm_instruction_error(error)), fields, entered=False, error=error
        )
    reason = fields[F.EXIT_REASON]
    if reason & _VALID:
        failure = Failure(reason=reason, qualification=fields[F.EXIT_QUALIFICATION])
        return _failed(bench, fields, failure, 0)
    return VmxExit(_exit_words(fields, run), fields, entered=True)


def _failed(bench: Bench, fields: dict[int, int], failure: Failure, error: int) -> VmxExit:
    """An entry that broke rules: all of them, held against the fields as they are now."""
    state = {**fields, EntryInput.LONG_MODE_ACTIVE: 1, EntryInput.IN_SMM: 0}
    state.pop(F.EXIT_REASON, None)
    state |= dict.fromkeys(set(F) - set(state), 0)  # what the processor lacks is not in use
    facts: dict[int, int] = {
        EntryInput.CURRENT_VMCS: bench.places.control,
        EntryInput.LINKED_VMCS: 0,
    }
    try:
        refresh_inputs(state, bench.read_u64, facts)
    except LookupError:
        state |= facts  # a pointer leads nowhere; the rules about what is there cannot be checked
    capabilities = from_probe(bench, "the processor").vmx()
    found = diagnose(Dump("VMCS", VMX, state, failure=failure), capabilities)
    lines = ["VM entry failed", *map(str, verdict_lines(found, everything=True))]
    return VmxExit("\n".join(lines), fields, entered=False, error=error, diagnosis=found)


def _exit_words(fields: dict[int, int], run: L2Run) -> str:
    number, qualification = fields[F.EXIT_REASON], fields[F.EXIT_QUALIFICATION]
    reason = _reason(number & 0xFFFF)
    try:
        told = bool(qualification) or reason in QUALIFICATIONS or reason in PLAIN_QUALIFICATIONS
        meaning = numbers.exit_reason(number, qualification if told else None)
    except BadInput as error:
        return f"VM exit {number:#x}: {error.message}"
    lines = [f"VM exit, {meaning.title}", *(f"  {text}" for text in meaning.sentences)]
    lines += [f"  {name}: {value}" for name, value, _ in meaning.bits]
    length = fields[F.EXIT_INSTRUCTION_LENGTH]
    lines.append(f"  guest RIP {fields[F.GUEST_RIP]:#x}, instruction length {length}")
    if reason in _ADDRESSED:
        lines.append(f"  guest-physical address {fields[F.GUEST_PHYSICAL_ADDRESS]:#x}")
    if reason in _ADDRESSED or reason in QUALIFICATIONS:
        lines.append(f"  guest-linear address {fields[F.GUEST_LINEAR_ADDRESS]:#x}")
    if reason in INSTRUCTION_INFORMATION:
        lines.append(f"  instruction information {fields[F.EXIT_INSTRUCTION_INFORMATION]:#x}")
    for field, code, name in _EVENTS:
        if fields[field] & _VALID:
            bits = ", ".join(
                f"{w.lower()} {v}" for _, v, w in numbers.control(F(field).name, fields[field]).bits
            )
            lines.append(f"  {name} {fields[field]:#x}: {bits}; error code {fields[code]:#x}")
    words = register_words(run.registers)
    lines += [f"  {line}" for line in words.splitlines()]
    return "\n".join(lines)


def _meaning(meaning: numbers.Meaning) -> str:
    lines = ["VM entry failed", f"  {meaning.title}", *(f"  {text}" for text in meaning.sentences)]
    return "\n".join([*lines, f"  → {meaning.remedy}"] if meaning.remedy else lines)
