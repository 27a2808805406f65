"""Worlds on the bare silicon: a VMCB in some mode, its code, and what it exits with."""

from __future__ import annotations

import struct

from undervisor.arch.svm.intercepts import Intercept, intercept_mask
from undervisor.arch.svm.vmcb import VmcbField
from undervisor.arch.x86.segments import Gate, Segment, SystemType
from undervisor.guest.asm import assemble
from undervisor.silicon.memory import Memory
from undervisor.silicon.processor import STOP, Processor, SiliconVmcb

PML4, PDPT, GDT, IDT, TSS, HANDLERS, DATA = 0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x9000, 0x8000
CODE, STACK, RAM = 0x100000, 0x80000, 4 << 20
USUAL = (
    Intercept.CPUID,
    Intercept.HLT,
    Intercept.SHUTDOWN,
    Intercept.VMRUN,
    Intercept.VMMCALL,
    Intercept.INTR,
    Intercept.VINTR,
    Intercept.NMI,
    Intercept.MSR_PROT,
    Intercept.EXCP_UD,
)
HLT, CPUID, SHUTDOWN, NPF = 0x78, 0x72, 0x7F, 0x400


class Silicon:
    """One processor over 4 MiB that its nested page tables map one to one."""

    def __init__(self, *, nested_entries=None, size=RAM):
        self.memory = Memory(size)
        self.processor = Processor(self.memory)
        self.state = self.processor.state
        self.root = self._nested_tables(nested_entries or {})
        self.exits = []

    def _nested_tables(self, special):
        """4-KiB pages, so that a test can change single ones: gpa -> entry."""
        frames = self.memory.frames
        root, pdpt, directory = (frames.allocate() for _ in range(3))
        frames.set_u64(root, pdpt | 7)
        frames.set_u64(pdpt, directory | 7)
        for i in range(RAM >> 21):
            table = frames.allocate()
            frames.set_u64(directory + 8 * i, table | 7)
            for j in range(512):
                gpa = i << 21 | j << 12
                frames.set_u64(table + 8 * j, special.get(gpa, gpa | 7))
        return root

    def vmcb(self, *intercepts):
        """A VMCB with controls; its state is all zero."""
        vmcb = SiliconVmcb(self.memory)
        words = intercept_mask(*USUAL, *intercepts)
        vmcb.b[0:24] = b"".join(word.to_bytes(4, "little") for word in words)
        vmcb.n_cr3, vmcb.nested_control, vmcb.guest_asid = self.root, 1, 1
        msrpm = [self.memory.frames.allocate() for _ in range(2)]
        for frame in msrpm:
            self.memory.frames.view(frame)[:] = b"\xff" * 4096
        vmcb.msrpm_base_pa = msrpm[0]
        return vmcb

    def long_mode(self, *intercepts):
        """A VMCB in 64-bit mode at CODE with flat segments, an IDT and a TSS."""
        vmcb, write = self.vmcb(*intercepts), self.memory.write
        write(PML4, struct.pack("<Q", PDPT | 7))
        write(PDPT, struct.pack("<Q", 0x87))
        flat = [
            Segment(0, 0, 0xFFFFFFFF, a).descriptor() for a in (0xA9B, 0xC93, 0xCFB, 0xCF3, 0xAFB)
        ]
        write(GDT, bytes(8) + b"".join(flat))
        gates = (Gate(8, HANDLERS + 16 * i, SystemType.INTERRUPT_GATE, 3, True) for i in range(256))
        write(IDT, b"".join(gate.descriptor() for gate in gates))
        write(TSS, struct.pack("<4xQ", STACK - 0x1000))
        for name, (selector, attributes) in {
            "CS": (8, 0xA9B), "SS": (16, 0xC93), "DS": (16, 0xC93), "ES": (16, 0xC93),
            "FS": (16, 0xC93), "GS": (16, 0xC93),
        }.items():  # fmt: skip
            field = VmcbField[f"{name}_SELECTOR"]
            vmcb.set_segment(field, Segment(selector, 0, 0xFFFFFFFF, attributes))
        vmcb.set_segment(VmcbField.TR_SELECTOR, Segment(0x30, TSS, 0x67, 0x8B))
        vmcb.set_segment(VmcbField.LDTR_SELECTOR, Segment(0, 0, 0, 0))
        vmcb.gdtr_base, vmcb.gdtr_limit = GDT, 0x2F
        vmcb.idtr_base, vmcb.idtr_limit = IDT, 0xFFF
        vmcb.cr0, vmcb.cr3, vmcb.cr4, vmcb.efer = 0x80010033, PML4, 0x620, 0x1D01
        vmcb.rip, vmcb.rsp, vmcb.rflags = CODE, STACK, 2
        vmcb.dr6, vmcb.dr7 = 0xFFFF0FF0, 0x400
        return vmcb

    def code(self, text, where=CODE, bits=64):
        code = assemble(f".intel_syntax noprefix\n.code{bits}\n{text}", where)
        self.memory.write(where, code.bytes)
        return code.labels

    def enter(self, vmcb):
        self.processor.load(vmcb)
        self.processor.load_extra(vmcb)

    def run(self, vmcb=None, on_exit=None, budget=1_000_000):
        """Run until `on_exit` stops it, or until the first exit; the exit codes."""
        if vmcb is not None:
            self.enter(vmcb)
        self.exits = []

        def leave(code):
            self.exits.append(code)
            return STOP if on_exit is None else on_exit(code)

        self.processor.run(leave, budget)
        return self.exits

    def run_text(self, text, *intercepts, on_exit=None, budget=1_000_000):
        vmcb = self.long_mode(*intercepts)
        self.labels = self.code(text)
        return self.run(vmcb, on_exit, budget)
