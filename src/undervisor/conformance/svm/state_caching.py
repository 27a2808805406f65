"""What a processor may keep of a VMCB between two VMRUNs, and within one."""

from __future__ import annotations

from typing import Final

from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.svm.vmcb import CleanBits, VirtualInterrupt
from undervisor.arch.svm.vmcb import VmcbField as F
from undervisor.arch.x86.registers import Cr4, Efer
from undervisor.conformance.expect import each, equal
from undervisor.conformance.lab import together
from undervisor.conformance.suite import guest_test
from undervisor.conformance.svm.lab import Changes, SvmLab
from undervisor.conformance.svm.needs import NPT
from undervisor.conformance.svm.run import Run
from undervisor.guest.probe.client import Batch


@guest_test("APM: VMCB Clean Bits")
def an_exit_does_not_change_the_clean_bits(lab: SvmLab) -> None:
    """The clean bits are L1's: VMRUN and #VMEXIT never write them, LBR's among them."""
    lab.code("nop")
    lab.run().ends()
    got = {}
    for bits in (0, int(CleanBits.lbr), int(CleanBits.DECLARED) & 0xFFF):
        run = lab.resume({F.CLEAN_BITS: bits, F.RIP: lab.places.code})
        run.ends()
        got[bits] = run[F.CLEAN_BITS]
    each("the clean bits after the exit", got, lambda bits: bits)


# -- clean bits --------------------------------------------------------------------------------


def _again(lab: SvmLab, begin: Changes, changes: Changes, bit: int) -> Run:
    """Run, then run again with `changes`, where only the clean bit `bit` is clear."""
    lab.run(None, begin, wants=[Intercept.IOIO_PROT]).ends()
    clean = int(CleanBits.DECLARED) & 0xFFF & ~bit
    again = {F.RIP: lab.places.code, F.RSP: lab.vmcb.rsp, F.CLEAN_BITS: clean}
    return lab.resume(again | dict(changes))


@guest_test("APM: VMCB Clean Bits", needs=[NPT])
def a_change_with_a_clear_clean_bit_is_seen(lab: SvmLab) -> None:
    """L1 clears a field's clean bit when it changes it: VMRUN must then read it anew."""
    places, begin = lab.places, lab.npt(12)
    moved = lab.npt(12, root=places.nested2)
    lab.write_u64(lab.nested_entry(places.data, root=places.nested2), places.free | 7)
    lab.write_u64(places.data, 0x1111)
    lab.write_u64(places.free, 0x2222)
    masked = int(VirtualInterrupt.v_intr_masking)
    begin |= {F.V_INTR_CONTROL: masked}
    lab.code(
        "mov DATA, %rbx; mov %cr4, %rcx; mov %dr7, %rdx; mov %cr2, %rsi; mov %es, %edi;"
        "mov %cr8, %r8; sidt STACK - 64; mov STACK - 62, %r9; in $0x80, %al"
    )
    cr4 = lab.vmcb.cr4 ^ Cr4.de
    cases: dict[str, tuple[int, Changes, str, int]] = {
        "np": (CleanBits.np, moved, "rbx", 0x2222),
        "crx": (CleanBits.crx, {F.CR4: cr4}, "rcx", cr4),
        "drx": (CleanBits.drx, {F.DR7: 0x455}, "rdx", 0x455),
        "cr2": (CleanBits.cr2, {F.CR2: 0x777000}, "rsi", 0x777000),
        "seg": (CleanBits.seg, {F.ES_SELECTOR: 0x28}, "rdi", 0x28),
        "tpr": (CleanBits.tpr, {F.V_INTR_CONTROL: masked | 7}, "r8", 7),
        "dt": (CleanBits.dt, {F.IDTR_BASE: 0x123000}, "r9", 0x123000),
    }
    got = {}
    for name, (bit, changes, register, _) in cases.items():
        run = _again(lab, begin, changes, bit)
        run.ends()
        got[name] = run.registers[register]
    each("what L2 sees after the change", got, lambda name: cases[name][3])


@guest_test("APM: VMCB Clean Bits")
def changed_intercepts_with_a_clear_clean_bit_are_seen(lab: SvmLab) -> None:
    """New intercept words, and another I/O permission map, hold when their clean bits are 0."""
    lab.set_bit(lab.places.free, 0x80)
    lab.code("in $0x80, %al; rdtsc")
    intercept = Intercept.RDTSC
    both = lab.vmcb[intercept.field] | intercept.mask | Intercept.IOIO_PROT.mask
    run = _again(lab, {}, {intercept.field: both}, int(CleanBits.intercepts))
    run.exits_with(ExitCode.RDTSC)
    run = _again(lab, {}, {F.IOPM_BASE_PA: lab.places.free}, int(CleanBits.iopm))
    run.exits_with(ExitCode.IOIO)


# -- the VMCB under a second processor's hands --------------------------------------------------

ROUNDS: Final = 300


@guest_test("APM: VMRUN Instruction", "APM: VMCB", cpus=2)
def a_checked_vmcb_is_the_one_that_is_used(lab: SvmLab) -> None:
    """What VMRUN checked is what the guest gets, even while another processor writes the VMCB.

    L1's second processor sets and clears EFER.SVME and CR0 bit 32 of the VMCB all the time: each
    VMRUN is either illegal, or L2 runs with legal registers.
    """
    places = lab.places
    lab.start_others(2)
    other = SvmLab(lab.probe, 1)
    lab.code("""
        mov $0xc0000080, %ecx; rdmsr; shr $12, %eax; and $1, %eax; xor $1, %eax; add %rax, %r13
        mov %cr0, %rax; shr $32, %rax; add %rax, %r13
    """)
    runs = f"""
    0:  pause; cmpq $0, DATA; je 0b
    1:  mov $2000, %ecx
    4:  dec %ecx; jnz 4b
        movq ${places.code:#x}, CONTROL + {int(F.RIP)}
        mov $CONTROL, %eax; vmrun %rax; stgi
        cmpl $-1, CONTROL + {int(F.EXITCODE)}; je 2f
        inc %r14
        cmpl ${int(ExitCode.VMMCALL)}, CONTROL + {int(F.EXITCODE)}; je 3f
        inc %r15; jmp 3f
    2:  inc %r12
    3:  dec %rbp; jnz 1b
        movq $1, DATA + 8
    """
    legal, illegal = lab.vmcb.efer, lab.vmcb.efer & ~Efer.svme
    # Each state lasts as long as the others, wherever a scheduler interrupts.
    flips = f"""
    1:  movq ${illegal:#x}, {places.control + F.EFER:#x}; jmp 2f
    2:  movq ${legal:#x}, {places.control + F.EFER:#x}
        movb $1, {places.control + F.CR0 + 4:#x}; jmp 3f
    3:  movb $0, {places.control + F.CR0 + 4:#x}
        movq $1, {places.data}; cmpq $0, {places.data + 8}; je 1b
    """
    first, second = Batch(), Batch()
    lab.fill(places.data, 16)
    lab.plan_launch(first, bytes(lab.area()))
    lab.execute(first)
    first = Batch()
    ran = first.call(lab.assemble(runs), {"rbp": ROUNDS}, ["r12", "r13", "r14", "r15"])
    done = second.call(lab.assemble(flips), {}, [])
    together({lab: first, other: second})
    _ = done.value
    counts = ran.value
    equal("VMRUNs, illegal and good ones together", counts["r12"] + counts["r14"], ROUNDS)
    equal("L2s that ran with an illegal register", counts["r13"], 0)
    equal("exits of another kind", counts["r15"], 0)
