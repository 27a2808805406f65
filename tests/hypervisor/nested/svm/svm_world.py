"""A bare 64-bit L1 on one processor, its VMCB made by Python, and an L2 in assembly.

world = World("vmmcall", wants=[Intercept.VMMCALL])
world.run()
world.vmcb.exitcode
"""

from __future__ import annotations

from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.svm.vmcb import Vmcb, VmcbField
from undervisor.arch.x86.boot import BootMode, BootState
from undervisor.arch.x86.msr import Msr
from undervisor.arch.x86.registers import Cr0, Cr4, Efer
from undervisor.arch.x86.segments import Segment
from undervisor.guest.asm import assemble
from undervisor.hypervisor import models
from undervisor.hypervisor.machine import Machine
from undervisor.hypervisor.verdict import Ending

MEMORY = 16 << 20
PML4, PDPT, GDT, IDT, TSS = 0x10000, 0x11000, 0x12000, 0x13000, 0x14000
STUBS = 0x20000
SEEN = 0x28000
"""The L1 and L2 handler of vector v adds 1 to the byte at `SEEN + v`, the last frame behind it."""
FRAME = 0x28100
L1_CODE, L1_STACK = 0x120000, 0x1F0000
L2_CODE, L2_STACK = 0x200000, 0x2F0000
RING3_STACK = 0x2E0000
VMCB12, HSAVE, IOPM, MSRPM = 0x301000, 0x302000, 0x304000, 0x308000
NPML4, NPDPT, NPD, NPT = 0x310000, 0x311000, 0x312000, 0x313000
DATA = 0x400000
CODE64, DATA_SEGMENT, CODE32 = 0xA9B, 0xC93, 0xC9B
CS64, DS, CS32, CS3, DS3, TR = 0x08, 0x10, 0x18, 0x2B, 0x33, 0x40
LAPIC = 0xFEE00000

# One VMRUN and the end of the run.
ENTER_ONCE = """
    mov $VMCB12, %rax
    vmload %rax
    vmrun %rax
    vmsave %rax
    mov $0x10, %eax
    out %eax, $0xf4
"""
SYMBOLS = {
    name: value
    for name, value in globals().items()
    if name.isupper() and isinstance(value, int) and name not in ("MEMORY",)
}


def gate(address, selector=CS64, dpl=0, ist=0):
    low = address & 0xFFFF | selector << 16 | ist << 32 | (0x8E00 | dpl << 13) << 32
    low |= (address >> 16 & 0xFFFF) << 48
    return low.to_bytes(8, "little") + (address >> 32).to_bytes(8, "little")


def stubs():
    """A handler of 32 bytes for each vector: count it, note the frame, return."""
    source = ""
    for vector in range(256):
        skip = "add $8, %rsp;" if vector in (8, 10, 11, 12, 13, 14, 17, 30) else ""
        source += f".balign 64; incb SEEN + {vector}; {skip} mov %rax, FRAME + 8; "
        source += "mov (%rsp), %rax; mov %rax, FRAME; mov FRAME + 8, %rax; iretq\n"
    return assemble(source, STUBS, SYMBOLS).bytes


class World:
    """L1 in 64-bit mode with identity paging; L2 likewise, under identity nested paging.

    `nested` is the size of NPT12's pages as a shift, or 0 for no nested paging.
    """

    def __init__(self, l2, wants=(), l1=ENTER_ONCE, *, nested=21, cpu="amd", cpus=1, tracer=None):
        keywords = {"tracer": tracer} if tracer else {}
        self.machine = Machine(models.named(cpu), memory_size=MEMORY, cpus=cpus, **keywords)
        self.memory = self.machine.memory
        self.vcpu = self.machine.vcpus[0]
        self._tables()
        self.l1 = assemble(l1, L1_CODE, SYMBOLS)
        self.l2 = assemble(l2 + "\nvmmcall\nhlt\n", L2_CODE, SYMBOLS)
        self.memory.write(L1_CODE, self.l1.bytes)
        self.memory.write(L2_CODE, self.l2.bytes)
        self.vmcb = Vmcb(self.memory.view(VMCB12))
        self._boot()
        self._fill(self.vmcb)
        self.nested(nested)
        for intercept in (Intercept.VMRUN, Intercept.VMMCALL, *wants):
            self.want(intercept)

    def _tables(self):
        memory = self.memory
        self.map_identity(PML4, PDPT)
        descriptors = [0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00CF9B000000FFFF, 0]
        descriptors += [0x00AFFB000000FFFF, 0x00CFF3000000FFFF, 0]
        descriptors += [0x0000890000000067 | (TSS & 0xFFFFFF) << 16, 0]
        memory.write(GDT, b"".join(d.to_bytes(8, "little") for d in descriptors))
        memory.write(IDT, b"".join(gate(STUBS + 64 * v, dpl=3) for v in range(256)))
        memory.write(STUBS, stubs())
        memory.set_u64(TSS + 4, L2_STACK)
        memory.set_u64(TSS + 100, 0x68 << 16 | 0 << 0)

    def map_identity(self, pml4, pdpt):
        self.memory.set_u64(pml4, pdpt | 7)
        for index in range(4):
            self.memory.set_u64(pdpt + 8 * index, index << 30 | 0xE7)

    def _boot(self):
        """L1 starts in long mode, as a loader might leave it, with SVM on."""
        self.machine.boot(BootState(mode=BootMode.PROTECTED32, eip=L1_CODE))
        vcpu = self.vcpu
        vcpu.msrs[Msr.VM_HSAVE_PA] = HSAVE

        def change(vmcb):
            self._fill(vmcb)
            vmcb.rip, vmcb.rsp = L1_CODE, L1_STACK
            vmcb.rflags = 2

        vcpu.reload(change)

    def _fill(self, vmcb):
        """64-bit mode, ring 0, flat segments, at L2's code."""
        for field in (VmcbField.ES_SELECTOR, VmcbField.SS_SELECTOR, VmcbField.DS_SELECTOR):
            vmcb.set_segment(field, Segment(DS, 0, 0xFFFFFFFF, DATA_SEGMENT))
        for field in (VmcbField.FS_SELECTOR, VmcbField.GS_SELECTOR):
            vmcb.set_segment(field, Segment(DS, 0, 0xFFFFFFFF, DATA_SEGMENT))
        vmcb.set_segment(VmcbField.CS_SELECTOR, Segment(CS64, 0, 0xFFFFFFFF, CODE64))
        vmcb.set_segment(VmcbField.TR_SELECTOR, Segment(TR, TSS, 0x67, 0x8B))
        vmcb.set_segment(VmcbField.LDTR_SELECTOR, Segment(0, 0, 0, 0x82))
        vmcb.gdtr_base, vmcb.gdtr_limit = GDT, 0x4F
        vmcb.idtr_base, vmcb.idtr_limit = IDT, 0xFFF
        vmcb.cr0 = Cr0.pg | Cr0.pe | Cr0.ne | Cr0.et | Cr0.wp
        vmcb.cr3, vmcb.cr4 = PML4, Cr4.pae | Cr4.osfxsr | Cr4.osxmmexcpt
        vmcb.efer = Efer.lme | Efer.lma | Efer.svme | Efer.nxe | Efer.sce
        vmcb.dr6, vmcb.dr7 = 0xFFFF0FF0, 0x400
        vmcb.rflags, vmcb.rip, vmcb.rsp, vmcb.cpl = 2, L2_CODE, L2_STACK, 0
        if vmcb is self.__dict__.get("vmcb"):
            vmcb.g_pat = 0x0007040600070406
            vmcb.guest_asid = 1
            vmcb.iopm_base_pa, vmcb.msrpm_base_pa = IOPM, MSRPM

    def nested(self, shift):
        """Identity nested tables of one page size for the first GiB; the rest as 1-GiB pages."""
        self.vmcb.nested_control = 1 if shift else 0
        self.vmcb.n_cr3 = NPML4
        self.map_identity(NPML4, NPDPT)
        if shift in (12, 21):
            self.memory.set_u64(NPDPT, NPD | 7)
            for index in range(512):
                self.memory.set_u64(NPD + 8 * index, index << 21 | 0xE7)
        if shift == 12:
            for table in range(8):
                self.memory.set_u64(NPD + 8 * table, NPT + 0x1000 * table | 7)
                for index in range(512):
                    where = NPT + 0x1000 * table + 8 * index
                    self.memory.set_u64(where, table << 21 | index << 12 | 0x67)

    def npte(self, gpa):
        """Where the 4-KiB entry of NPT12 for `gpa` is."""
        return NPT + (gpa >> 21) * 0x1000 + (gpa >> 12 & 511) * 8

    def change_npte(self, gpa, *, clear=0, put=0):
        where = self.npte(gpa)
        self.memory.set_u64(where, self.memory.u64(where) & ~clear | put)

    def want(self, intercept, wanted=True):
        word = self.vmcb.d[intercept.word]
        self.vmcb.d[intercept.word] = word | intercept.mask if wanted else word & ~intercept.mask

    def run(self, timeout=10):
        """Until L1 says that it is done."""
        outcome = self.machine.run(timeout)
        assert outcome.ending is Ending.GUEST, outcome.text
        return outcome

    def seen(self, vector):
        """How often a handler of this vector has run, in L1 or L2."""
        return self.memory.read(SEEN + vector, 1)[0]

    def data(self, index=0):
        """A quadword that the guests may write."""
        return self.memory.u64(DATA + 8 * index)
