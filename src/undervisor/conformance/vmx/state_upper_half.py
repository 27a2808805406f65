"""L1 and L2 in the upper half of the address space, where kernels live: no address loses bits."""

from __future__ import annotations

from typing import Final

from undervisor.arch.vmx.controls import InterruptionType as Type
from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.conformance.expect import each, equal
from undervisor.conformance.suite import guest_test
from undervisor.conformance.vmx.lab import Changes, VmxLab

UPPER: Final = 0xFFFFFF8000000000
"""What the last entry of a PML4 maps: here the first 512 GiB once more."""
LAST_ENTRY: Final = 8 * 511
VALID: Final = 1 << 31
IN_L1: Final = {
    "VMREAD": "mov $0x681e, %ecx; vmread %rcx, %rdx", "VMWRITE": "mov $0x681e, %ecx;"
    "vmwrite %rcx, %rcx", "VMREAD to memory": "mov $0x681e, %ecx; vmread %rcx, DATA",
    "VMPTRST": "vmptrst DATA", "VMPTRLD": "vmptrst DATA; vmptrld DATA",
    "VMXON that fails": "vmxon DATA + 8", "VMRESUME that fails": "vmclear DATA + 8; vmresume",
}  # fmt: skip
# The instruction, the exit's reason, its length and its qualification.
EXITS: Final = {
    "CPUID": ("cpuid", ExitReason.CPUID, 2, 0),
    "INVLPG": ("invlpg (%rdi)", ExitReason.INVLPG, 3, UPPER + 0x1234),
    "VMCALL": ("vmcall", ExitReason.VMCALL, 3, 0),
    "VMPTRLD": ("vmptrld 0x40(%rdi)", ExitReason.VMPTRLD, 4, 0x40),
}


def _upstairs(lab: VmxLab) -> Changes:
    """L2 with its first 512 GiB mapped at `UPPER` too, and its code and stack there."""
    places = lab.places
    root = lab.pages()
    lab.write_u64(root + LAST_ENTRY, places.pdpt | 7)
    stack = UPPER + places.stack - 8
    return {F.GUEST_CR3: root, F.GUEST_RIP: UPPER + places.code, F.GUEST_RSP: stack}


def _l1_upstairs(lab: VmxLab) -> None:
    """L1's own tables map `UPPER` too."""
    root = lab.facts.l1.cr3
    lab.write_u64(root + LAST_ENTRY, lab.read_u64(root))


@guest_test("SDM: VMX Instruction Reference", cases={name: name for name in IN_L1})
def l1_goes_on_in_the_upper_half(lab: VmxLab, name: str) -> None:
    """Behind a VMX instruction in the upper half of the address space RIP is the next one's."""
    _l1_upstairs(lab)
    lab.write_u64(lab.places.data + 8, lab.places.control)
    code = f"""
        lea 2f(%rip), %r10; lea 1f(%rip), %rbx; movabs ${UPPER:#x}, %r11; add %r11, %rbx; jmp *%rbx
        1: {IN_L1[name]}; 3: lea 3b(%rip), %r14; jmp *%r10; 2: lea 3b(%rip), %r15
    """
    found = lab.call(code, {}, ["r14", "r15"]).value
    equal("L1's RIP behind the instruction", found["r14"], UPPER + found["r15"])


@guest_test("SDM: Loading Host RIP, RSP, and RFLAGS")
def an_exit_goes_to_the_upper_half(lab: VmxLab) -> None:
    """A VM exit loads all bits of the host's RIP, RSP, FS and GS bases."""
    _l1_upstairs(lab)
    lab.code("cpuid")
    bases = {F.HOST_FS_BASE: UPPER + 0x123000, F.HOST_GS_BASE: UPPER + 0x456000}
    code = f"""
        mov ${int(F.HOST_RSP):#x}, %r8d; mov %rsp, %r10; movabs ${UPPER:#x}, %r11
        lea (%rsp, %r11), %r9; vmwrite %r9, %r8
        lea 1f(%rip), %r12; lea (%r12, %r11), %r9; mov ${int(F.HOST_RIP):#x}, %r8d
        vmwrite %r9, %r8; vmlaunch; jmp 2f
        1: lea 1b(%rip), %r13; mov %rsp, %r14; mov %r10, %rsp; lea 2f(%rip), %r9; sub %r11, %r9
        jmp *%r9
        2: nop
    """
    with lab.batch() as batch:
        lab.plan_launch(batch, bases)
        ran = batch.call(lab.assemble(code), {}, ["r10", "r12", "r13", "r14"])
        got = {0xC0000100: batch.rdmsr(0xC0000100), 0xC0000101: batch.rdmsr(0xC0000101)}
    value = ran.value
    equal("L1's RIP behind the exit", value["r13"], UPPER + value["r12"])
    equal("L1's RSP behind the exit", value["r14"], UPPER + value["r10"])
    equal("the FS and GS bases", [a.value for a in got.values()], list(bases.values()))


@guest_test("SDM: Saving RIP, RSP, RFLAGS, and SSP", "SDM: Basic VM-Exit Information")
def exits_of_an_l2_in_the_upper_half_name_it(lab: VmxLab) -> None:
    """RIP and qualifications that an exit saves are those of the upper half."""
    begin = lab.primary(invlpg_exiting=1) | _upstairs(lab)
    here = UPPER + lab.places.code
    got, wanted = {}, {}
    for name, (text, reason, length, qualification) in EXITS.items():
        lab.code(text)
        run = lab.run(None, begin, {"rdi": UPPER + 0x1234})
        got[name] = run.reason, run.rip, run.length, run.qualification
        wanted[name] = reason, here, length, qualification
    each("reason, RIP, length and qualification", got, lambda name: wanted[name])
    lab.code("cpuid; nop")
    lab.skip(lab.run(None, begin)).exits_with(ExitReason.VMCALL)


@guest_test("SDM: Basic VM-Exit Information", "SDM: Exception Bitmap")
def a_page_fault_of_an_l2_in_the_upper_half_names_it(lab: VmxLab) -> None:
    """The linear address of a page fault that exits is that of the upper half."""
    begin = _upstairs(lab)
    lab.write_u64(lab.pte(lab.places.data), 0)
    lab.code("mov 8(%rdi), %eax")
    where = UPPER + lab.places.data
    run = lab.run(None, begin | {F.EXCEPTION_BITMAP: 1 << 14}, {"rdi": where})
    run.exits_with_exception(14, 0)
    equal("the qualification and RIP", (run.qualification, run.rip),
          (where + 8, UPPER + lab.places.code))  # fmt: skip


@guest_test("SDM: Event Injection")
def an_injected_exception_returns_into_the_upper_half(lab: VmxLab) -> None:
    """The frame of an exception injected there holds the whole RIP and RSP."""
    begin = _upstairs(lab)
    lab.code("nop")
    divide = VALID | Type.HARDWARE_EXCEPTION << 8
    run = lab.run(None, begin | {F.ENTRY_INTERRUPTION_INFORMATION: divide})
    run.delivers(0)
    frame = lab.read(run[F.GUEST_RSP] - UPPER, 40)
    saved = [int.from_bytes(frame[at : at + 8], "little") for at in (0, 24)]
    equal("RIP and RSP on L2's stack", saved, [begin[F.GUEST_RIP], begin[F.GUEST_RSP]])
