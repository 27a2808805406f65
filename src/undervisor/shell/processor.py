"""One processor of the machine: its instructions as functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from undervisor.arch.vmx.capabilities import VmxMsr
from undervisor.arch.x86.msr import Msr
from undervisor.errors import BadInput
from undervisor.guest.asm import Code, assemble
from undervisor.guest.probe.answers import ALL, Answer, Fault, Returned
from undervisor.guest.probe.batch import BatchCore
from undervisor.guest.probe.client import Batch
from undervisor.shell.bench import Bench
from undervisor.shell.machine import Machine
from undervisor.shell.places import CODE_SIZE, Places
from undervisor.shell.registers import Registers
from undervisor.shell.svm import Svm
from undervisor.shell.values import Failed, Hex, Leaf, Raised, Shown, register_words, shown
from undervisor.shell.vmx import Vmx

_LOW: Final = 0xFFFF_FFFF


class Processor:
    """Processor `number`; `vmx` and `vmcs`, `svm` and `vmcb` are its extensions."""

    def __init__(self, machine: Machine, number: int) -> None:
        self.number = number
        self._machine = machine
        self._places = places = Places(number)
        self.regs = Registers()
        self.vmx = Vmx(Bench(self._batch, places, self.regs, number))
        self.vmcs = self.vmx.vmcs
        self.svm = Svm(Bench(self._batch, places, self.regs, number))
        self.vmcb = self.svm.vmcb

    def forget(self) -> None:
        """Begin as after a reset of the machine."""
        self.regs.update(dict.fromkeys(ALL, 0))
        self.vmx.forget()
        self.svm.forget()

    def _batch(self, batch: BatchCore) -> None:
        """Run a batch here."""
        self._machine.on(self.number).run(batch)

    def _one(self, ask: Callable[..., Answer[Any]], *arguments: Any) -> Answer[Any]:
        """The answer to one operation of a batch."""
        batch = Batch()
        answer = ask(batch, *arguments)
        self._batch(batch)
        return answer

    def __repr__(self) -> str:
        return f"<processor {self.number}>"

    # -- instructions --------------------------------------------------------------------------

    def cpuid(self, leaf: int, subleaf: int = 0) -> Leaf | Raised:
        """CPUID."""
        outcome = self._one(Batch.cpuid, leaf, subleaf).outcome
        if isinstance(outcome, Returned):
            return Leaf(*(outcome[name] & _LOW for name in ("rax", "rbx", "rcx", "rdx")))
        assert isinstance(outcome, Fault)
        return Raised(outcome)

    def rdmsr(self, msr: int | str) -> object:
        """RDMSR; a number, or a name: rdmsr(0xc0000080), rdmsr("efer"), rdmsr(Msr.EFER)."""
        return shown(self._one(Batch.rdmsr, msr_number(msr)))

    def wrmsr(self, msr: int | str, value: int) -> object:
        """WRMSR; nothing, or the fault."""
        return shown(self._one(Batch.wrmsr, msr_number(msr), value))

    def read_cr(self, number: int) -> object:
        """MOV from CR0, CR2, CR3, CR4 or CR8."""
        return shown(self._one(Batch.read_cr, _checked(number, (0, 2, 3, 4, 8), "control")))

    def write_cr(self, number: int, value: int) -> object:
        """MOV to CR0, CR2, CR3, CR4 or CR8; what ruins paging kills the machine."""
        return shown(self._one(Batch.write_cr, _checked(number, (0, 2, 3, 4, 8), "control"), value))

    def read_dr(self, number: int) -> object:
        """MOV from DR0 to DR3, DR6 or DR7."""
        return shown(self._one(Batch.read_dr, _checked(number, (0, 1, 2, 3, 6, 7), "debug")))

    def write_dr(self, number: int, value: int) -> object:
        """MOV to DR0 to DR3, DR6 or DR7."""
        number = _checked(number, (0, 1, 2, 3, 6, 7), "debug")
        return shown(self._one(Batch.write_dr, number, value))

    def xgetbv(self, number: int = 0) -> object:
        """XGETBV."""
        return shown(self._one(Batch.xgetbv, number))

    def xsetbv(self, number: int, value: int) -> object:
        """XSETBV."""
        return shown(self._one(Batch.xsetbv, number, value))

    def inp(self, port: int, bits: int = 8) -> object:
        """IN of 8, 16 or 32 bits."""
        return shown(self._one(Batch.inp, port, _checked(bits, (8, 16, 32), "port")))

    def outp(self, port: int, value: int, bits: int = 8) -> object:
        """OUT of 8, 16 or 32 bits."""
        return shown(self._one(Batch.outp, port, value, _checked(bits, (8, 16, 32), "port")))

    def rdtsc(self) -> object:
        """RDTSC."""
        return shown(self._one(Batch.rdtsc))

    def call(self, code: str | bytes | Code, **registers: int) -> Returned | Raised | Failed:
        """Execute code of your own at CPL 0 with these registers; a RET is put behind it.

        The value shows the registers that are not zero then; `value["rax"]` is one.
        """
        text = assemble(code) if isinstance(code, str) else code
        outcome = self._one(Batch.call, text, registers, ALL).outcome
        if isinstance(outcome, Fault):
            return Raised(outcome)
        return _Returned(outcome) if isinstance(outcome, Returned) else Failed(str(outcome))

    # -- L2 ------------------------------------------------------------------------------------

    def l2(self, text: str) -> Shown:
        """Put code for L2 into memory, and L2's RIP and RSP on it: l2("mov $5, %eax; vmcall").

        64-bit AT&T syntax; `.intel_syntax noprefix` and `.code32` are understood.
        """
        code = assemble(text, self._places.code)
        if len(code) > CODE_SIZE:
            raise BadInput(f"{len(code)} bytes of code: {CODE_SIZE} are reserved for it")
        batch = Batch()
        written = batch.write(code.origin, code.bytes)
        self._batch(batch)
        _ = written.value
        return Shown(
            f"{len(code)} bytes of L2's code at {code.origin:#x}{self._begin(code.origin)}"
        )

    def _begin(self, rip: int) -> str:
        """Let L2 begin there, where there is one."""
        stack = self._places.stack
        if self.vmx.is_on:
            self.vmcs.set(guest_rip=rip, guest_rsp=stack)
            return "; GUEST_RIP and GUEST_RSP are set"
        if self.svm.is_on:
            self.vmcb.set(rip=rip, rsp=stack)
            return "; RIP and RSP of the VMCB are set"
        return "; vmx.on() or svm.on() comes next"


class _Returned(Returned):
    """Registers after code that returned."""

    def __init__(self, returned: Returned) -> None:
        super().__init__(returned.rflags, {n: Hex(v) for n, v in returned.registers.items()})

    def __repr__(self) -> str:
        words = register_words(self.registers)
        return "\n".join(filter(None, (words, f"rflags {self.rflags:#x}")))


def msr_number(msr: int | str) -> int:
    """An MSR's number; BadInput for a name that is none."""
    if isinstance(msr, int):
        return msr
    name = msr.upper().removeprefix("IA32_").removeprefix("MSR_")
    for names in (Msr, VmxMsr):
        for member in names:
            if member.name.removeprefix("IA32_") == name:
                return int(member)
    raise BadInput(f"no MSR is called {msr}", hint="a number, or as in Msr.EFER: Msr.<TAB>")


def _checked(number: int, allowed: tuple[int, ...], what: str) -> int:
    if number not in allowed:
        kind = f"{what} register" if what != "port" else "access of that many bits"
        raise BadInput(f"no {kind} {number}", hint=f"one of {', '.join(map(str, allowed))}")
    return number
