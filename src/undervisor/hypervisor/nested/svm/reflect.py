"""Which exits of L2 are L1's, and what it is told about each.

APM 2 "Intercept Operation", "Instruction Intercepts", "Decode Assists".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from iced_x86 import Code

from undervisor.arch.svm.exits import SAVES_NEXT_RIP, ExitCode
from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.x86.events import VECTORS_WITH_ERROR_CODE, EventType, Fault, Vector
from undervisor.arch.x86.registers import Cr0, Cr4, legalize_lmsw
from undervisor.hypervisor import decode
from undervisor.hypervisor.exits import control_registers, exceptions, io
from undervisor.hypervisor.nested.svm import information, paging, permissions
from undervisor.hypervisor.nested.svm.exit import leave
from undervisor.hypervisor.verdict import Switched, Verdict

if TYPE_CHECKING:
    from undervisor.hypervisor.exit import Exit
    from undervisor.hypervisor.nested.svm.state import SvmState
    from undervisor.hypervisor.vcpu import Vcpu

Reflection = Callable[["SvmState", "Vcpu", "Exit"], Verdict | None]

_TYPE: Final = 0x700
_ONE_BYTE: Final = {int(Vector.BP): b"\xcc", int(Vector.OF): b"\xce"}
_NEXT_RIP: Final = frozenset(int(code) for code in SAVES_NEXT_RIP)
_LAST: Final = int(Intercept.IDLE_HLT)
_MOV: Final = 1 << 63
_SELECTIVE: Final = ~int(Cr0.ts | Cr0.mp)
_LMSW: Final = (Code.LMSW_RM16, Code.LMSW_R32M16, Code.LMSW_R64M16)
_INVPCID: Final = (Code.INVPCID_R64_M128, Code.INVPCID_R32_M128)
# What the silicon's #UD may be to L1.
_OF_UNDEFINED: Final = 1 << Intercept.EXCP_UD | 1 << Intercept.INVPCID | 1 << Intercept.ICEBP
_RDTSCP: Final = b"\x0f\x01\xf9"
_RDTSC: Final = b"\x0f\x31"


def reflect(svm: SvmState, vcpu: Vcpu, exit: Exit) -> Verdict | None:
    """The exit that L1 sees, or None when L0 handles it for L2."""
    code = exit.code
    if exit.event:
        _restore_rip(svm, vcpu, exit)
    else:
        svm.software_rip = None
    special = _SPECIAL.get(code)
    if special is not None:
        return special(svm, vcpu, exit)
    if code > _LAST or not svm.wanted >> code & 1:
        return None
    return leave(
        vcpu,
        svm,
        code,
        event=exit.event,
        next_rip=information.next_rip(vcpu) if code in _NEXT_RIP else 0,
    )


def _restore_rip(svm: SvmState, vcpu: Vcpu, exit: Exit) -> None:
    """The delivery of INT n, INT3 or INTO did not finish: RIP is the instruction's.

    The silicon has moved it to the next one by then.
    """
    kind, state = exit.event >> 8 & 7, vcpu.state
    one_byte = _ONE_BYTE.get(exit.event & 0xFF)
    if kind != EventType.SOFTWARE_INTERRUPT and (kind != EventType.EXCEPTION or not one_byte):
        return
    if svm.software_rip is None:
        before = vcpu.read_gva(vcpu.linear_rip() - 1, 1)
        is_exception = bool(one_byte) and before == one_byte
        if is_exception:  # the silicon calls INT3 and INTO software interrupts
            exit.event = exit.event & ~_TYPE | EventType.EXCEPTION << 8
        svm.software_rip = state.next_rip - (1 if is_exception else 2)
    state.rip = svm.software_rip


def fault(vcpu: Vcpu, svm: SvmState, event: int, raised: Fault) -> Switched | None:
    """An exception of L2: the exit that L1 sees, or None when L2 gets it.

    The error code is EXITINFO1; a page fault's address is EXITINFO2, and CR2 stays.
    """
    if not svm.wanted >> (ExitCode.EXCP_DE + raised.vector) & 1:
        return None
    page_fault = raised.vector == Vector.PF
    return leave(
        vcpu,
        svm,
        ExitCode.EXCP_DE + raised.vector,
        raised.error_code or 0,
        raised.address or 0,
        event=event,
        fetched=paging.instruction_bytes(vcpu, svm) if page_fault else b"",
    )


def raised_by(exit: Exit) -> Fault:
    """The exception that the silicon stopped at, as a fault."""
    vector = Vector(exit.code - ExitCode.EXCP_DE)
    has_error = VECTORS_WITH_ERROR_CODE >> vector & 1
    address = exit.info2 if vector is Vector.PF else None
    return Fault(vector, exit.info1 if has_error else None, address)


# -- exits that need a look --------------------------------------------------------------------


def _exception(svm: SvmState, vcpu: Vcpu, exit: Exit) -> Verdict | None:
    return fault(vcpu, svm, exit.event, raised_by(exit))


def _undefined(svm: SvmState, vcpu: Vcpu, exit: Exit) -> Verdict | None:
    """#UD; unless the processor that L1 sees has the instruction, and only ours has not."""
    wants_invpcid = svm.wanted >> Intercept.INVPCID & 1
    if not svm.wanted & _OF_UNDEFINED:
        return None
    decoded = decode.instruction(vcpu)
    if decoded.code == Code.INT1:
        return _plain(svm, vcpu, ExitCode.ICEBP)
    feature, _ = exceptions.EMULATED.get(decoded.code, ("", None))
    if feature and vcpu.has(feature):
        if wants_invpcid and decoded.code in _INVPCID and not vcpu.state.cpl:
            return leave(vcpu, svm, ExitCode.INVPCID, next_rip=information.next_rip(vcpu))
        return None
    return _exception(svm, vcpu, exit)


def _cr_access(svm: SvmState, vcpu: Vcpu, exit: Exit) -> Verdict | None:
    """MOV to and from CRx, with the register's number for decode assists."""
    if not svm.wanted >> exit.code & 1:
        return None
    return _leave_cr(svm, vcpu, exit.code, decode.instruction(vcpu))


def _leave_cr(svm: SvmState, vcpu: Vcpu, code: int, decoded: decode.Instruction) -> Verdict:
    read = code < ExitCode.CR0_WRITE
    move = decoded.mnemonic == _MNEMONIC_MOV
    register = decoded.op0_register if read else decoded.op1_register
    info = _MOV | information.register_number(register) if move else 0
    return leave(vcpu, svm, code, info, next_rip=information.next_rip(vcpu))


def _cr0_write(svm: SvmState, vcpu: Vcpu, exit: Exit) -> Verdict | None:
    """The selective intercept leaves out writes that change TS and MP only."""
    if svm.wanted >> ExitCode.CR0_WRITE & 1:
        return _cr_access(svm, vcpu, exit)
    if not svm.wanted >> ExitCode.CR0_SEL_WRITE & 1:
        return None
    decoded = decode.instruction(vcpu)
    if decoded.code == Code.CLTS:
        return None
    old = vcpu.state.cr0
    if decoded.code in _LMSW:
        source = control_registers.machine_status_word(vcpu, decoded)
        if isinstance(source, Fault):
            return None
        new = legalize_lmsw(old, source)
    else:
        new = decode.read_register(vcpu, decoded.op1_register)
    if not (old ^ new) & _SELECTIVE:
        return None
    return _leave_cr(svm, vcpu, ExitCode.CR0_SEL_WRITE, decoded)


def _dr_access(svm: SvmState, vcpu: Vcpu, exit: Exit) -> Verdict | None:
    """MOV to and from DRx."""
    if not svm.wanted >> exit.code & 1:
        return None
    decoded = decode.instruction(vcpu)
    read = exit.code < ExitCode.DR0_WRITE
    number = information.register_number(decoded.op0_register if read else decoded.op1_register)
    return leave(vcpu, svm, exit.code, number, next_rip=information.next_rip(vcpu))


def _software_interrupt(svm: SvmState, vcpu: Vcpu, exit: Exit) -> Verdict | None:
    """INT n, and INT3 and INTO, which are exceptions to L1 and software interrupts to silicon."""
    vector, _ = information.software_vector(vcpu)
    if vector in (Vector.BP, Vector.OF) and decode.instruction(vcpu).code != Code.INT_IMM8:
        code, info = ExitCode.EXCP_DE + vector, 0
    else:
        code, info = ExitCode.SWINT, vector
    if not svm.wanted >> code & 1:
        return None
    return leave(vcpu, svm, code, info, next_rip=information.next_rip(vcpu))


def _timestamp(svm: SvmState, vcpu: Vcpu, exit: Exit) -> Verdict | None:
    """RDTSC and RDTSCP have an intercept each; the silicon reports both alike."""
    if not svm.wanted & (1 << Intercept.RDTSC | 1 << Intercept.RDTSCP):
        return None
    data = decode.fetch(vcpu)
    is_rdtscp = data.startswith(_RDTSCP) or (
        not data.startswith(_RDTSC) and decode.instruction(vcpu).code == Code.RDTSCP
    )
    return _plain(svm, vcpu, ExitCode.RDTSCP if is_rdtscp else ExitCode.RDTSC)


def _cache_flush(svm: SvmState, vcpu: Vcpu, exit: Exit) -> Verdict | None:
    """INVD and WBINVD, which the silicon reports alike."""
    if not svm.wanted & (1 << Intercept.INVD | 1 << Intercept.WBINVD):
        return None
    invd = decode.instruction(vcpu).code == Code.INVD
    return _plain(svm, vcpu, ExitCode.INVD if invd else ExitCode.WBINVD)


def _plain(svm: SvmState, vcpu: Vcpu, code: int, info1: int = 0) -> Verdict | None:
    if not svm.wanted >> code & 1:
        return None
    return leave(vcpu, svm, code, info1, next_rip=information.next_rip(vcpu))


def _invlpg(svm: SvmState, vcpu: Vcpu, exit: Exit) -> Verdict | None:
    address = decode.linear_address(vcpu, decode.instruction(vcpu), 0)
    return _plain(svm, vcpu, ExitCode.INVLPG, address)


def _port(svm: SvmState, vcpu: Vcpu, exit: Exit) -> Verdict | None:
    """IN, OUT, INS and OUTS: L2's own permissions come before L1's map."""
    info = exit.info1
    port, size = info >> 16, info >> 4 & 7
    if not svm.wanted >> Intercept.IOIO_PROT & 1 or not io.permitted(vcpu, port, size):
        return None
    if not permissions.wants_port(vcpu, svm, port, size):
        return None
    decoded = decode.instruction(vcpu)
    return leave(
        vcpu,
        svm,
        ExitCode.IOIO,
        info | information.io_details(vcpu, decoded),
        information.next_rip(vcpu),
        next_rip=information.next_rip(vcpu),
    )


def _msr(svm: SvmState, vcpu: Vcpu, exit: Exit) -> Verdict | None:
    """RDMSR and WRMSR by L1's map."""
    if not svm.wanted >> Intercept.MSR_PROT & 1:
        return None
    write = exit.info1 & 1
    if not permissions.wants_msr(vcpu, svm, vcpu.state.q[1] & 0xFFFF_FFFF, write=bool(write)):
        return None
    return leave(vcpu, svm, ExitCode.MSR, write, next_rip=information.next_rip(vcpu))


def _pause(svm: SvmState, vcpu: Vcpu, exit: Exit) -> Verdict | None:
    """PAUSE, each or after the filter's count. APM 2 "Pause Intercept Filtering"."""
    if not svm.wanted >> Intercept.PAUSE & 1:
        return None
    if svm.pauses_left > 1:
        svm.pauses_left -= 1
        return None
    return _plain(svm, vcpu, ExitCode.PAUSE)


def _mwait(svm: SvmState, vcpu: Vcpu, exit: Exit) -> Verdict | None:
    """MWAIT; one intercept is only for a monitor that is armed."""
    if svm.wanted >> Intercept.MWAIT & 1:
        return _plain(svm, vcpu, ExitCode.MWAIT)
    return _plain(svm, vcpu, ExitCode.MWAIT_CONDITIONAL) if svm.monitor_armed else None


def _xsetbv(svm: SvmState, vcpu: Vcpu, exit: Exit) -> Verdict | None:
    """XSETBV exits before its #GP, and behind its #UD. APM 2, "Instruction Intercepts"."""
    return _plain(svm, vcpu, ExitCode.XSETBV) if vcpu.state.cr4 & Cr4.osxsave else None


def _nested_page_fault(svm: SvmState, vcpu: Vcpu, exit: Exit) -> Verdict | None:
    return paging.fault(vcpu, svm, exit)


def _window(svm: SvmState, vcpu: Vcpu, exit: Exit) -> Verdict | None:
    """The silicon's VINTR exit is L0's own; L1's is made where interrupts are delivered."""
    return None


_MNEMONIC_MOV: Final = decode.iced_x86.Mnemonic.MOV

_SPECIAL: Final[dict[int, Reflection]] = {
    **dict.fromkeys(range(ExitCode.CR0_READ, ExitCode.CR15_WRITE + 1), _cr_access),
    **dict.fromkeys(range(ExitCode.DR0_READ, ExitCode.DR15_WRITE + 1), _dr_access),
    **dict.fromkeys(range(ExitCode.EXCP_DE, ExitCode.EXCP_31 + 1), _exception),
    ExitCode.CR0_WRITE: _cr0_write,
    ExitCode.EXCP_UD: _undefined,
    ExitCode.SWINT: _software_interrupt,
    ExitCode.RDTSC: _timestamp,
    ExitCode.WBINVD: _cache_flush,
    ExitCode.INVLPG: _invlpg,
    ExitCode.IOIO: _port,
    ExitCode.MSR: _msr,
    ExitCode.PAUSE: _pause,
    ExitCode.MWAIT: _mwait,
    ExitCode.XSETBV: _xsetbv,
    ExitCode.NPF: _nested_page_fault,
    ExitCode.VINTR: _window,
}
