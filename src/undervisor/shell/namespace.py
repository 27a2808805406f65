"""The names that the prompt knows, and the banner that tells them."""

from __future__ import annotations

from typing import Any, Final

from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.svm.vmcb import VmcbField
from undervisor.arch.vmx import controls
from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField
from undervisor.arch.x86.events import Vector
from undervisor.arch.x86.msr import Msr
from undervisor.arch.x86.registers import Cr0, Cr4, Efer, Rflags
from undervisor.guest.asm import assemble
from undervisor.shell.machine import MEMORY, Machine
from undervisor.shell.memory import Mem
from undervisor.shell.places import YOURS
from undervisor.shell.processor import Processor
from undervisor.shell.values import Shown

_OF_A_PROCESSOR: Final = (
    "cpuid", "rdmsr", "wrmsr", "read_cr", "write_cr", "read_dr", "write_dr", "xgetbv", "xsetbv",
    "inp", "outp", "rdtsc", "call", "l2", "regs", "vmx", "vmcs", "svm", "vmcb",
)  # fmt: skip
_MANUALS: Final = {
    "Cr0": Cr0,
    "Cr4": Cr4,
    "Efer": Efer,
    "EntryControls": controls.EntryControls,
    "ExitControls": controls.ExitControls,
    "ExitReason": ExitReason,
    "Intercept": Intercept,
    "Msr": Msr,
    "PinBasedControls": controls.PinBasedControls,
    "PrimaryControls": controls.PrimaryControls,
    "Rflags": Rflags,
    "SecondaryControls": controls.SecondaryControls,
    "Vector": Vector,
    "VmcbField": VmcbField,
    "VmcsField": VmcsField,
}

_VMX_HELP: Final = """\
vmx.on()                   VMX operation, a VMCS, an L2 that executes HLT
vmcs.guest_rip = 0x1000    VMWRITE; vmcs.guest_rip is VMREAD
vmcs                       what has changed; vmcs.all(): every field
vmx.launch(), vmx.resume() run L2 until it exits; or the rules that it broke
vmx.skip()                 RIP behind the instruction that exited
"""
_SVM_HELP: Final = """\
svm.on()                   EFER.SVME, a VMCB, an L2 that executes HLT
vmcb.rip = 0x1000          the VMCB in memory; vmcb.rip reads it
vmcb                       what has changed; vmcb.all(): every field
vmcb.intercept(Intercept.RDTSC), vmcb.intercepts()
svm.run()                  VMRUN until #VMEXIT; or the rules that it broke
svm.skip()                 RIP behind the instruction that exited
"""
_HELP: Final = """\
l2("mov $5, %eax; vmcall") code for L2, RIP and RSP on it; regs.rbx = 7
cpuid(1) rdmsr("efer") wrmsr(msr, value) read_cr(0) write_cr inp outp xgetbv
mem.read(gpa, size), mem.write(gpa, data); yours: {yours:#x} to {end:#x}
call("rdpmc", rcx=1)       code of your own; asm(text) assembles
cpu(1).vmx.on()            another of {cpus} processors; the names above are cpu(0)'s
reboot()                   when the machine is dead
Msr VmcsField ExitReason PrimaryControls Intercept Efer ...: the manuals' names
<TAB> completes; help_() shows this, help(vmx.on) more; Ctrl-D leaves"""


class Namespace:
    """Makes the names for one machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._processors: dict[int, Processor] = {}
        first = self.cpu(0)
        self.names: dict[str, Any] = {name: getattr(first, name) for name in _OF_A_PROCESSOR}
        self.names |= _MANUALS
        self.names |= {
            "__name__": "undervisor",
            "__doc__": None,
            "asm": assemble,
            "cpu": self.cpu,
            "help_": self.help_,
            "mem": Mem(machine),
            "reboot": self.reboot,
        }

    def cpu(self, number: int = 0) -> Processor:
        """A processor by its APIC ID, started if it has not been; it has all the functions."""
        if number not in self._processors:
            if number:
                self.machine.on(number)
            self._processors[number] = Processor(self.machine, number)
        return self._processors[number]

    def reboot(self) -> Shown:
        """Start the machine anew: all processors as after a reset, nothing in memory."""
        self.machine.reboot()
        for processor in self._processors.values():
            processor.forget()
        return Shown(f"{self.machine.target.name}: started anew")

    def help_(self) -> Shown:
        """One screen: what there is."""
        leaf = self.cpu(0).cpuid(0)
        vendor = _VMX_HELP if b"Intel" in _vendor(leaf) else _SVM_HELP
        common = _HELP.format(yours=YOURS, end=MEMORY, cpus=self.machine.cpus)
        return Shown(vendor + common)

    def banner(self) -> str:
        """What the prompt says first."""
        machine = self.machine
        vendor = _vendor(self.cpu(0).cpuid(0)).decode("ascii", "replace")
        cpus = "1 processor" if machine.cpus == 1 else f"{machine.cpus} processors"
        return f"the probe on {machine.target.name}: {vendor}, {cpus}\n\n{self.help_()!r}\n"


def _vendor(leaf: Any) -> bytes:
    return b"".join(part.to_bytes(4, "little") for part in (leaf.ebx, leaf.edx, leaf.ecx))
