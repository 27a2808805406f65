"""Which exits of L2 L1 wants: a function per exit of the silicon, and the information it needs.

SDM 3C "VMX Non-Root Operation".  A function returns None where L1's controls leave the event to
the processor: then L0 handles it for L2 like for L1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from iced_x86 import Code, Mnemonic, OpKind

from undervisor.arch.vmx.controls import PrimaryControls as P
from undervisor.arch.vmx.controls import SecondaryControls as S
from undervisor.arch.vmx.exits import CrAccessType, GdtrIdtrInstruction, LdtrTrInstruction
from undervisor.arch.vmx.exits import ExitReason as R
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.events import GP0, UD, Fault, Vector
from undervisor.arch.x86.registers import Cr0, Rflags
from undervisor.hypervisor import decode
from undervisor.hypervisor.exit import Exit
from undervisor.hypervisor.exits import control_registers, exceptions, io
from undervisor.hypervisor.nested.vmx import (
    apic,
    events,
    information,
    instructions,
    paging,
    permissions,
)
from undervisor.hypervisor.nested.vmx.exit import leave
from undervisor.hypervisor.verdict import ADVANCE, Inject, Switched, Verdict
from undervisor.silicon.glue import EXIT_XSETBV
from undervisor.silicon.world import ExitCode

if TYPE_CHECKING:
    from undervisor.hypervisor.nested.vmx import NestedVmx
    from undervisor.hypervisor.vcpu import Vcpu

Reflector = Callable[["Vcpu", "NestedVmx", Exit], Verdict | None]

VALID: Final = 1 << 31
_HARDWARE_EXCEPTION, _PRIVILEGED, _SOFTWARE = 3, 5, 6
_ERROR_CODE: Final = 1 << 11


def _plain(vcpu: Vcpu, nested: NestedVmx, reason: R) -> Verdict:
    """An exit whose only information is the instruction's length."""
    return leave(vcpu, nested, reason, length=decode.length(vcpu))


def _when(control: int, reason: R, *, secondary: bool = False) -> Reflector:
    """An instruction that exits if one control is 1."""

    def reflect(vcpu: Vcpu, nested: NestedVmx, exit: Exit) -> Verdict | None:
        word = nested.secondary if secondary else nested.primary
        return _plain(vcpu, nested, reason) if word & control else None

    return reflect


def cpuid(vcpu: Vcpu, nested: NestedVmx, exit: Exit) -> Verdict:
    """CPUID always exits."""
    return _plain(vcpu, nested, R.CPUID)


def xsetbv(vcpu: Vcpu, nested: NestedVmx, exit: Exit) -> Verdict:
    """XSETBV always exits; its #UD comes first, its #GP for CPL too."""
    if not vcpu.state.cr4 >> 18 & 1:
        return Inject(UD)
    return Inject(GP0) if vcpu.state.cpl else _plain(vcpu, nested, R.XSETBV)


def invd_or_wbinvd(vcpu: Vcpu, nested: NestedVmx, exit: Exit) -> Verdict | None:
    """INVD always exits, WBINVD on demand; the silicon reports both alike."""
    decoded = decode.instruction(vcpu)
    if decoded.code == Code.INVD:
        return leave(vcpu, nested, R.INVD, length=decoded.len)
    if nested.secondary & S.wbinvd_exiting:
        return leave(vcpu, nested, R.WBINVD_OR_WBNOINVD, length=decoded.len)
    return None


def rdtsc(vcpu: Vcpu, nested: NestedVmx, exit: Exit) -> Verdict | None:
    """RDTSC and RDTSCP, which is undefined unless enabled."""
    decoded = decode.instruction(vcpu)
    is_rdtscp = decoded.code == Code.RDTSCP
    if is_rdtscp and not nested.secondary & S.enable_rdtscp:
        return Inject(UD)
    if not nested.primary & P.rdtsc_exiting:
        return None
    return leave(vcpu, nested, R.RDTSCP if is_rdtscp else R.RDTSC, length=decoded.len)


def pause(vcpu: Vcpu, nested: NestedVmx, exit: Exit) -> Verdict | None:
    """PAUSE, and a loop of them at CPL 0 ("PAUSE-loop exiting")."""
    if nested.primary & P.pause_exiting or nested.is_pause_loop(vcpu):
        return _plain(vcpu, nested, R.PAUSE)
    if nested.secondary & S.pause_loop_exiting:
        return ADVANCE[decode.length(vcpu)]  # L1 yields, and no time passes meanwhile
    return None


def mwait(vcpu: Vcpu, nested: NestedVmx, exit: Exit) -> Verdict | None:
    """MWAIT; bit 0 of the qualification says that the monitor was armed, which is never seen."""
    if not nested.primary & P.mwait_exiting:
        return None
    return leave(vcpu, nested, R.MWAIT, int(nested.monitor_armed), length=decode.length(vcpu))


def invlpg(vcpu: Vcpu, nested: NestedVmx, exit: Exit) -> Verdict | None:
    """INVLPG: the qualification is the linear address."""
    if not nested.primary & P.invlpg_exiting:
        return None
    decoded = decode.instruction(vcpu)
    address = decode.linear_address(vcpu, decoded, 0)
    return leave(vcpu, nested, R.INVLPG, address, length=decoded.len)


# -- control registers --------------------------------------------------------------------------


def _cr_exit(
    vcpu: Vcpu,
    nested: NestedVmx,
    decoded: decode.Instruction,
    number: int,
    kind: CrAccessType,
    register: int = 0,
    source: int = 0,
    linear: int = 0,
) -> Verdict:
    qualification = number | kind << 4 | register << 8 | source << 16
    if linear:
        qualification |= 1 << 6
    return leave(
        vcpu,
        nested,
        R.CONTROL_REGISTER_ACCESSES,
        qualification,
        length=decoded.len,
        linear=linear,
    )


def _finish(fault: Fault | None, decoded: decode.Instruction) -> Verdict:
    return Inject(fault) if fault else ADVANCE[decoded.len]


def write_control_register(vcpu: Vcpu, nested: NestedVmx, exit: Exit) -> Verdict | None:
    """MOV to CR, CLTS and LMSW. SDM 3C "Changes to Instruction Behavior"."""
    decoded = decode.instruction(vcpu)
    number = exit.code & 0xF
    if decoded.code == Code.CLTS:
        return _clear_task_switched(vcpu, nested, decoded)
    if decoded.mnemonic == Mnemonic.LMSW:
        return _load_machine_status(vcpu, nested, decoded)
    register = information.gpr(decoded.op1_register)
    value = decode.read_register(vcpu, decoded.op1_register)
    fields = nested.fields
    move = CrAccessType.MOV_TO_CR
    if number == 3:
        if nested.primary & P.cr3_load_exiting and not _is_target(fields, value):
            return _cr_exit(vcpu, nested, decoded, 3, move, register)
        return None
    if number == 8:
        if nested.primary & P.cr8_load_exiting:
            return _cr_exit(vcpu, nested, decoded, 8, move, register)
        return apic.write_cr8(vcpu, nested, decoded, value)
    mask, shadow = (
        (fields[F.CR0_GUEST_HOST_MASK], fields[F.CR0_READ_SHADOW])
        if number == 0
        else (fields[F.CR4_GUEST_HOST_MASK], fields[F.CR4_READ_SHADOW])
    )
    if (value ^ shadow) & mask:
        return _cr_exit(vcpu, nested, decoded, number, move, register)
    if number == 0:
        kept = value & ~mask | vcpu.state.cr0 & mask
        return _finish(control_registers.write_cr0(vcpu, kept), decoded)
    kept = value & ~mask | vcpu.state.cr4 & mask
    return _finish(control_registers.write_cr4(vcpu, kept), decoded)


def _is_target(fields: dict[int, int], value: int) -> bool:
    count = fields[F.CR3_TARGET_COUNT]
    return any(fields[F.CR3_TARGET_VALUE_0 + 2 * i] == value for i in range(min(count, 4)))


def _clear_task_switched(vcpu: Vcpu, nested: NestedVmx, decoded: decode.Instruction) -> Verdict:
    mask, shadow = nested.fields[F.CR0_GUEST_HOST_MASK], nested.fields[F.CR0_READ_SHADOW]
    if mask & Cr0.ts:
        if shadow & Cr0.ts:
            return _cr_exit(vcpu, nested, decoded, 0, CrAccessType.CLTS)
        return ADVANCE[decoded.len]
    return _finish(control_registers.write_cr0(vcpu, vcpu.state.cr0 & ~Cr0.ts), decoded)


def _load_machine_status(vcpu: Vcpu, nested: NestedVmx, decoded: decode.Instruction) -> Verdict:
    source = control_registers.machine_status_word(vcpu, decoded)
    if isinstance(source, Fault):
        return Inject(source)
    mask, shadow = nested.fields[F.CR0_GUEST_HOST_MASK], nested.fields[F.CR0_READ_SHADOW]
    watched = mask & 0xE | (mask & Cr0.pe if source & Cr0.pe else 0)
    if (source ^ shadow) & watched:
        memory = decoded.op0_kind == OpKind.MEMORY
        linear = decode.linear_address(vcpu, decoded, 0) if memory else 0
        return _cr_exit(
            vcpu, nested, decoded, 0, CrAccessType.LMSW, source=source & 0xFFFF, linear=linear
        )
    cr0 = vcpu.state.cr0
    new = cr0 & ~(0xE & ~mask) | source & 0xE & ~mask | source & Cr0.pe & ~mask
    return _finish(control_registers.write_cr0(vcpu, new), decoded)


def read_control_register(vcpu: Vcpu, nested: NestedVmx, exit: Exit) -> Verdict | None:
    """MOV from CR and SMSW: bits that L1 owns are read from the read shadow."""
    decoded = decode.instruction(vcpu)
    number, fields, state = exit.code & 0xF, nested.fields, vcpu.state
    if number == 3 or number == 8:
        control = P.cr3_store_exiting if number == 3 else P.cr8_store_exiting
        if nested.primary & control:
            register = information.gpr(decoded.op0_register)
            return _cr_exit(vcpu, nested, decoded, number, CrAccessType.MOV_FROM_CR, register)
        return apic.read_cr8(vcpu, nested, decoded) if number == 8 else None
    if number == 0:
        mask, shadow = fields[F.CR0_GUEST_HOST_MASK], fields[F.CR0_READ_SHADOW]
        value = state.cr0 & ~mask | shadow & mask
    else:
        mask, shadow = fields[F.CR4_GUEST_HOST_MASK], fields[F.CR4_READ_SHADOW]
        value = state.cr4 & ~mask | shadow & mask
    return control_registers.store(vcpu, decoded, value)


def debug_register(vcpu: Vcpu, nested: NestedVmx, exit: Exit) -> Verdict | None:
    """MOV DR: its exit comes before #DB of DR7.GD, and even before #UD of DR4 and DR5 under CR4.DE.

    SDM 3C "Instructions That Cause VM Exits Conditionally".
    """
    number = exit.code & 0xF
    if not nested.primary & P.mov_dr_exiting or number > 7:
        return None
    decoded = decode.instruction(vcpu)
    is_read = exit.code < ExitCode.DR0_WRITE
    register = decoded.op0_register if is_read else decoded.op1_register
    qualification = number | int(is_read) << 4 | information.gpr(register) << 8
    return leave(vcpu, nested, R.MOV_DR, qualification, length=decoded.len)


# -- I/O and MSRs -------------------------------------------------------------------------------


def port_access(vcpu: Vcpu, nested: NestedVmx, exit: Exit) -> Verdict | None:
    """IN, OUT, INS and OUTS; the permission check of the instruction comes first."""
    info = exit.info1
    port, size = info >> 16, info >> 4 & 7
    if not io.permitted(vcpu, port, size):
        return Inject(GP0)
    if not permissions.port_exits(vcpu.memory, nested.primary, nested.fields, port, size):
        return None
    decoded = decode.instruction(vcpu)
    qualification = size - 1 | (info & 1) << 3 | port << 16
    linear = instruction_information = 0
    if decode.is_string(decoded):
        repeated = decoded.has_rep_prefix or decoded.has_repne_prefix
        qualification |= 1 << 4 | int(repeated) << 5
        linear = decode.linear_address(vcpu, decoded, 0 if info & 1 else 1)
        instruction_information = information.string_io(decoded, decode.bitness(vcpu))
        if repeated and not vcpu.state.q[1] & decode.string_address_mask(vcpu, decoded):
            return None
    elif OpKind.IMMEDIATE8 in (decoded.op0_kind, decoded.op1_kind):
        qualification |= 1 << 6
    return leave(
        vcpu,
        nested,
        R.IO_INSTRUCTION,
        qualification,
        length=decoded.len,
        linear=linear,
        information=instruction_information,
    )


def msr_access(vcpu: Vcpu, nested: NestedVmx, exit: Exit) -> Verdict | None:
    """RDMSR and WRMSR; the silicon has checked the privilege level."""
    write = bool(exit.info1 & 1)
    number = vcpu.state.q[1] & 0xFFFF_FFFF
    if permissions.msr_exits(vcpu.memory, nested.primary, nested.fields, number, write=write):
        return _plain(vcpu, nested, R.WRMSR if write else R.RDMSR)
    return apic.msr_access(vcpu, nested, number, write=write)


# -- descriptor tables --------------------------------------------------------------------------

_GDTR_IDTR: Final = {
    ExitCode.GDTR_READ: GdtrIdtrInstruction.SGDT,
    ExitCode.IDTR_READ: GdtrIdtrInstruction.SIDT,
    ExitCode.GDTR_WRITE: GdtrIdtrInstruction.LGDT,
    ExitCode.IDTR_WRITE: GdtrIdtrInstruction.LIDT,
}
_LDTR_TR: Final = {
    ExitCode.LDTR_READ: LdtrTrInstruction.SLDT,
    ExitCode.TR_READ: LdtrTrInstruction.STR,
    ExitCode.LDTR_WRITE: LdtrTrInstruction.LLDT,
    ExitCode.TR_WRITE: LdtrTrInstruction.LTR,
}


def descriptor_table(vcpu: Vcpu, nested: NestedVmx, exit: Exit) -> Verdict | None:
    """LGDT, LIDT, LLDT, LTR, SGDT, SIDT, SLDT and STR; LTR comes here for L0's own sake too."""
    if not nested.secondary & S.descriptor_table_exiting:
        return None
    decoded = decode.instruction(vcpu)
    code = ExitCode(exit.code)
    reason = R.ACCESS_TO_GDTR_OR_IDTR if code in _GDTR_IDTR else R.ACCESS_TO_LDTR_OR_TR
    identity = _GDTR_IDTR[code] if code in _GDTR_IDTR else _LDTR_TR[code]
    return leave(
        vcpu,
        nested,
        reason,
        information.displacement(decoded),
        length=decoded.len,
        information=information.table_instruction(decoded, decode.bitness(vcpu), identity),
    )


# -- exceptions ---------------------------------------------------------------------------------


def wants_exception(nested: NestedVmx, vector: int, error_code: int) -> bool:
    """The exception bitmap, with the mask and match of page faults."""
    fields = nested.fields
    wanted = bool(fields[F.EXCEPTION_BITMAP] >> vector & 1)
    if vector != Vector.PF:
        return wanted
    mask, match = fields[F.PAGE_FAULT_ERROR_CODE_MASK], fields[F.PAGE_FAULT_ERROR_CODE_MATCH]
    return wanted if error_code & mask == match else not wanted


def exception(vcpu: Vcpu, nested: NestedVmx, exit: Exit) -> Verdict | None:
    """A hardware exception of L2 that the silicon intercepted."""
    vector = exit.code - ExitCode.EXCP_DE
    has_code = vector < 32 and Vector(vector).has_error_code
    error_code = exit.info1 if has_code else 0
    address = exit.info2 if vector == Vector.PF else None
    if vector == Vector.UD:
        handled = undefined(vcpu, nested, exit)
        if handled is not None:
            return handled
    fault = Fault(Vector(vector), error_code if has_code else None, address)
    if not wants_exception(nested, vector, error_code):
        return Inject(fault)
    return leave_for(vcpu, nested, fault)


def leave_for(vcpu: Vcpu, nested: NestedVmx, fault: Fault) -> Verdict:
    """The VM exit for a hardware exception; a fault's saved RFLAGS have RF."""
    interruption = fault.vector | _HARDWARE_EXCEPTION << 8 | VALID
    qualification = fault.address or 0
    if fault.error_code is not None:
        interruption |= _ERROR_CODE
    if fault.vector == Vector.DB:
        qualification = vcpu.take_back_debug() | events.take_pending(nested)
    else:
        vcpu.state.q[17] |= Rflags.rf
    if fault.vector == Vector.DF:  # not "during event delivery": it took the first event's place
        vcpu.exit.event = 0
    return leave(
        vcpu,
        nested,
        R.EXCEPTION_OR_NMI,
        qualification,
        interruption=interruption,
        error_code=fault.error_code or 0,
    )


def software_interrupt(vcpu: Vcpu, nested: NestedVmx, exit: Exit) -> Verdict:
    """INT3 and INTO are exceptions that may exit; INT n is not, and is carried out."""
    decoded = decode.instruction(vcpu)
    vectors = {Code.INT3: Vector.BP, Code.INTO: Vector.OF}
    vector = vectors.get(decoded.code)
    if vector is not None and nested.fields[F.EXCEPTION_BITMAP] >> vector & 1:
        interruption = vector | _SOFTWARE << 8 | VALID
        return leave(
            vcpu, nested, R.EXCEPTION_OR_NMI, length=decoded.len, interruption=interruption
        )
    number = int(vector) if vector is not None else decoded.immediate8
    return Switched(vcpu.processor.inject_software(number, decoded.len))


def icebp(vcpu: Vcpu, nested: NestedVmx, exit: Exit) -> Verdict:
    """INT1: a privileged software exception."""
    length = decode.instruction(vcpu).len
    if not nested.fields[F.EXCEPTION_BITMAP] >> Vector.DB & 1:
        return Switched(vcpu.processor.inject_software(Vector.DB, length, _PRIVILEGED))
    interruption = Vector.DB | _PRIVILEGED << 8 | VALID
    return leave(vcpu, nested, R.EXCEPTION_OR_NMI, length=length, interruption=interruption)


def shutdown(vcpu: Vcpu, nested: NestedVmx, exit: Exit) -> Verdict:
    """A triple fault always exits."""
    exit.event = 0
    return leave(vcpu, nested, R.TRIPLE_FAULT)


# -- instructions that the silicon does not know ------------------------------------------------

# A VMX instruction exits unconditionally; the reason is in the manual's table.
_VMX: Final[dict[int, R]] = {
    Code.VMCALL: R.VMCALL,
    Code.VMCLEAR_M64: R.VMCLEAR,
    Code.VMLAUNCH: R.VMLAUNCH,
    Code.VMPTRLD_M64: R.VMPTRLD,
    Code.VMPTRST_M64: R.VMPTRST,
    Code.VMREAD_RM64_R64: R.VMREAD,
    Code.VMREAD_RM32_R32: R.VMREAD,
    Code.VMRESUME: R.VMRESUME,
    Code.VMWRITE_R64_RM64: R.VMWRITE,
    Code.VMWRITE_R32_RM32: R.VMWRITE,
    Code.VMXOFF: R.VMXOFF,
    Code.VMXON_M64: R.VMXON,
    Code.INVEPT_R64_M128: R.INVEPT,
    Code.INVEPT_R32_M128: R.INVEPT,
    Code.INVVPID_R64_M128: R.INVVPID,
    Code.INVVPID_R32_M128: R.INVVPID,
}
_ANYWHERE: Final = frozenset({Code.VMCALL})
_SHADOWED: Final = frozenset(
    {Code.VMREAD_RM64_R64, Code.VMREAD_RM32_R32, Code.VMWRITE_R64_RM64, Code.VMWRITE_R32_RM32}
)
_RANDOM: Final = {
    Mnemonic.RDRAND: (S.rdrand_exiting, R.RDRAND),
    Mnemonic.RDSEED: (S.rdseed_exiting, R.RDSEED),
}


def undefined(vcpu: Vcpu, nested: NestedVmx, exit: Exit) -> Verdict | None:
    """#UD of L2: an instruction that exits or that L0 emulates; None where it is a #UD."""
    decoded = decode.instruction(vcpu)
    reason = _VMX.get(decoded.code)
    if reason is not None:
        return _vmx_instruction(vcpu, nested, decoded, reason)
    if decoded.code == Code.VMFUNC:
        return nested.vmfunc(vcpu, decoded)
    if decoded.code == Code.INT1:
        return icebp(vcpu, nested, exit)
    random = _RANDOM.get(decoded.mnemonic)
    if random is not None and nested.secondary & random[0] and vcpu.has(decoded_name(decoded)):
        extra = information.random_instruction(decoded)
        return leave(vcpu, nested, random[1], length=decoded.len, information=extra)
    if decoded.mnemonic == Mnemonic.INVPCID and _invpcid_exits(vcpu, nested):
        return _with_operand(vcpu, nested, decoded, R.INVPCID)
    verdict = exceptions.undefined(vcpu, exit)
    return None if isinstance(verdict, Inject) and verdict.fault.vector == Vector.UD else verdict


def decoded_name(decoded: decode.Instruction) -> str:
    """The CPUID feature of RDRAND or RDSEED."""
    return "rdrand" if decoded.mnemonic == Mnemonic.RDRAND else "rdseed"


def _invpcid_exits(vcpu: Vcpu, nested: NestedVmx) -> bool:
    return bool(
        nested.secondary & S.enable_invpcid
        and nested.primary & P.invlpg_exiting
        and vcpu.has("invpcid")
        and not vcpu.state.cpl
    )


def _vmx_instruction(
    vcpu: Vcpu, nested: NestedVmx, decoded: decode.Instruction, reason: R
) -> Verdict | None:
    if decoded.code not in _ANYWHERE and instructions.is_undefined(vcpu):
        return None
    if decoded.code in _SHADOWED and nested.secondary & S.vmcs_shadowing:
        shadowed = nested.shadow_access(vcpu, decoded)
        if shadowed is not None:
            return shadowed
    return _with_operand(vcpu, nested, decoded, reason)


def _with_operand(vcpu: Vcpu, nested: NestedVmx, decoded: decode.Instruction, reason: R) -> Verdict:
    extra = 0
    if decoded.op_count:
        extra = information.vmx_instruction(decoded, decode.bitness(vcpu))
    return leave(
        vcpu,
        nested,
        reason,
        information.displacement(decoded),
        length=decoded.len,
        information=extra,
    )


REFLECT: Final[dict[int, Reflector]] = {
    ExitCode.CR0_WRITE: write_control_register,
    ExitCode.CR3_WRITE: write_control_register,
    ExitCode.CR4_WRITE: write_control_register,
    ExitCode.CR8_WRITE: write_control_register,
    ExitCode.CR0_READ: read_control_register,
    ExitCode.CR3_READ: read_control_register,
    ExitCode.CR4_READ: read_control_register,
    ExitCode.CR8_READ: read_control_register,
    **{
        code: debug_register
        for code in ExitCode
        if ExitCode.DR0_READ <= code <= ExitCode.DR15_WRITE
    },
    **{code: exception for code in ExitCode if ExitCode.EXCP_DE <= code <= ExitCode.EXCP_31},
    ExitCode.IDTR_READ: descriptor_table,
    ExitCode.GDTR_READ: descriptor_table,
    ExitCode.LDTR_READ: descriptor_table,
    ExitCode.TR_READ: descriptor_table,
    ExitCode.IDTR_WRITE: descriptor_table,
    ExitCode.GDTR_WRITE: descriptor_table,
    ExitCode.LDTR_WRITE: descriptor_table,
    ExitCode.TR_WRITE: descriptor_table,
    ExitCode.RDTSC: rdtsc,
    ExitCode.RDPMC: _when(P.rdpmc_exiting, R.RDPMC),
    ExitCode.CPUID: cpuid,
    ExitCode.SWINT: software_interrupt,
    ExitCode.INVD: invd_or_wbinvd,
    ExitCode.WBINVD: invd_or_wbinvd,
    ExitCode.PAUSE: pause,
    ExitCode.HLT: _when(P.hlt_exiting, R.HLT),
    ExitCode.INVLPG: invlpg,
    ExitCode.IOIO: port_access,
    ExitCode.MSR: msr_access,
    ExitCode.SHUTDOWN: shutdown,
    ExitCode.ICEBP: icebp,
    ExitCode.MONITOR: _when(P.monitor_exiting, R.MONITOR),
    ExitCode.MWAIT: mwait,
    EXIT_XSETBV: xsetbv,
    ExitCode.NPF: paging.nested_page_fault,
}
