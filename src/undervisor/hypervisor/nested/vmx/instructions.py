"""The VMX instructions as L1 executes them in VMX root operation: each arrives as #UD.

SDM 3C "VMX Instruction Reference".  Every instruction has the same rhythm: faults, checks,
operation, success.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from iced_x86 import Code, OpKind

from undervisor.arch.vmx.capabilities import FeatureControl
from undervisor.arch.vmx.errors import VmInstructionError as Error
from undervisor.arch.vmx.fields import HIGH, FieldArea, FieldWidth
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.events import GP0, UD, Fault, GuestFault
from undervisor.arch.x86.msr import Msr
from undervisor.arch.x86.paging import is_canonical
from undervisor.arch.x86.registers import Cr0, Cr4, Efer, Rflags
from undervisor.hypervisor import decode
from undervisor.hypervisor.exit import Exit
from undervisor.hypervisor.exits import exceptions
from undervisor.hypervisor.nested.vmx import entry, paging, usual
from undervisor.hypervisor.nested.vmx.state import (
    LAZY,
    NO_VMCS,
    SHADOW_BIT,
    Vmcs,
)
from undervisor.hypervisor.verdict import ADVANCE, Inject, Verdict

if TYPE_CHECKING:
    from undervisor.hypervisor.nested.vmx import NestedVmx
    from undervisor.hypervisor.vcpu import Vcpu

Instruction = Callable[["Vcpu", "NestedVmx", decode.Instruction], Verdict]

_PAGE_OFFSET: Final = 0xFFF
_MASK64: Final = (1 << 64) - 1
_WIDTH_MASK: Final = {
    FieldWidth.BITS_16: 0xFFFF,
    FieldWidth.BITS_32: 0xFFFF_FFFF,
    FieldWidth.BITS_64: (1 << 64) - 1,
    FieldWidth.NATURAL: (1 << 64) - 1,
}
MASKS: Final[dict[int, int]] = {int(f): _WIDTH_MASK[f.width] for f in F}
READ_ONLY: Final = frozenset(int(f) for f in F if f.area is FieldArea.READ_ONLY)


# -- outcomes. SDM 3C "Conventions" -------------------------------------------------------------


def succeed(vcpu: Vcpu, decoded: decode.Instruction) -> Verdict:
    """VMsucceed: the six status flags are clear."""
    vcpu.state.set_status(0)
    return ADVANCE[decoded.len]


def fail_invalid(vcpu: Vcpu, decoded: decode.Instruction) -> Verdict:
    """VMfailInvalid: CF, because there is no current VMCS for an error number."""
    vcpu.state.set_status(Rflags.cf)
    return ADVANCE[decoded.len]


def fail(vcpu: Vcpu, nested: NestedVmx, decoded: decode.Instruction, error: Error) -> Verdict:
    """VMfail: VMfailValid with the error number where a VMCS is current, else VMfailInvalid."""
    vmcs = nested.vmx.current
    if vmcs is None:
        return fail_invalid(vcpu, decoded)
    vmcs.fields[F.VM_INSTRUCTION_ERROR] = int(error)
    nested.reason = f"VMfailValid({int(error)}): {error.sentence}"
    vcpu.state.set_status(Rflags.zf)
    return ADVANCE[decoded.len]


# -- faults -------------------------------------------------------------------------------------


def undefined(vcpu: Vcpu, exit: Exit) -> Verdict:
    """#UD of L1: a VMX instruction, or one that the common handler knows."""
    nested: NestedVmx = vcpu.nested  # type: ignore[assignment]
    nested.last = ""
    data = vcpu.processor.instruction.raw
    quick = _quick.get(data)
    if quick is not None and vcpu.state.d[usual.HFLAGS] & usual.MODE_MASK == usual.MODE:
        verdict = quick(vcpu, nested)
        if verdict is not None:
            return verdict
    decoded = decode.instruction(vcpu)
    operation = INSTRUCTIONS.get(decoded.code)
    if operation is None:
        return exceptions.undefined(vcpu, exit)
    if quick is None and data[15]:
        _remember(data, decoded)
    return operation(vcpu, nested, decoded)


def _resume(vcpu: Vcpu, nested: NestedVmx, *, decoded: decode.Instruction) -> Verdict | None:
    """VMRESUME that passes its own checks; None where it does not."""
    vmcs = nested.vmx.current
    if vmcs is None or vmcs.is_shadow or not vmcs.launched or vcpu.state.interrupt_shadow:
        return None
    entered = entry.enter(vcpu, nested, vmcs, launch=False)
    return fail(vcpu, nested, decoded, entered) if isinstance(entered, Error) else entered


_quick: dict[bytes, usual.Usual] = {}
_MOST_REMEMBERED: Final = 1024


def _remember(data: bytes, decoded: decode.Instruction) -> None:
    """Work out the quick form of an instruction that has one."""
    quick = usual.prepare(decoded, MASKS)
    if decoded.code == Code.VMRESUME:
        quick = partial(_resume, decoded=decoded)
    if quick is not None:
        if len(_quick) >= _MOST_REMEMBERED:
            _quick.clear()
        _quick[data] = quick


def is_undefined(vcpu: Vcpu) -> bool:
    """The mode in which every VMX instruction is undefined."""
    state = vcpu.state
    if not state.cr0 & Cr0.pe or state.q[17] & Rflags.vm:
        return True
    return bool(state.efer & Efer.lma) and not state.hflags & 0x8000


def _check_faults(vcpu: Vcpu, nested: NestedVmx) -> None:
    """What every instruction but VMXON checks first: #UD, then #GP(0), as `GuestFault`."""
    if not nested.vmx.in_operation or is_undefined(vcpu):
        raise GuestFault(UD)
    if vcpu.state.cpl:
        raise GuestFault(GP0)


def memory_operand(vcpu: Vcpu, decoded: decode.Instruction, operand: int, size: int) -> int:
    """The value of a memory operand of 4, 8 or 16 bytes; GuestFault where it faults."""
    address = decode.data_address(vcpu, decoded, operand, size)
    data = address if isinstance(address, Fault) else vcpu.read_gva(address, size)
    if isinstance(data, Fault):
        raise GuestFault(data)
    return int.from_bytes(data, "little")


def _is_region(vcpu: Vcpu, gpa: int) -> bool:
    """Whether an address may be that of a VMXON or VMCS region."""
    assert vcpu.model.vmx is not None
    return not gpa & _PAGE_OFFSET and not gpa & vcpu.model.vmx.beyond_width


# -- VMX operation ------------------------------------------------------------------------------


def vmxon(vcpu: Vcpu, nested: NestedVmx, decoded: decode.Instruction) -> Verdict:
    """VMXON--Enter VMX Operation."""
    # FAULTS
    state, vmx = vcpu.state, nested.vmx
    if is_undefined(vcpu) or not state.cr4 & Cr4.vmxe:
        return Inject(UD)
    if vmx.in_operation:
        return (
            Inject(GP0)
            if state.cpl
            else fail(vcpu, nested, decoded, Error.VMXON_IN_VMX_ROOT_OPERATION)
        )
    control = FeatureControl(vcpu.msrs[Msr.FEATURE_CONTROL])
    fixed = nested.allows_fixed(vcpu, state.cr0, state.cr4)
    if state.cpl or not fixed or not control.lock or not control.vmx_outside_smx:
        return Inject(GP0)
    gpa = memory_operand(vcpu, decoded, 0, 8)
    # CHECKS
    if not _is_region(vcpu, gpa) or vcpu.memory.u32(gpa) != vmx.store.revision:
        return fail_invalid(vcpu, decoded)
    # OPERATION
    vmx.vmxon_gpa, vmx.current, vmx.in_operation = gpa, None, True
    # SUCCESS
    return succeed(vcpu, decoded)


def vmxoff(vcpu: Vcpu, nested: NestedVmx, decoded: decode.Instruction) -> Verdict:
    """VMXOFF--Leave VMX Operation."""
    # FAULTS
    _check_faults(vcpu, nested)
    # OPERATION: an INIT that was blocked is taken now
    nested.leave_operation(vcpu)
    vcpu.attention = True
    # SUCCESS
    return succeed(vcpu, decoded)


# -- VMCS ---------------------------------------------------------------------------------------


def vmclear(vcpu: Vcpu, nested: NestedVmx, decoded: decode.Instruction) -> Verdict:
    """VMCLEAR--Clear Virtual-Machine Control Structure."""
    # FAULTS
    _check_faults(vcpu, nested)
    gpa, vmx = memory_operand(vcpu, decoded, 0, 8), nested.vmx
    # CHECKS
    if not _is_region(vcpu, gpa):
        return fail(vcpu, nested, decoded, Error.VMCLEAR_WITH_INVALID_PHYSICAL_ADDRESS)
    if gpa == vmx.vmxon_gpa:
        return fail(vcpu, nested, decoded, Error.VMCLEAR_WITH_VMXON_POINTER)
    # OPERATION
    if vmx.current is not None and vmx.current.gpa == gpa:
        vmx.set_current(None, vcpu.vmcb02)
    vmx.store.clear(gpa)
    # SUCCESS
    return succeed(vcpu, decoded)


def vmptrld(vcpu: Vcpu, nested: NestedVmx, decoded: decode.Instruction) -> Verdict:
    """VMPTRLD--Load Pointer to Virtual-Machine Control Structure."""
    # FAULTS
    _check_faults(vcpu, nested)
    gpa, vmx = memory_operand(vcpu, decoded, 0, 8), nested.vmx
    # CHECKS
    if not _is_region(vcpu, gpa):
        return fail(vcpu, nested, decoded, Error.VMPTRLD_WITH_INVALID_PHYSICAL_ADDRESS)
    if gpa == vmx.vmxon_gpa:
        return fail(vcpu, nested, decoded, Error.VMPTRLD_WITH_VMXON_POINTER)
    revision = vcpu.memory.u32(gpa)
    shadow = revision & SHADOW_BIT and not vcpu.has("vmx-shadow-vmcs")
    if revision & ~SHADOW_BIT != vmx.store.revision or shadow:
        return fail(vcpu, nested, decoded, Error.VMPTRLD_WITH_INCORRECT_REVISION_IDENTIFIER)
    # OPERATION
    if vmx.current is None or vmx.current.gpa != gpa:
        vmx.set_current(None, vcpu.vmcb02)
        vmx.current = vmx.store.load(gpa)
    # SUCCESS
    return succeed(vcpu, decoded)


def vmptrst(vcpu: Vcpu, nested: NestedVmx, decoded: decode.Instruction) -> Verdict:
    """VMPTRST--Store Pointer to Virtual-Machine Control Structure."""
    # FAULTS
    _check_faults(vcpu, nested)
    current = nested.vmx.current
    pointer = NO_VMCS if current is None else current.gpa
    address = decode.data_address(vcpu, decoded, 0, 8, write=True)
    if isinstance(address, Fault):
        return Inject(address)
    # OPERATION
    fault = vcpu.write_gva(address, pointer.to_bytes(8, "little"))
    # SUCCESS
    return Inject(fault) if fault else succeed(vcpu, decoded)


# -- fields -------------------------------------------------------------------------------------


def read_field(vmcs: Vmcs, encoding: int) -> int | None:
    """A field by its encoding, the high half with bit 0; None where there is no such field."""
    if encoding in vmcs.known:
        return vmcs.fields[encoding]
    whole = encoding & ~HIGH
    if encoding != whole and whole in vmcs.known and encoding >> 13 & 3 == FieldWidth.BITS_64:
        return vmcs.fields[whole] >> 32
    return None


def write_field(vmcs: Vmcs, encoding: int, value: int) -> bool:
    """Write a field; False where there is no such field."""
    if encoding in vmcs.known:
        vmcs.fields[encoding] = value & MASKS[encoding]
    elif encoding & HIGH and encoding >> 13 & 3 == FieldWidth.BITS_64:
        encoding &= ~HIGH
        if encoding not in vmcs.known:
            return False
        low = vmcs.fields[encoding] & 0xFFFF_FFFF
        vmcs.fields[encoding] = low | (value & 0xFFFF_FFFF) << 32
    else:
        return False
    vmcs.written.add(encoding)
    return True


def vmread(vcpu: Vcpu, nested: NestedVmx, decoded: decode.Instruction) -> Verdict:
    """VMREAD--Read Field from Virtual-Machine Control Structure."""
    # FAULTS
    _check_faults(vcpu, nested)
    # CHECKS
    vmcs = nested.vmx.current
    if vmcs is None:
        return fail_invalid(vcpu, decoded)
    encoding = decode.read_register(vcpu, decoded.op1_register)
    if vmcs.stale and encoding & ~HIGH in LAZY:
        vmcs.synchronize(vcpu.vmcb02)
    value = read_field(vmcs, encoding)
    if value is None:
        return fail(vcpu, nested, decoded, Error.ACCESS_TO_UNSUPPORTED_COMPONENT)
    # OPERATION
    fault = store_operand(vcpu, decoded, value)
    # SUCCESS
    return Inject(fault) if fault else succeed(vcpu, decoded)


def store_operand(vcpu: Vcpu, decoded: decode.Instruction, value: int) -> Fault | None:
    """The destination of VMREAD: a register, or 8 or 4 bytes of memory."""
    if decoded.op0_kind == OpKind.REGISTER:
        decode.write_register(vcpu, decoded.op0_register, value)
        return None
    size = decode.memory_size(decoded)
    address = decode.data_address(vcpu, decoded, 0, size, write=True)
    if isinstance(address, Fault):
        return address
    return vcpu.write_gva(address, (value & (1 << 8 * size) - 1).to_bytes(size, "little"))


def vmwrite(vcpu: Vcpu, nested: NestedVmx, decoded: decode.Instruction) -> Verdict:
    """VMWRITE--Write Field to Virtual-Machine Control Structure."""
    # FAULTS
    _check_faults(vcpu, nested)
    # CHECKS
    vmcs = nested.vmx.current
    if vmcs is None:
        return fail_invalid(vcpu, decoded)
    if decoded.op1_kind == OpKind.REGISTER:
        value = decode.read_register(vcpu, decoded.op1_register)
    else:
        value = memory_operand(vcpu, decoded, 1, decode.memory_size(decoded))
    encoding = decode.read_register(vcpu, decoded.op0_register)
    if vmcs.stale and encoding & ~HIGH in LAZY:
        vmcs.synchronize(vcpu.vmcb02)
    if encoding & ~HIGH in READ_ONLY and not nested.capabilities.misc.vmwrite_any_field:
        if read_field(vmcs, encoding) is None:
            return fail(vcpu, nested, decoded, Error.ACCESS_TO_UNSUPPORTED_COMPONENT)
        return fail(vcpu, nested, decoded, Error.VMWRITE_TO_READ_ONLY_COMPONENT)
    # OPERATION
    if not write_field(vmcs, encoding, value):
        return fail(vcpu, nested, decoded, Error.ACCESS_TO_UNSUPPORTED_COMPONENT)
    # SUCCESS
    return succeed(vcpu, decoded)


# -- entry and call -----------------------------------------------------------------------------


def _enter(vcpu: Vcpu, nested: NestedVmx, decoded: decode.Instruction, *, launch: bool) -> Verdict:
    # FAULTS
    _check_faults(vcpu, nested)
    # CHECKS
    vmcs = nested.vmx.current
    if vmcs is None or vmcs.is_shadow:
        return fail_invalid(vcpu, decoded)
    if vcpu.state.interrupt_shadow and decode.follows_mov_ss(vcpu):
        return fail(vcpu, nested, decoded, Error.ENTRY_WITH_EVENTS_BLOCKED_BY_MOV_SS)
    if launch and vmcs.launched:
        return fail(vcpu, nested, decoded, Error.VMLAUNCH_WITH_NON_CLEAR_VMCS)
    if not launch and not vmcs.launched:
        return fail(vcpu, nested, decoded, Error.VMRESUME_WITH_NON_LAUNCHED_VMCS)
    # OPERATION
    entered = entry.enter(vcpu, nested, vmcs, launch=launch)
    if isinstance(entered, Error):
        return fail(vcpu, nested, decoded, entered)
    # SUCCESS
    return entered


def vmlaunch(vcpu: Vcpu, nested: NestedVmx, decoded: decode.Instruction) -> Verdict:
    """VMLAUNCH--Launch Virtual Machine."""
    return _enter(vcpu, nested, decoded, launch=True)


def vmresume(vcpu: Vcpu, nested: NestedVmx, decoded: decode.Instruction) -> Verdict:
    """VMRESUME--Resume Virtual Machine."""
    return _enter(vcpu, nested, decoded, launch=False)


def vmcall(vcpu: Vcpu, nested: NestedVmx, decoded: decode.Instruction) -> Verdict:
    """VMCALL--Call to VM Monitor, in VMX root operation: there is no SMM monitor to call."""
    # FAULTS
    _check_faults(vcpu, nested)
    # CHECKS
    return fail(vcpu, nested, decoded, Error.VMCALL_IN_VMX_ROOT_OPERATION)


def vmfunc(vcpu: Vcpu, nested: NestedVmx, decoded: decode.Instruction) -> Verdict:
    """VMFUNC--Invoke VM Function: undefined outside VMX non-root operation."""
    return Inject(UD)


# -- invalidation -------------------------------------------------------------------------------

INVEPT_SINGLE_CONTEXT, INVEPT_ALL_CONTEXT = 1, 2
INVVPID_ADDRESS, INVVPID_SINGLE, INVVPID_ALL, INVVPID_RETAINING_GLOBALS = 0, 1, 2, 3


def _invalidation(vcpu: Vcpu, nested: NestedVmx, decoded: decode.Instruction) -> tuple[int, int]:
    """The type and the descriptor of INVEPT or INVVPID."""
    _check_faults(vcpu, nested)
    kind = decode.read_register(vcpu, decoded.op0_register)
    return kind, memory_operand(vcpu, decoded, 1, 16)


def invept(vcpu: Vcpu, nested: NestedVmx, decoded: decode.Instruction) -> Verdict:
    """INVEPT--Invalidate Translations Derived from EPT."""
    # FAULTS
    ept = nested.capabilities.ept_vpid
    if not ept.invept:
        return Inject(UD)
    kind, descriptor = _invalidation(vcpu, nested, decoded)
    # CHECKS
    supported = {
        INVEPT_SINGLE_CONTEXT: ept.invept_single_context,
        INVEPT_ALL_CONTEXT: ept.invept_all_context,
    }
    eptp = descriptor & _MASK64
    bad = kind == INVEPT_SINGLE_CONTEXT and not entry.is_eptp_valid(nested, eptp)
    if not supported.get(kind) or bad:
        return fail(vcpu, nested, decoded, Error.INVALID_OPERAND_TO_INVEPT_OR_INVVPID)
    # OPERATION
    paging.invalidate(nested, eptp if kind == INVEPT_SINGLE_CONTEXT else None)
    # SUCCESS
    return succeed(vcpu, decoded)


def invvpid(vcpu: Vcpu, nested: NestedVmx, decoded: decode.Instruction) -> Verdict:
    """INVVPID--Invalidate Translations Based on VPID."""
    # FAULTS
    ept = nested.capabilities.ept_vpid
    if not ept.invvpid:
        return Inject(UD)
    kind, descriptor = _invalidation(vcpu, nested, decoded)
    # CHECKS
    supported = {
        INVVPID_ADDRESS: ept.invvpid_individual_address,
        INVVPID_SINGLE: ept.invvpid_single_context,
        INVVPID_ALL: ept.invvpid_all_context,
        INVVPID_RETAINING_GLOBALS: ept.invvpid_retaining_globals,
    }
    vpid, reserved, address = (
        descriptor & 0xFFFF,
        descriptor >> 16 & (1 << 48) - 1,
        descriptor >> 64,
    )
    bad = (
        reserved
        or (kind != INVVPID_ALL and not vpid)
        or (kind == INVVPID_ADDRESS and not is_canonical(address))
    )
    if not supported.get(kind) or bad:
        return fail(vcpu, nested, decoded, Error.INVALID_OPERAND_TO_INVEPT_OR_INVVPID)
    # OPERATION: every entry drops the silicon's translations, so none is left
    # SUCCESS
    return succeed(vcpu, decoded)


INSTRUCTIONS: Final[dict[int, Instruction]] = {
    Code.VMXON_M64: vmxon,
    Code.VMXOFF: vmxoff,
    Code.VMCLEAR_M64: vmclear,
    Code.VMPTRLD_M64: vmptrld,
    Code.VMPTRST_M64: vmptrst,
    Code.VMREAD_RM64_R64: vmread,
    Code.VMREAD_RM32_R32: vmread,
    Code.VMWRITE_R64_RM64: vmwrite,
    Code.VMWRITE_R32_RM32: vmwrite,
    Code.VMLAUNCH: vmlaunch,
    Code.VMRESUME: vmresume,
    Code.VMCALL: vmcall,
    Code.VMFUNC: vmfunc,
    Code.INVEPT_R64_M128: invept,
    Code.INVEPT_R32_M128: invept,
    Code.INVVPID_R64_M128: invvpid,
    Code.INVVPID_R32_M128: invvpid,
}
