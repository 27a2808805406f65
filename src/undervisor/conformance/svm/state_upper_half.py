"""L1 and L2 in the upper half of the address space, where kernels live: no address loses bits."""

from __future__ import annotations

from typing import Final

from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.svm.vmcb import VMLOAD_RANGES, Vmcb
from undervisor.arch.svm.vmcb import VmcbField as F
from undervisor.arch.x86.msr import Msr
from undervisor.arch.x86.paging import sign_extend
from undervisor.conformance.expect import each, equal
from undervisor.conformance.suite import guest_test
from undervisor.conformance.svm.lab import Changes, SvmLab
from undervisor.conformance.svm.needs import feature

UPPER: Final = 0xFFFFFF8000000000
"""What the last entry of a PML4 maps: here the first 512 GiB once more."""
LAST_ENTRY: Final = 8 * 511
IN_L1: Final = {
    "VMLOAD": "vmload %rax", "VMSAVE": "vmsave %rax", "CLGI": "clgi", "STGI": "stgi",
    "INVLPGA": "xor %ecx, %ecx; invlpga %rax, %ecx", "VMRUN": "vmrun %rax; stgi",
    "VMRUN of an illegal VMCB": "movl $0, 0x58(%rax); vmrun %rax; stgi",
}  # fmt: skip
# The instruction, its intercept, its length and EXITINFO1.
EXITS: Final = {
    "CPUID": ("cpuid", Intercept.CPUID, 2, 0),
    "INVLPG": ("invlpg (%rdi)", Intercept.INVLPG, 3, UPPER + 0x1234),
    "RDMSR": ("rdmsr", Intercept.MSR_PROT, 2, 0),
    "VMMCALL": ("vmmcall", Intercept.VMMCALL, 3, 0),
}
BASES: Final = (F.FS_BASE, F.GS_BASE, F.LDTR_BASE, F.TR_BASE)
NOT_CANONICAL: Final = 0x01FF_8000_0000_5000
"""Of the upper half where linear addresses have 48 bits, and where they have 57."""


def _upstairs(lab: SvmLab) -> Changes:
    """L2 with its first 512 GiB mapped at `UPPER` too, and its code and stack there."""
    places = lab.places
    root = lab.pages()
    lab.write_u64(root + LAST_ENTRY, places.pdpt | 7)
    return {F.CR3: root, F.RIP: UPPER + places.code, F.RSP: UPPER + places.stack - 8}


@guest_test(
    "APM: VMRUN Instruction, Saving Host State", "APM: #VMEXIT", cases={n: n for n in IN_L1}
)
def l1_goes_on_in_the_upper_half(lab: SvmLab, name: str) -> None:
    """Behind an SVM instruction in the upper half of the address space RIP is the next one's."""
    root = lab.facts.l1.cr3
    lab.write_u64(root + LAST_ENTRY, lab.read_u64(root))
    lab.code("nop")
    code = f"""
        lea 2f(%rip), %r10; lea 1f(%rip), %rbx; movabs ${UPPER:#x}, %r11; add %r11, %rbx; jmp *%rbx
        1: {IN_L1[name]}; 3: lea 3b(%rip), %r14; jmp *%r10; 2: lea 3b(%rip), %r15
    """
    with lab.batch() as batch:
        lab.plan_launch(batch, bytes(lab.area()))
        batch.vmsave(lab.places.scratch)
        ran = batch.call(lab.assemble(code), {"rax": lab.places.control}, ["r14", "r15"])
        batch.vmload(lab.places.scratch)
    equal("L1's RIP behind the instruction", ran.value["r14"], UPPER + ran.value["r15"])


@guest_test(
    "APM: State Saved on Exit",
    "APM: Decode Assists",
    needs=[feature("nrips"), feature("decode_assists")],
)
def exits_of_an_l2_in_the_upper_half_name_it(lab: SvmLab) -> None:
    """RIP, nRIP and linear addresses that an exit saves are those of the upper half."""
    begin = _upstairs(lab)
    got, wanted = {}, {}
    for name, (text, intercept, length, info) in EXITS.items():
        lab.fill(lab.places.msr, 0x2000, 0xFF)
        lab.code(text)
        run = lab.run(None, begin, {"rdi": UPPER + 0x1234}, wants=[intercept])
        here = UPPER + lab.places.code
        got[name] = (run.code, run.rip, run[F.NRIP], run.info1)
        wanted[name] = (int(intercept), here, here + length, info)
    each("EXITCODE, RIP, nRIP and EXITINFO1", got, lambda name: wanted[name])


@guest_test("APM: #VMEXIT", "APM: IOIO Intercept", "APM: #PF (Page Fault)")
def faults_and_ports_of_an_l2_in_the_upper_half_name_it(lab: SvmLab) -> None:
    """The address of a page fault and the next RIP of an IN are those of the upper half."""
    begin = _upstairs(lab)
    lab.write_u64(lab.pte(lab.places.data), 0)
    lab.code("mov 8(%rdi), %eax")
    where = UPPER + lab.places.data
    run = lab.run(None, begin, {"rdi": where}, wants=[Intercept.EXCP_PF])
    run.exits_with(ExitCode.EXCP_PF, 0, where + 8)
    equal("RIP of the page fault", run.rip, UPPER + lab.places.code)
    lab.fill(lab.places.io, 0x3000, 0xFF)
    lab.code("in $0x80, %al")
    run = lab.run(None, begin, wants=[Intercept.IOIO_PROT])
    run.exits_with(ExitCode.IOIO, info2=UPPER + lab.places.code + 2)


@guest_test("APM: Event Injection", "APM: #VMEXIT")
def an_injected_exception_returns_into_the_upper_half(lab: SvmLab) -> None:
    """The frame of an exception injected there holds the whole RIP and RSP."""
    begin = dict(_upstairs(lab))
    lab.code("nop")
    run = lab.run(None, begin | {F.EVENTINJ: 1 << 31 | 3 << 8})
    run.delivers(0)
    frame = lab.read(run[F.RSP] - UPPER, 40)
    saved = [int.from_bytes(frame[at : at + 8], "little") for at in (0, 24)]
    equal("RIP and RSP on L2's stack", saved, [begin[F.RIP], begin[F.RSP]])


@guest_test("APM: VMLOAD", "APM: Canonicalization and Consistency Checks")
def vmload_makes_bases_canonical(lab: SvmLab) -> None:
    """VMLOAD sign-extends the bases of FS, GS, LDTR and TR, and KernelGSBase."""
    places = lab.places
    lab.fill(places.data, 0x2000)
    with lab.batch() as batch:
        batch.vmsave(places.scratch)
        batch.vmsave(places.data)
        saved = {at: batch.read(places.data + at, end - at) for at, end in VMLOAD_RANGES}
    vmcb = Vmcb(bytearray(0x1000))
    for at, part in saved.items():
        vmcb.b[at : at + len(part.value)] = part.value
    for field in (*BASES, F.KERNEL_GS_BASE):
        vmcb[field] = NOT_CANONICAL + field
    lab.write(places.data, bytes(vmcb.b))
    with lab.batch() as batch:
        batch.vmload(places.data)
        batch.vmsave(places.data + 0x1000)
        kernel = batch.rdmsr(Msr.KERNEL_GS_BASE)
        batch.vmload(places.scratch)
    got = {field: lab.read_u64(places.data + 0x1000 + field) for field in BASES}
    got[F.KERNEL_GS_BASE] = kernel.value
    each("the base that VMLOAD loaded", got, lambda field: sign_extend(NOT_CANONICAL + field))
