"""An exit in words: the vendor's name for it, and what it was about.

The silicon speaks AMD's language whatever L1 believes in; on a VMX model the names are those of
the SDM's basic exit reasons.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import iced_x86

from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.x86.events import VECTORS_WITH_ERROR_CODE, GuestFault, Vector
from undervisor.arch.x86.msr import Msr
from undervisor.hypervisor import decode
from undervisor.hypervisor.exit import Exit, code_name
from undervisor.silicon import glue

if TYPE_CHECKING:
    from undervisor.hypervisor.vcpu import Vcpu

_MNEMONICS: Final[dict[int, str]] = {
    value: name
    for name, value in vars(iced_x86.Mnemonic).items()
    if name.isupper() and isinstance(value, int)
}
_EXCEPTIONS: Final = range(ExitCode.EXCP_DE, ExitCode.EXCP_DE + 32)
_R: Final = ExitReason

# What the SDM calls the exits whose names differ; the others are called the same.
_VMX_NAMES: Final[dict[int, str]] = {
    **dict.fromkeys(range(ExitCode.DR0_READ), _R.CONTROL_REGISTER_ACCESSES.name),
    **dict.fromkeys(range(ExitCode.DR0_READ, ExitCode.EXCP_DE), _R.MOV_DR.name),
    **dict.fromkeys(_EXCEPTIONS, _R.EXCEPTION_OR_NMI.name),
    ExitCode.CR0_SEL_WRITE: _R.CONTROL_REGISTER_ACCESSES.name,
    ExitCode.INTR: _R.EXTERNAL_INTERRUPT.name,
    ExitCode.NMI: _R.EXCEPTION_OR_NMI.name,
    ExitCode.VINTR: _R.INTERRUPT_WINDOW.name,
    ExitCode.IRET: _R.NMI_WINDOW.name,
    ExitCode.INIT: _R.INIT_SIGNAL.name,
    **dict.fromkeys(
        (ExitCode.IDTR_READ, ExitCode.GDTR_READ, ExitCode.IDTR_WRITE, ExitCode.GDTR_WRITE),
        _R.ACCESS_TO_GDTR_OR_IDTR.name,
    ),
    **dict.fromkeys(
        (ExitCode.LDTR_READ, ExitCode.TR_READ, ExitCode.LDTR_WRITE, ExitCode.TR_WRITE),
        _R.ACCESS_TO_LDTR_OR_TR.name,
    ),
    ExitCode.IOIO: _R.IO_INSTRUCTION.name,
    ExitCode.SHUTDOWN: _R.TRIPLE_FAULT.name,
    ExitCode.VMMCALL: "VMMCALL",
    ExitCode.WBINVD: _R.WBINVD_OR_WBNOINVD.name,
    ExitCode.NPF: _R.EPT_VIOLATION.name,
}


_PLAIN_UD: Final = frozenset({"EXCP_UD", _R.EXCEPTION_OR_NMI.name})


def reason(vcpu: Vcpu, exit: Exit) -> str:
    """The vendor's name of an exit.

    An instruction that only L0 gives the processor (it is #UD on the silicon) has its own name.
    """
    code = exit.code
    if code == ExitCode.EXCP_UD:
        return _undefined(vcpu, exit)
    if vcpu.is_amd:
        return code_name(code)
    if code == ExitCode.MSR:
        return _R.WRMSR.name if exit.info1 else _R.RDMSR.name
    return _VMX_NAMES.get(code) or code_name(code)


def _undefined(vcpu: Vcpu, exit: Exit) -> str:
    """#UD, or the instruction that is emulated."""
    plain = "EXCP_UD" if vcpu.is_amd else _R.EXCEPTION_OR_NMI.name
    if vcpu.in_l2 and not vcpu.processor.instruction_bytes():
        return plain  # a look through L1's tables could leave marks in them
    try:
        decoded = decode.instruction(vcpu)
    except GuestFault:
        return plain
    return _MNEMONICS[decoded.mnemonic] if decoded.code else plain


def detail(vcpu: Vcpu, exit: Exit) -> str:
    """What the exit was about: a leaf, an MSR, a port, an address; "" where the name says all."""
    code = exit.code
    about = _DETAILS.get(code)
    if about is not None:
        return about(vcpu, exit)
    if code == ExitCode.EXCP_UD and reason(vcpu, exit) not in _PLAIN_UD:
        return ""  # an instruction, not an exception
    if code in _EXCEPTIONS:
        return _exception(exit)
    if code < ExitCode.EXCP_DE and not vcpu.is_amd:
        return code_name(code).replace("_", " ").lower().replace("cr", "CR").replace("dr", "DR")
    return ""


def _exception(exit: Exit) -> str:
    vector = exit.code - ExitCode.EXCP_DE
    try:
        name = Vector(vector).name
    except ValueError:
        name = str(vector)
    error = f"({exit.info1:#x})" if VECTORS_WITH_ERROR_CODE >> vector & 1 else ""
    where = f" at {exit.info2:#x}" if vector == Vector.PF else ""
    return f"#{name}{error}{where}"


def _cpuid(vcpu: Vcpu, exit: Exit) -> str:
    q = vcpu.state.q
    return f"leaf {q[0] & 0xFFFF_FFFF:#x}.{q[1] & 0xFFFF_FFFF:#x}"


def _msr(vcpu: Vcpu, exit: Exit) -> str:
    number = vcpu.state.q[1] & 0xFFFF_FFFF
    try:
        name = f"{Msr(number).name} ({number:#x})"
    except ValueError:
        name = f"{number:#x}"
    return ("write " if exit.info1 else "read ") + name


def _port(vcpu: Vcpu, exit: Exit) -> str:
    info = exit.info1
    size = info >> 4 & 7
    return f"{'in' if info & 1 else 'out'} port {info >> 16:#x}, {size} bytes"


def _nested_page_fault(vcpu: Vcpu, exit: Exit) -> str:
    info = exit.info1
    kind = "fetch" if info & 0x10 else "write" if info & 2 else "read"
    return f"{kind} gpa {exit.info2:#x}"


_DETAILS: Final[dict[int, Callable[[Vcpu, Exit], str]]] = {
    ExitCode.CPUID: _cpuid,
    ExitCode.MSR: _msr,
    ExitCode.IOIO: _port,
    ExitCode.NPF: _nested_page_fault,
    glue.EXIT_BUDGET: lambda vcpu, exit: "",
}
