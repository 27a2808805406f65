"""Several processors: how they start, what INIT does to L2, and L2s that run at once."""

from __future__ import annotations

import struct
from typing import Final

from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.svm.vmcb import SIZE
from undervisor.arch.svm.vmcb import VmcbField as F
from undervisor.arch.x86.events import Vector
from undervisor.arch.x86.msr import Msr, VmCr
from undervisor.conformance.expect import Broken, each, equal
from undervisor.conformance.lab import Lab, together
from undervisor.conformance.suite import guest_test
from undervisor.conformance.svm.lab import SvmLab
from undervisor.conformance.svm.run import BRIEF, Run
from undervisor.guest.probe.answers import Answer, L2Run
from undervisor.guest.probe.client import Batch

INIT, STARTUP = 0x4500, 0x4600
"""Interrupt commands: INIT (assert) and STARTUP, whose low byte is the vector."""
NOTHING_YET: Final = 0x7777
TURNS: Final = 4
LONG, SHORT = 20000, 5000
"""Rounds to wait at most for what must happen, and for what must not."""
PAGES: Final = (0x0B, 0x10, 0x2C, 0x55, 0x7F)
"""Startup vectors whose pages of low memory nothing else uses."""


def _count(case: object) -> int:
    assert isinstance(case, int)
    return case


@guest_test(
    "APM: Multiprocessor Initialization",
    "APM: VMRUN Instruction",
    cpus=_count,
    cases={f"{n} processors": n for n in (1, 2, 3, 4, 8)},
)
def every_processor_runs_its_own_l2(lab: SvmLab, total: int) -> None:
    """All processors start by INIT-SIPI-SIPI, and each runs an L2 of its own, all at once."""
    lab.start_others(total)
    labs = [lab] + [SvmLab(lab.probe, number) for number in range(1, total)]
    batches: dict[Lab, Batch] = {}
    runs: dict[int, list[Run]] = {}
    for number, one in enumerate(labs):
        if number:
            one.on()
        one.fill(one.places.data, 16)
        one.code("mov $20, %esi; 1: xor %eax, %eax; cpuid; incl DATA; dec %esi; jnz 1b; inc %rdi")
        batch = batches[one] = Batch()
        runs[number] = []
        batch.write(one.places.control2, bytes(one.area()))
        for turn in range(TURNS):
            batch.copy(one.places.control, one.places.control2, SIZE)
            given = {"rdi": 100 * number + turn}
            runs[number].append(one.plan_entry(batch, given, ranges=BRIEF))
    together(batches)
    got = {
        number: [(run.code, run.registers["rdi"]) for run in mine] for number, mine in runs.items()
    }
    each("exit and RDI of each processor's L2s", got, lambda number: [
        (ExitCode.VMMCALL, 100 * number + turn + 1) for turn in range(TURNS)])  # fmt: skip
    data = {number: one.read_u32(one.places.data) for number, one in enumerate(labs)}
    each("what each processor's L2 counted", data, 20 * TURNS)


@guest_test("APM: Multiprocessor Initialization", "APM: Initial Processor State", cpus=2)
def a_processor_starts_exactly_where_startup_says(lab: SvmLab) -> None:
    """After INIT a STARTUP with vector VV begins at VV000H in real mode, CS:IP = VV00:0000."""
    lab.start_others(2)
    _trampolines(lab)
    got = {}
    for page in PAGES:
        lab.write(page << 12 | 0x100, bytes(8))
        with lab.batch() as batch:
            batch.send_ipi(1, INIT)
            batch.call(lab.assemble(_wait(1000)), {}, [])
            batch.send_ipi(1, STARTUP | page)
            batch.call(lab.assemble(_until(f"{page << 12 | 0x106:#x}", "$0xbeef")), {}, [])
        values = struct.unpack("<4H", lab.read(page << 12 | 0x100, 8))
        got[page] = values
    each("CS, IP, CR0.PE, mark", got, lambda page: (page << 8, 0, 0, 0xBEEF))


@guest_test("APM: Multiprocessor Initialization", cpus=2)
def a_running_processor_ignores_startup(lab: SvmLab) -> None:
    """STARTUP to a processor that does not wait for it has no effect."""
    lab.start_others(2)
    _trampolines(lab)
    other = SvmLab(lab.probe, 1)
    with lab.batch() as batch:
        batch.send_ipi(1, STARTUP | PAGES[0])
        batch.call(lab.assemble(_wait(1000)), {}, [])
    equal("the mark of the trampoline", lab.read(PAGES[0] << 12 | 0x106, 2), bytes(2))
    other.on()
    other.run("nop").ends()


def _trampolines(lab: SvmLab) -> None:
    """Real-mode code in each page that writes down where it is, sets a mark and halts."""
    code = lab.assemble("""
        .code16
        call 1f
    1:  pop %bx
        sub $3, %bx
        mov %cs, %ax
        mov %ax, %ds
        mov %ax, 0x100
        mov %bx, 0x102
        smsw %ax
        and $1, %ax
        mov %ax, 0x104
        movw $0xbeef, 0x106
    2:  cli
        hlt
        jmp 2b
    """)
    # The stack of a fresh processor: SS:SP = 0000:0000, so that CALL writes at FFFEH.
    for page in PAGES:
        lab.write(page << 12, code)
        lab.write(page << 12 | 0x100, bytes(8))


def _wait(rounds: int) -> str:
    return f"mov ${rounds}, %ecx; 1: pause; in $0x80, %al; loop 1b"


def _until(address: str, value: str) -> str:
    """Wait until the word at an address has a value, for a while."""
    return (
        f"mov ${LONG}, %ecx; 1: cmpw {value}, {address}; je 2f; pause; in $0x80, %al; loop 1b; 2:"
    )


# -- INIT --------------------------------------------------------------------------------------


def init_while_l2_runs(
    lab: SvmLab, wants: list[Intercept], vm_cr: int
) -> tuple[Run, Answer[L2Run]]:
    """Processor 1 runs a busy L2 with VM_CR; processor 0 sends it INIT.

    The VMCB when something has become of it, and the answer of processor 1, that may never come.
    """
    lab.start_others(2)
    other = SvmLab(lab.probe, 1)
    other.on()
    other.write_u64(other.places.data, 0)
    other.code("movl $1, DATA; 1: pause; jmp 1b")
    other.l1.wrmsr(Msr.VM_CR, vm_cr)
    area = other.area({F.EXITCODE: NOTHING_YET}, wants)
    running, first = Batch(), Batch()
    other.plan_launch(running, bytes(area))
    other.flush()
    entry = running.svm_run(other.places.control)
    first.post(1, running)
    first.call(lab.assemble(_until(f"{other.places.data:#x}", "$1")), {}, [])
    first.send_ipi(1, INIT)
    exitcode = f"{other.places.control + F.EXITCODE:#x}"
    rounds = LONG if wants or vm_cr else SHORT
    wait = f"mov ${rounds}, %ecx; 1: cmpq ${NOTHING_YET}, {exitcode}; jne 2f"
    wait += "; pause; in $0x80, %al; loop 1b; 2:"
    first.call(lab.assemble(wait), {}, [])
    run = other.plan_reading(first)
    collected = first.collect(1, running, 1000)
    lab.execute(first)
    _ = collected.outcome
    return run, entry


@guest_test("APM: INIT Intercept", "APM: INIT Support", cpus=2)
def init_exits_by_its_intercept(lab: SvmLab) -> None:
    """An INIT while L2 runs exits with INIT where L1 intercepts it."""
    run, _ = init_while_l2_runs(lab, [Intercept.INIT], 0)
    run.exits_with(ExitCode.INIT)


@guest_test("APM: INIT Support", "APM: INIT Intercept", cpus=2)
def an_init_that_nobody_wants_takes_the_processor(lab: SvmLab) -> None:
    """An INIT that is not intercepted ends L2: the processor waits for STARTUP and starts anew."""
    run, _ = init_while_l2_runs(lab, [], 0)
    equal("EXITCODE, which nothing writes", run[F.EXITCODE], NOTHING_YET)
    running = lab.probe.start_aps([1])
    equal("processors that have ever started", running, 3)
    fresh = SvmLab(lab.probe, 2)
    fresh.on()
    fresh.run("nop").ends()


@guest_test("APM: VM_CR MSR (C001_0114h)", "APM: Security Exception (#SX)", cpus=2)
def a_redirected_init_exits_as_sx(lab: SvmLab) -> None:
    """With VM_CR.R_INIT an INIT in L2 is #SX, which exits with code 5EH and error code 1."""
    run, entry = init_while_l2_runs(lab, [Intercept.EXCP_SX], int(VmCr.r_init))
    run.exits_with(ExitCode.EXCP_SX, 1)
    equal("the exception of processor 1's own", entry.fault, None)


@guest_test("APM: VM_CR MSR (C001_0114h)", "APM: Security Exception (#SX)", cpus=2)
def a_redirected_init_that_is_not_intercepted_is_l2s(lab: SvmLab) -> None:
    """With VM_CR.R_INIT and no intercept of #SX, L2's handler of vector 30 gets error code 1."""
    run, _ = init_while_l2_runs(lab, [], int(VmCr.r_init))
    run.delivers(Vector.SX)
    equal("the error code on the stack", lab.read_u64(run[F.RSP]), 1)


@guest_test("APM: INIT Support", "APM: INIT Intercept", cpus=2)
def the_init_intercept_comes_before_the_redirection(lab: SvmLab) -> None:
    """With the INIT intercept and R_INIT the exit is INIT; at STGI the INIT is #SX of L1."""
    wants = [Intercept.INIT, Intercept.EXCP_SX]
    run, entry = init_while_l2_runs(lab, wants, int(VmCr.r_init))
    run.exits_with(ExitCode.INIT)
    fault = entry.fault
    if fault is None:
        raise Broken("processor 1: the INIT that stayed pending must be #SX when L1 sets GIF")
    equal("processor 1's exception", (fault.vector, fault.error_code), (Vector.SX, 1))


@guest_test("APM: VM_CR MSR (C001_0114h)", "APM: Security Exception (#SX)", cpus=2)
def a_redirected_init_is_an_exception_of_l1(lab: SvmLab) -> None:
    """With VM_CR.R_INIT an INIT to a processor in L1 is #SX with error code 1, and no reset."""
    got = _init_to_l1(lab, "sti; 1: pause; jmp 1b", int(VmCr.r_init))
    equal("the exception of processor 1", got, (Vector.SX, 1))


@guest_test("APM: Global Interrupt Flag", "APM: INIT Support", cpus=2)
def an_init_waits_for_gif(lab: SvmLab) -> None:
    """While GIF is 0 an INIT is held; behind STGI it comes, here redirected to #SX."""
    held = "clgi; movl $1, DATA2; mov $20000, %ecx; 1: pause; loop 1b; movl $2, DATA2; stgi; nop"
    got = _init_to_l1(lab, held.replace("DATA2", "8 + DATA") + "; hlt", int(VmCr.r_init))
    equal("the exception of processor 1", got, (Vector.SX, 1))
    other = SvmLab(lab.probe, 1)
    equal("how far processor 1 came before it", lab.read_u32(other.places.data + 8), 2)


def _init_to_l1(lab: SvmLab, code: str, vm_cr: int) -> tuple[int, int] | None:
    """Processor 1 runs `code`; processor 0 sends it INIT: its exception and the error code."""
    lab.start_others(2)
    other = SvmLab(lab.probe, 1)
    other.on()
    other.write_u64(other.places.data, 0, 0)
    other.l1.wrmsr(Msr.VM_CR, vm_cr)
    running, first = Batch(), Batch()
    begin = other.assemble(f"movl $1, DATA; {code}")
    if "clgi" in code:
        begin = other.assemble(f"clgi; movl $1, DATA; {code}")
    answer = running.call(begin, {}, [])
    first.post(1, running)
    first.call(lab.assemble(_until(f"{other.places.data:#x}", "$1")), {}, [])
    first.send_ipi(1, INIT)
    first.collect(1, running, 1 << 20)
    lab.execute(first)
    fault = answer.fault
    return (fault.vector, fault.error_code) if fault else None
