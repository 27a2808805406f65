"""VMREAD and VMWRITE between 64-bit registers, by far the most frequent VMX instructions.

An L1 executes them at a few places again and again; what their bytes say is worked out once.
Whatever is not usual about one (another mode, a missing field, guest state that is still in
vmcb02) goes the way of every other instruction, which reads like the manual.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from iced_x86 import Code, OpKind

from undervisor.hypervisor import decode
from undervisor.hypervisor.nested.vmx.state import LAZY
from undervisor.hypervisor.verdict import ADVANCE, Verdict
from undervisor.silicon.layout import Env, Hflags

if TYPE_CHECKING:
    from undervisor.hypervisor.nested.vmx import NestedVmx
    from undervisor.hypervisor.vcpu import Vcpu

Usual = Callable[["Vcpu", "NestedVmx"], "Verdict | None"]

# The mode in which no check of mode or privilege fails: 64-bit code at CPL 0.
MODE_MASK: Final = 1 << Hflags.CS64 | 1 << Hflags.PE | 3
MODE: Final = 1 << Hflags.CS64 | 1 << Hflags.PE
HFLAGS: Final = Env.HFLAGS >> 2
_CC_SRC, _CC_DST, _CC_OP = Env.CC_SRC >> 3, Env.CC_DST >> 3, Env.CC_OP >> 2
_CC_OP_EFLAGS: Final = 1


def prepare(decoded: decode.Instruction, masks: dict[int, int]) -> Usual | None:
    """The quick form of an instruction; None where it has none.

    The quick form returns None where this execution is not a usual one.
    """
    if decoded.code == Code.VMREAD_RM64_R64 and decoded.op0_kind == OpKind.REGISTER:
        return _read(
            decode.register_index(decoded.op0_register),
            decode.register_index(decoded.op1_register),
            decoded.len,
        )
    if decoded.code == Code.VMWRITE_R64_RM64 and decoded.op1_kind == OpKind.REGISTER:
        return _write(
            decode.register_index(decoded.op0_register),
            decode.register_index(decoded.op1_register),
            decoded.len,
            masks,
        )
    return None


def _read(target: int, name: int, length: int) -> Usual:
    done = ADVANCE[length]

    def run(vcpu: Vcpu, nested: NestedVmx) -> Verdict | None:
        vmcs, state = nested.vmx.current, vcpu.state
        if vmcs is None:
            return None
        q = state.q
        encoding = q[name]
        if encoding not in vmcs.known or (vmcs.stale and encoding in LAZY):
            return None
        q[target] = vmcs.fields[encoding]
        q[_CC_SRC] = q[_CC_DST] = 0
        state.d[_CC_OP] = _CC_OP_EFLAGS
        return done

    return run


def _write(name: int, source: int, length: int, masks: dict[int, int]) -> Usual:
    done = ADVANCE[length]

    def run(vcpu: Vcpu, nested: NestedVmx) -> Verdict | None:
        vmcs, state = nested.vmx.current, vcpu.state
        if vmcs is None:
            return None
        q = state.q
        encoding = q[name]
        if encoding not in nested.writable or (vmcs.stale and encoding in LAZY):
            return None
        vmcs.fields[encoding] = q[source] & masks[encoding]
        vmcs.written.add(encoding)
        q[_CC_SRC] = q[_CC_DST] = 0
        state.d[_CC_OP] = _CC_OP_EFLAGS
        return done

    return run
