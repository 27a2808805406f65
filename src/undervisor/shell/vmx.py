"""VMX of one processor: in and out of operation, VMCSs, entries and exits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.errors import BadInput
from undervisor.explain.names import vmx_field
from undervisor.guest.asm import assemble
from undervisor.guest.probe.answers import Answer, Fault, Faulted, L2Run, Refused, VmxResult
from undervisor.guest.probe.client import Batch
from undervisor.guest.probe.vmx_setup import VmxFacts, l2_fields, vmx_on
from undervisor.shell import machine
from undervisor.shell.bench import Bench
from undervisor.shell.values import Failed, Hex, Raised, Shown, vendor_name
from undervisor.shell.vmcs import NOT_ON, Vmcs, result_words
from undervisor.shell.vmx_exits import VmxExit, exit_of

_VMX: Final = 1 << 5  # CPUID.1:ECX
_DEFAULT: Final = "hlt"


class Vmx:
    """`vmx.on()`, then `vmx.launch()` and `vmx.resume()`."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.vmcs = Vmcs(bench)
        self.forget()

    def forget(self) -> None:
        """As after a reset."""
        self._facts: VmxFacts | None = None
        self._launched = False
        self.last: VmxExit | None = None
        """The last exit."""
        self.vmcs.forget()

    @property
    def is_on(self) -> bool:
        """Whether this prompt has switched VMX on here."""
        return self._facts is not None

    def on(self) -> Shown:
        """Enter VMX operation with a VMCS that runs an L2 in 64-bit mode beside the probe.

        The L2 shares L1's page tables, HLT exits, and its code is a HLT until `l2` gives another.
        """
        bench, places = self._bench, self._bench.places
        batch = Batch()
        leaf, vendor = batch.cpuid(1), batch.cpuid(0)
        bench.batch(batch)
        if not leaf.value["rcx"] & _VMX:
            raise machine.Refused(
                f"this processor has no VMX: it is {vendor_name(vendor.value.registers)}",
                hint="svm.on(), or undervisor shell --cpu intel",
            )
        if self.is_on:
            raise machine.Refused("VMX is on already", hint="vmx.off() leaves it")
        try:
            facts = vmx_on(bench, places.region, places.control)
        except Faulted as fault:
            raise machine.Refused(fault.message) from None
        fields = l2_fields(facts, places.code, places.stack, bench.number)
        self._write(fields)
        self._facts, self._launched = facts, False
        self.vmcs.remember()
        return Shown(
            f"VMX operation; the VMCS at {places.control:#x} is current and clear, with "
            f"{len(fields)} fields set for an L2 in 64-bit mode at {places.code:#x}"
        )

    def _write(self, fields: dict[F, int]) -> None:
        batch = Batch()
        batch.write(self._bench.places.code, assemble(_DEFAULT).bytes)
        answer = batch.vmwrites({int(f): v for f, v in fields.items()}, self._bench.places.scratch)
        self._bench.batch(batch)
        count, result = answer.value
        if not result.succeeded:
            field = list(fields)[count]
            raise machine.Refused(f"VMWRITE of {field.name}: {result_words(result)}")

    def off(self) -> object:
        """VMXOFF."""
        done = self._instruction(Batch.vmxoff)
        if not isinstance(done, Raised | Failed):
            self.forget()
        return done

    def clear(self, vmcs: int | None = None) -> object:
        """VMCLEAR, of the shell's own VMCS if no address is given; it is current no more then."""
        where = self._bench.places.control if vmcs is None else vmcs
        done = self._instruction(Batch.vmclear, where)
        if where == self._bench.places.control and not isinstance(done, Raised | Failed):
            self._launched = False
        return done

    def ptrld(self, vmcs: int | None = None) -> object:
        """VMPTRLD, of the shell's own VMCS if no address is given."""
        return self._instruction(
            Batch.vmptrld, self._bench.places.control if vmcs is None else vmcs
        )

    def ptrst(self) -> object:
        """VMPTRST: the current-VMCS pointer."""
        return self._instruction(Batch.vmptrst, value=True)

    def invept(self, kind: int, eptp: int = 0) -> object:
        """INVEPT of type `kind`."""
        return self._instruction(Batch.invept, kind, eptp)

    def invvpid(self, kind: int, vpid: int = 0, address: int = 0) -> object:
        """INVVPID of type `kind`."""
        return self._instruction(Batch.invvpid, kind, vpid, address)

    def _instruction(
        self, ask: Callable[..., Answer[VmxResult]], *arguments: Any, value: bool = False
    ) -> object:
        """An instruction's outcome: VMsucceed (or its value), or what else."""
        batch = Batch()
        answer = ask(batch, *arguments)
        self._bench.batch(batch)
        outcome = answer.outcome
        if isinstance(outcome, Fault):
            return Raised(outcome, "" if self.is_on else NOT_ON)
        if isinstance(outcome, Refused) or not outcome.succeeded:
            words = str(outcome) if isinstance(outcome, Refused) else result_words(outcome)
            return Failed(words)
        return Hex(outcome.value) if value else Shown(outcome.outcome.value)

    # -- entries -------------------------------------------------------------------------------

    def launch(self, **registers: int) -> VmxExit | Raised | Failed:
        """VMLAUNCH: L2 runs until it exits; the exit, or the rules that the entry broke.

        L2's general registers are those of `regs`; what is given here is set in them first.
        """
        return self._enter(registers, resume=False)

    def resume(self, **registers: int) -> VmxExit | Raised | Failed:
        """VMRESUME, the same way."""
        return self._enter(registers, resume=True)

    def run(self, **registers: int) -> VmxExit | Raised | Failed:
        """VMLAUNCH or VMRESUME, as the launch state of the VMCS demands."""
        return self._enter(registers, resume=self._launched)

    def _enter(self, registers: dict[str, int], *, resume: bool) -> VmxExit | Raised | Failed:
        bench = self._bench
        bench.registers.update(registers)
        batch = Batch()
        answer = batch.vmx_run(bench.registers.as_dict(), resume)
        bench.batch(batch)
        outcome = answer.outcome
        if isinstance(outcome, Fault):
            return Raised(outcome, "" if self.is_on else NOT_ON)
        if isinstance(outcome, Refused):
            return Failed(str(outcome))
        assert isinstance(outcome, L2Run)
        if outcome.result.succeeded:
            bench.registers.update(outcome.registers)
        exit = exit_of(bench, self.vmcs, outcome)
        self._launched = self._launched or exit.entered
        self.last = exit
        return exit

    def skip(self) -> Hex:
        """Move L2's RIP behind the instruction that exited; the new RIP."""
        rip, length = self.vmcs.guest_rip, self.vmcs.exit_instruction_length
        if not isinstance(rip, Hex) or not isinstance(length, Hex):
            raise machine.Refused(f"there is no exit to skip: {rip}")
        self.vmcs.set(guest_rip=rip + length)
        return Hex(rip + length)

    def adjust(self, field: str, value: int) -> Hex:
        """The setting of a control word nearest to `value` that the processor allows."""
        if self._facts is None:
            raise machine.Refused("the capabilities are not known yet", hint=NOT_ON)
        number = vmx_field(field)
        if number is None or number not in self._facts.capabilities:
            raise BadInput(
                f"{field} is no control word", hint='"primary_controls", "exit_controls"'
            )
        return Hex(self._facts.adjust(F(number), value))

    def __repr__(self) -> str:
        if not self.is_on:
            return "VMX is off: vmx.on()"
        return repr(self.last) if self.last is not None else "VMX operation; no exit yet"
