"""An L1 that goes on with VMRESUME and writes next to nothing in between, as hypervisors do."""

from __future__ import annotations

from undervisor.arch.vmx.controls import PrimaryControls
from undervisor.arch.vmx.errors import VmInstructionError as Error
from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.msr import Msr
from undervisor.arch.x86.registers import Efer
from undervisor.conformance.expect import equal
from undervisor.conformance.suite import guest_test
from undervisor.conformance.vmx.lab import Changes, VmxLab
from undervisor.conformance.vmx.needs import control
from undervisor.guest.probe.answers import Returned
from undervisor.guest.probe.client import Batch


def _loop(
    lab: VmxLab, code: str, changes: Changes, between: str = "", behind: str = ""
) -> Returned:
    """L2 runs `code` to its end; L1 steps over each CPUID exit, with `between` before it resumes.

    `behind` may change L2's RIP in R9.

    R12 are the exits of CPUID, R13 is the error of an entry that failed, 0 without one, R14 the
    last exit's reason; the other registers are as L2 left them, R8 and R9 excepted.
    """
    loop = f"""
        mov ${int(F.HOST_RSP):#x}, %r8d; vmwrite %rsp, %r8
        lea 1f(%rip), %r9; mov ${int(F.HOST_RIP):#x}, %r8d; vmwrite %r9, %r8
        xor %r12d, %r12d; vmlaunch; jmp 3f
    1:  mov ${int(F.EXIT_REASON):#x}, %r8d; vmread %r8, %r14
        cmp ${int(ExitReason.CPUID)}, %r14; jne 4f
        inc %r12d; {between}
        mov ${int(F.GUEST_RIP):#x}, %r8d; vmread %r8, %r9; add $2, %r9
        {behind}; vmwrite %r9, %r8; vmresume
    3:  mov ${int(F.VM_INSTRUCTION_ERROR):#x}, %r8d; vmread %r8, %r13; jmp 5f
    4:  xor %r13d, %r13d
    5:
    """
    lab.code(code)
    batch = Batch()
    writes = lab.plan_launch(batch, changes)
    ran = batch.call(lab.assemble(loop), {})
    lab.execute(batch)
    writes.check()
    found: Returned = ran.value
    return found


@guest_test("SDM: VMLAUNCH/VMRESUME—Launch/Resume Virtual Machine", "SDM: VM Exits")
def l2_is_resumed_as_often_as_it_exits(lab: VmxLab) -> None:
    """With only RIP written, each VMRESUME goes on behind the exit, and L2 keeps its state.

    General registers pass through; CR2 and DR6 are not switched, RFLAGS and RSP are L2's own.
    """
    code = """
        mov $20, %ecx; mov $0x7000, %edx; mov %rdx, %cr2
        1: push %rcx; stc; cpuid; setc %bl; add %rbx, %rsi; pop %rcx; loop 1b
        mov %cr2, %rdi; mov %db6, %rbp
    """
    between = (
        "inc %r15; mov %cr2, %r9; inc %r9; mov %r9, %cr2; mov $0xffff0ff1, %r9d; mov %r9, %db6"
    )
    found = _loop(lab, f"xor %ebx, %ebx; {code}", {}, between)
    equal("exits of CPUID, errors, the last exit",
          [found[name] for name in ("r12", "r13", "r14")], [20, 0, ExitReason.VMCALL])  # fmt: skip
    equal("how often L2 had its carry flag", found["rsi"] & 0xFF, 20)
    equal("what L1 counted in R15", found["r15"], 20)
    equal("CR2 and bit 0 of DR6 as L2 finds them", (found["rdi"], found["rbp"] & 1), (0x7014, 1))


@guest_test("SDM: Loading Guest Control Registers, Debug Registers, and MSRs",
            "SDM: Loading Host Control Registers, Debug Registers, MSRs")  # fmt: skip
def an_efer_that_nothing_loads_is_l1s_of_the_moment(lab: VmxLab) -> None:
    """Without the load controls, a bit of EFER that L1 sets between two entries is there for L2."""
    lab.fill(lab.places.msr, 0x1000)
    changes = lab.primary(lab.on_entry(None, load_efer=0), use_msr_bitmaps=1)
    changes = lab.on_exit(changes, load_efer=0)
    read = f"mov ${int(Msr.EFER):#x}, %ecx; rdmsr; mov %eax, "
    code = f"{read} %esi; cpuid; {read} %edi; cpuid; {read} %ebp"
    flip = f"mov ${int(Msr.EFER):#x}, %ecx; rdmsr; xor ${int(Efer.sce)}, %eax; wrmsr"
    found = _loop(lab, code, changes, flip)
    sce = [found[name] & Efer.sce for name in ("rsi", "rdi", "rbp")]
    equal("errors and exits of CPUID", (found["r13"], found["r12"]), (0, 2))
    equal("EFER.SCE in L2", sce, [sce[0], sce[0] ^ Efer.sce, sce[0]])


@guest_test("SDM: Checks on Guest RIP, RFLAGS, and SSP")
def a_rip_that_l2s_new_mode_does_not_have_is_refused(lab: VmxLab) -> None:
    """Behind a far return into compatibility mode, RIP with bit 32 fails the entry, reason 33."""
    code = "push $CS32; push $7f; lretq; 7: .code32; cpuid; vmcall; .code64"
    found = _loop(lab, code, {})
    equal("the last reason without it", found["r14"], ExitReason.VMCALL)
    found = _loop(lab, code, {}, behind="btsq $32, %r9")
    invalid = 1 << 31 | ExitReason.ENTRY_FAILURE_INVALID_GUEST_STATE
    equal("exits of CPUID, and the last reason", (found["r12"], found["r14"]), (1, invalid))


@guest_test("SDM: VM-Execution Control Fields",
            needs=[control(PrimaryControls, "use_tpr_shadow")])  # fmt: skip
def a_virtual_tpr_that_l1_lowers_is_checked_at_the_next_entry(lab: VmxLab) -> None:
    """An entry fails with error 7 where VTPR is below the threshold, whoever wrote it when."""
    page = lab.places.apic_page
    lab.fill(page, 0x1000)
    lab.write_u32(page + 0x80, 0x90)
    changes = lab.primary(use_tpr_shadow=1, cr8_load_exiting=0, cr8_store_exiting=0)
    changes |= {F.VIRTUAL_APIC_ADDRESS: page, F.TPR_THRESHOLD: 5}
    lower = f"subl $0x20, {page + 0x80:#x}"
    found = _loop(lab, "cpuid; cpuid; cpuid; cpuid", changes, lower)
    equal("entries that succeeded, and the error of the last", (found["r12"], found["r13"]),
          (3, Error.ENTRY_WITH_INVALID_CONTROL_FIELDS))  # fmt: skip
