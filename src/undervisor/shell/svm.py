"""SVM of one processor: switched on, a VMCB, runs and their exits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from undervisor.arch.svm.exits import EXIT_INFO, ExitCode, exit_code_of, signed_exit_code
from undervisor.arch.svm.vmcb import Vmcb, VmcbField
from undervisor.arch.x86.msr import Msr
from undervisor.arch.x86.registers import Efer
from undervisor.errors import BadInput
from undervisor.explain import numbers
from undervisor.explain.diagnosis import Diagnosis, diagnose
from undervisor.explain.dump import SVM, Dump, Failure
from undervisor.explain.text import verdict_lines
from undervisor.guest.asm import assemble
from undervisor.guest.probe.answers import Answer, Fault, Faulted, L2Run, Refused
from undervisor.guest.probe.client import Batch
from undervisor.guest.probe.l1 import l1_state
from undervisor.guest.probe.svm_setup import l2_vmcb, svm_on
from undervisor.shell import machine
from undervisor.shell.bench import Bench
from undervisor.shell.capabilities import from_probe
from undervisor.shell.values import Failed, Hex, Raised, Shown, register_words, shown, vendor_name
from undervisor.shell.vmcb import NOT_ON, VmcbView

_SVM: Final = 1 << 2  # CPUID.8000_0001:ECX
_DEFAULT: Final = "hlt"
_VALID: Final = 1 << 31
_IN_VMCB: Final = ("rax", "rsp")
_WORDS: Final = 8
"""Bytes that hold a rule's field at most."""


class SvmExit(Shown):
    """`entered`: L2 ran.  `code` is the exit code; `info1`, `info2`, `registers`, `rip`.

    A VMRUN that found an illegal state has a `diagnosis`.
    """

    def __init__(
        self, text: str, vmcb: Vmcb, registers: dict[str, int], diagnosis: Diagnosis | None
    ) -> None:
        super().__init__(text)
        self.entered = diagnosis is None
        self.diagnosis = diagnosis
        self.code = exit_code_of(vmcb.exitcode)
        self.info1, self.info2 = Hex(vmcb.exitinfo1), Hex(vmcb.exitinfo2)
        self.rip = Hex(vmcb.rip)
        self.registers = registers

    @property
    def broken(self) -> list[str]:
        """The ids of the rules that the state broke."""
        return [v.rule.id for v in self.diagnosis.broken] if self.diagnosis else []

    def __bool__(self) -> bool:
        return self.entered


class Svm:
    """`svm.on()`, then `svm.run()`."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.vmcb = VmcbView(bench)
        self.forget()

    def forget(self) -> None:
        """As after a reset."""
        self.is_on = False
        """Whether this prompt has switched SVM on here."""
        self.last: SvmExit | None = None
        """The last exit."""
        self.vmcb.forget()

    def on(self) -> Shown:
        """Set EFER.SVME, and make a VMCB that runs an L2 in 64-bit mode beside the probe.

        The L2 shares L1's page tables; VMRUN, VMMCALL and HLT are intercepted, and its code is a
        HLT until `l2` gives another.
        """
        bench, places = self._bench, self._bench.places
        batch = Batch()
        leaf, vendor = batch.cpuid(0x8000_0001), batch.cpuid(0)
        bench.batch(batch)
        if not leaf.value["rcx"] & _SVM:
            raise machine.Refused(
                f"this processor has no SVM: it is {vendor_name(vendor.value.registers)}",
                hint="vmx.on(), or undervisor shell --cpu amd",
            )
        try:
            l1 = svm_on(bench, places.region)
        except Faulted as fault:
            raise machine.Refused(fault.message) from None
        batch = Batch()
        batch.write(places.code, assemble(_DEFAULT).bytes)
        bench.batch(batch)
        self.vmcb.begin(bytes(l2_vmcb(l1, places.code, places.stack)))
        self.is_on, self.last = True, None
        return Shown(
            f"SVM is on; the VMCB at {places.control:#x} is for an L2 in 64-bit mode at "
            f"{places.code:#x}"
        )

    def off(self) -> object:
        """Clear EFER.SVME."""
        batch = Batch()
        efer = batch.rdmsr(Msr.EFER)
        self._bench.batch(batch)
        done = self._instruction(Batch.wrmsr, Msr.EFER, efer.value & ~Efer.svme)
        if not isinstance(done, Raised):
            self.forget()
        return done

    def stgi(self) -> object:
        """STGI."""
        return self._instruction(Batch.stgi)

    def clgi(self) -> object:
        """CLGI."""
        return self._instruction(Batch.clgi)

    def invlpga(self, address: int, asid: int) -> object:
        """INVLPGA."""
        return self._instruction(Batch.invlpga, address, asid)

    def vmload(self, vmcb: int | None = None) -> object:
        """VMLOAD, of the shell's own VMCB if no address is given."""
        return self._instruction(Batch.vmload, self._address(vmcb))

    def vmsave(self, vmcb: int | None = None) -> object:
        """VMSAVE, to the shell's own VMCB if no address is given."""
        return self._instruction(Batch.vmsave, self._address(vmcb))

    def _address(self, vmcb: int | None) -> int:
        return self._bench.places.control if vmcb is None else vmcb

    def _instruction(self, ask: Callable[..., Answer[Any]], *arguments: Any) -> object:
        """Nothing where it succeeded, else the fault."""
        batch = Batch()
        answer = ask(batch, *arguments)
        self._bench.batch(batch)
        done = shown(answer, "" if self.is_on else NOT_ON)
        return done if isinstance(done, Raised | Failed) else None

    def run(self, **registers: int) -> SvmExit | Raised | Failed:
        """VMRUN: L2 runs until #VMEXIT; the exit, or the rules that the VMCB broke.

        L2's general registers are those of `regs`, RAX and RSP those of the VMCB; what is given
        here is set there first.
        """
        bench = self._bench
        in_vmcb = {name: registers.pop(name) for name in _IN_VMCB if name in registers}
        if in_vmcb:
            self.vmcb.set(**in_vmcb)
        bench.registers.update(registers)
        batch = Batch()
        own = {name: v for name, v in bench.registers.as_dict().items() if name not in _IN_VMCB}
        answer = batch.svm_run(bench.places.control, own)
        bench.batch(batch)
        outcome = answer.outcome
        if isinstance(outcome, Fault):
            return Raised(outcome, "" if self.is_on else NOT_ON)
        if isinstance(outcome, Refused):
            return Failed(str(outcome))
        self.last = self._exit(outcome)
        return self.last

    def _exit(self, run: L2Run) -> SvmExit:
        vmcb = Vmcb(self.vmcb.raw())
        registers = {**run.registers, "rax": vmcb.rax, "rsp": vmcb.rsp}
        if signed_exit_code(vmcb.exitcode) == ExitCode.INVALID:
            found = self._diagnosis(vmcb)
            lines = ["VMRUN failed", *map(str, verdict_lines(found, everything=True))]
            return SvmExit("\n".join(lines), vmcb, registers, found)
        self._bench.registers.update(run.registers)
        return SvmExit(_exit_words(vmcb, registers), vmcb, registers, None)

    def _diagnosis(self, vmcb: Vmcb) -> Diagnosis:
        """Every rule of VMRUN that the VMCB breaks on this processor."""
        capabilities = from_probe(self._bench, "the processor").for_vmrun()
        if capabilities is not None:
            l1 = l1_state(self._bench)
            capabilities = replace(capabilities, host_cr0=l1.cr0, host_efer=l1.efer)
        state = {int(f): v for f, v in vmcb.items() if f.width <= _WORDS}
        return diagnose(Dump("VMCB", SVM, state, failure=Failure(code=-1)), capabilities)

    def skip(self) -> Hex:
        """Move L2's RIP behind the instruction that exited, by the VMCB's next RIP."""
        following = self.vmcb.nrip
        if not following:
            raise machine.Refused("the VMCB holds no next RIP", hint="set vmcb.rip yourself")
        self.vmcb.set(rip=following)
        return Hex(following)

    def __repr__(self) -> str:
        if not self.is_on:
            return "SVM is off: svm.on()"
        return repr(self.last) if self.last is not None else "SVM is on; no exit yet"


def _exit_words(vmcb: Vmcb, registers: dict[str, int]) -> str:
    try:
        meaning = numbers.exit_code(vmcb.exitcode)
    except BadInput as error:
        return f"#VMEXIT: {error.message}"
    lines = [f"#VMEXIT, {meaning.title}"]
    lines += [f"  {text}" for text in meaning.sentences if not text.startswith("EXITINFO")]
    code = exit_code_of(vmcb.exitcode)
    about = EXIT_INFO.get(code, ("", "")) if isinstance(code, ExitCode) else ("", "")
    for name, value, text in zip(
        ("EXITINFO1", "EXITINFO2"), (vmcb.exitinfo1, vmcb.exitinfo2), about, strict=True
    ):
        if value or text:
            lines.append(f"  {name} {value:#x}" + (f": {text}" if text else ""))
    lines.append(f"  RIP {vmcb.rip:#x}" + (f", next RIP {vmcb.nrip:#x}" if vmcb.nrip else ""))
    event = vmcb[VmcbField.EXITINTINFO]
    if event & _VALID:
        rows = numbers.control("EXITINTINFO", event).bits
        lines.append(f"  EXITINTINFO {event:#x}: {', '.join(f'{w} {v}' for _, v, w in rows)}")
    lines += [f"  {line}" for line in register_words(registers).splitlines()]
    return "\n".join(lines)
