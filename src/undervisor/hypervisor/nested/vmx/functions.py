"""What L2 may do by itself when L1 lets it: VM functions, shadow VMCS accesses, instructions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from iced_x86 import Mnemonic, OpKind

from undervisor.arch.vmx.controls import SecondaryControls
from undervisor.arch.vmx.errors import VmInstructionError as Error
from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.events import GP0
from undervisor.arch.x86.registers import Rflags
from undervisor.hypervisor import decode
from undervisor.hypervisor.nested.vmx import entry, exit, instructions, paging
from undervisor.hypervisor.nested.vmx.state import NO_VMCS
from undervisor.hypervisor.verdict import ADVANCE, Inject, Verdict

if TYPE_CHECKING:
    from undervisor.hypervisor.nested.vmx import NestedVmx
    from undervisor.hypervisor.vcpu import Vcpu

UNRESTRICTED_GUEST: Final = SecondaryControls.unrestricted_guest

# Instructions that are undefined in L2 unless a control enables them, by CPUID feature.
ENABLING_CONTROLS: Final[dict[str, int]] = {
    "invpcid": SecondaryControls.enable_invpcid,
    "rdpid": SecondaryControls.enable_rdtscp,
    "xsaves": SecondaryControls.enable_xsaves,
}

_MOST_FUNCTIONS: Final = 64
_EPTP_LIST: Final = 512
_BITMAP_FIELDS: Final = 1 << 15


def vmfunc(vcpu: Vcpu, nested: NestedVmx, decoded: decode.Instruction) -> Verdict | None:
    """VMFUNC; function 0 is EPTP switching, and #UD is a number above 63. SDM 3C "VM Functions"."""
    q, fields = vcpu.state.q, nested.fields
    function = q[0] & 0xFFFF_FFFF
    enabled = nested.secondary & SecondaryControls.enable_vm_functions
    if not enabled or function >= _MOST_FUNCTIONS:
        return None
    allowed = fields[F.VM_FUNCTION_CONTROLS] >> function & 1
    index = q[1] & 0xFFFF_FFFF
    if not allowed or function != 0 or index >= _EPTP_LIST:
        return exit.leave(vcpu, nested, ExitReason.VMFUNC, length=decoded.len)
    eptp = vcpu.memory.u64(fields[F.EPTP_LIST_ADDRESS] + 8 * index)
    if not entry.is_eptp_valid(nested, eptp):
        return exit.leave(vcpu, nested, ExitReason.VMFUNC, length=decoded.len)
    if eptp != fields[F.EPT_POINTER]:
        fields[F.EPT_POINTER] = eptp
        assert nested.vmx.current is not None
        vcpu.processor.save(vcpu.vmcb02)
        paging.activate(vcpu, nested, nested.vmx.current)
        vcpu.load(vcpu.vmcb02)
    return ADVANCE[decoded.len]


def shadow_access(vcpu: Vcpu, nested: NestedVmx, decoded: decode.Instruction) -> Verdict | None:
    """VMREAD or VMWRITE on the shadow VMCS that the link pointer names; None where it exits.

    SDM 3C "VMREAD--Read Field", in VMX non-root operation.
    """
    is_read = decoded.mnemonic == Mnemonic.VMREAD
    register = decoded.op1_register if is_read else decoded.op0_register
    encoding, fields = decode.read_register(vcpu, register), nested.fields
    bitmap = fields[F.VMREAD_BITMAP_ADDRESS if is_read else F.VMWRITE_BITMAP_ADDRESS]
    if encoding >= _BITMAP_FIELDS:
        return None
    if vcpu.memory.read(bitmap + encoding // 8, 1)[0] >> encoding % 8 & 1:
        return None
    if vcpu.state.cpl:
        return Inject(GP0)
    link = fields[F.VMCS_LINK_POINTER]
    if link == NO_VMCS:
        return instructions.fail_invalid(vcpu, decoded)
    return (_read if is_read else _write)(vcpu, nested, decoded, link, encoding)


def _unsupported(
    vcpu: Vcpu, nested: NestedVmx, decoded: decode.Instruction, link: int, error: Error
) -> Verdict:
    """VMfailValid: the error number goes to the shadow VMCS."""
    nested.vmx.store.write_field(link, F.VM_INSTRUCTION_ERROR, int(error))
    vcpu.state.set_status(Rflags.zf)
    return ADVANCE[decoded.len]


def _read(
    vcpu: Vcpu, nested: NestedVmx, decoded: decode.Instruction, link: int, encoding: int
) -> Verdict:
    value = nested.vmx.store.read_field(link, encoding & ~1 if encoding & 1 else encoding)
    if value is None:
        return _unsupported(vcpu, nested, decoded, link, Error.ACCESS_TO_UNSUPPORTED_COMPONENT)
    fault = instructions.store_operand(vcpu, decoded, value >> 32 if encoding & 1 else value)
    return Inject(fault) if fault else instructions.succeed(vcpu, decoded)


def _write(
    vcpu: Vcpu, nested: NestedVmx, decoded: decode.Instruction, link: int, encoding: int
) -> Verdict:
    store, whole = nested.vmx.store, encoding & ~1
    old = store.read_field(link, whole)
    if old is None:
        return _unsupported(vcpu, nested, decoded, link, Error.ACCESS_TO_UNSUPPORTED_COMPONENT)
    if whole in instructions.READ_ONLY and not nested.capabilities.misc.vmwrite_any_field:
        return _unsupported(vcpu, nested, decoded, link, Error.VMWRITE_TO_READ_ONLY_COMPONENT)
    if decoded.op1_kind == OpKind.REGISTER:
        value = decode.read_register(vcpu, decoded.op1_register)
    else:
        value = instructions.memory_operand(vcpu, decoded, 1, decode.memory_size(decoded))
    if encoding & 1:
        value = old & 0xFFFF_FFFF | (value & 0xFFFF_FFFF) << 32
    store.write_field(link, whole, value & instructions.MASKS[whole])
    return instructions.succeed(vcpu, decoded)
