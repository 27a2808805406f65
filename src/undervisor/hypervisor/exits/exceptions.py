"""#UD, on which L0 emulates what the silicon lacks, and the shutdown that a triple fault is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from iced_x86 import Code

from undervisor.arch.x86.events import UD
from undervisor.hypervisor import decode, describe
from undervisor.hypervisor.emulated import xsaves
from undervisor.hypervisor.emulated.small import invpcid, random, rdpid
from undervisor.hypervisor.exit import Exit
from undervisor.hypervisor.exits import system
from undervisor.hypervisor.verdict import Ending, Inject, Outcome, Stop, Verdict

if TYPE_CHECKING:
    from undervisor.hypervisor.vcpu import Vcpu

Emulation = Callable[["Vcpu", decode.Instruction], Verdict]

# Instructions that the silicon lacks: the feature that gives them, and what they do.
EMULATED: Final[dict[int, tuple[str, Emulation]]] = {
    Code.INVPCID_R64_M128: ("invpcid", invpcid),
    Code.INVPCID_R32_M128: ("invpcid", invpcid),
    Code.RDPID_R64: ("rdpid", rdpid),
    Code.RDPID_R32: ("rdpid", rdpid),
    Code.XSAVES_MEM: ("xsaves", xsaves.save),
    Code.XSAVES64_MEM: ("xsaves", xsaves.save),
    Code.XRSTORS_MEM: ("xsaves", xsaves.restore),
    Code.XRSTORS64_MEM: ("xsaves", xsaves.restore),
    Code.RDRAND_R16: ("rdrand", random),
    Code.RDRAND_R32: ("rdrand", random),
    Code.RDRAND_R64: ("rdrand", random),
    Code.RDSEED_R16: ("rdseed", random),
    Code.RDSEED_R32: ("rdseed", random),
    Code.RDSEED_R64: ("rdseed", random),
}


def undefined(vcpu: Vcpu, exit: Exit) -> Verdict:
    """#UD: emulate an instruction that the model has and the silicon lacks; else deliver it."""
    decoded = decode.instruction(vcpu)
    if decoded.code == Code.INT1:
        return system.icebp(vcpu, exit)
    feature, emulate = EMULATED.get(decoded.code, ("", None))
    if (
        emulate is None
        or not vcpu.has(feature)
        or not vcpu.nested.allows_instruction(vcpu, feature)
    ):
        return Inject(UD)
    return emulate(vcpu, decoded)


def shutdown(vcpu: Vcpu, exit: Exit) -> Verdict:
    """A triple fault of L1, or of an L2 whose L1 did not ask to see it."""
    level = "L2" if vcpu.in_l2 else "L1"
    text = f"triple fault of {level} on vCPU {vcpu.index}\n{describe.registers(vcpu)}"
    return Stop(Outcome(Ending.TRIPLE_FAULT, text))
