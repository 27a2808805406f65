"""What L0 does about an exit that no nested hypervisor wants: one table of functions.

`EXITS` has a handler for each exit code that the silicon can give with the intercepts that L0
sets; `UNSUPPORTED` names the others and says why they cannot happen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from undervisor.arch.svm.exits import ExitCode
from undervisor.hypervisor.exit import Exit
from undervisor.hypervisor.exits import (
    control_registers,
    cpuid,
    debug_registers,
    exceptions,
    halt,
    io,
    memory,
    msr,
    syscall,
    system,
    task_register,
    timestamp,
    windows,
)
from undervisor.hypervisor.verdict import Verdict
from undervisor.silicon import glue

if TYPE_CHECKING:
    from undervisor.hypervisor.vcpu import Vcpu

Handler = Callable[["Vcpu", Exit], Verdict]

EXITS: Final[dict[int, Handler]] = {
    ExitCode.CR0_WRITE: control_registers.write,
    ExitCode.CR3_WRITE: control_registers.write,
    ExitCode.CR4_WRITE: control_registers.write,
    ExitCode.CR8_WRITE: control_registers.write,
    ExitCode.CR0_READ: control_registers.read,
    ExitCode.CR3_READ: control_registers.read,
    ExitCode.CR4_READ: control_registers.read,
    ExitCode.CR8_READ: control_registers.read,
    **{
        code: debug_registers.access
        for code in ExitCode
        if ExitCode.DR0_READ <= code <= ExitCode.DR15_WRITE
    },
    ExitCode.EXCP_UD: exceptions.undefined,
    ExitCode.CPUID: cpuid.cpuid,
    ExitCode.RDTSC: timestamp.rdtsc,
    ExitCode.RDPMC: timestamp.rdpmc,
    ExitCode.MSR: msr.access,
    ExitCode.IOIO: io.access,
    ExitCode.NPF: memory.nested_page_fault,
    ExitCode.HLT: halt.hlt,
    ExitCode.PAUSE: halt.pause,
    ExitCode.MONITOR: halt.monitor,
    ExitCode.MWAIT: halt.mwait,
    ExitCode.SHUTDOWN: exceptions.shutdown,
    ExitCode.INVLPG: system.invlpg,
    ExitCode.WBINVD: system.nothing,
    ExitCode.INVD: system.nothing,
    ExitCode.XSETBV: system.xsetbv,
    ExitCode.ICEBP: system.icebp,
    ExitCode.TR_WRITE: task_register.ltr,
    ExitCode.VINTR: windows.interrupt_window,
    ExitCode.IRET: windows.iret,
    ExitCode.VMMCALL: system.undefined,
    ExitCode.VMRUN: system.undefined,
    ExitCode.VMLOAD: system.undefined,
    ExitCode.VMSAVE: system.undefined,
    ExitCode.STGI: system.undefined,
    ExitCode.CLGI: system.undefined,
    ExitCode.SKINIT: system.undefined,
    ExitCode.INVLPGA: system.undefined,
    ExitCode.RSM: system.undefined,
    glue.EXIT_SYSCALL: syscall.syscall,
    glue.EXIT_SYSENTER: syscall.sysenter,
    glue.EXIT_BUDGET: windows.end_of_slice,
}

_NOT_ASKED = "L0 does not set this intercept for itself; a nested hypervisor's is reflected"
_NO_SILICON = "the silicon has no such intercept or event"

UNSUPPORTED: Final[dict[int, str]] = {
    code: (
        _NOT_ASKED
        if code < ExitCode.RDPRU and code not in (ExitCode.TASK_SWITCH, ExitCode.FERR_FREEZE)
        else _NO_SILICON
    )
    for code in ExitCode
    if code not in EXITS
}
