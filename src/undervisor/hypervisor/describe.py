"""A processor's state in words: what a person gets to see when a guest dies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from undervisor.arch.x86.registers import Gpr
from undervisor.silicon.layout import Env

if TYPE_CHECKING:
    from undervisor.hypervisor.vcpu import Vcpu

_SEGMENTS = (Env.CS, Env.SS, Env.DS, Env.ES, Env.FS, Env.GS, Env.LDTR, Env.TR)


def registers(vcpu: Vcpu) -> str:
    """The running world's registers, a few to a line."""
    state = vcpu.state
    lines = [f"{'L2' if vcpu.in_l2 else 'L1'} on vCPU {vcpu.index}:"]
    names = [f"{gpr.name.lower():3} {state.q[gpr]:016x}" for gpr in Gpr]
    lines += ["  " + "  ".join(names[i : i + 4]) for i in range(0, 16, 4)]
    lines.append(f"  rip {state.rip:016x}  rflags {state.rflags:08x}  cpl {state.cpl}")
    lines.append(
        f"  cr0 {state.cr0:08x}  cr2 {state.cr2:016x}  cr3 {state.cr3:016x}  "
        f"cr4 {state.cr4:08x}  efer {state.efer:08x}"
    )
    for segment in _SEGMENTS:
        selector, attributes, limit, base = state.segment(segment)
        lines.append(
            f"  {segment.name.lower():4} {selector:04x} base {base:016x} limit {limit:08x} "
            f"attributes {attributes:03x}"
        )
    for table in (Env.GDTR, Env.IDTR):
        _, _, limit, base = state.segment(table)
        lines.append(f"  {table.name.lower():4}      base {base:016x} limit {limit:08x}")
    return "\n".join(lines)
