"""The probe as L1 on an in-process machine, and an L2 beside it, for the tests of this folder.

lab = Lab()
run = lab.run("mov $5, %eax; cpuid", {F.CR3_TARGET_COUNT: 1})
run.reason, run[F.EXIT_INSTRUCTION_LENGTH], run.registers["rax"]

An L2 begins in 64-bit mode at CPL 0 with L1's page tables, a GDT and an IDT of its own: the handler
of each vector is a VMCALL, so that a delivered exception ends the run like everything else.
"""

from __future__ import annotations

import struct

from undervisor.arch.vmx.controls import (
    EntryControls,
    ExitControls,
    PinBasedControls,
    PrimaryControls,
    SecondaryControls,
)
from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import FieldArea
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.boot import MemoryMap
from undervisor.guest.asm import assemble
from undervisor.guest.image import Image
from undervisor.guest.probe.answers import VmxResult
from undervisor.guest.probe.client import Batch, Probe
from undervisor.guest.probe.program import program
from undervisor.guest.probe.vmx_setup import l2_fields, vmx_on
from undervisor.hypervisor import models
from undervisor.hypervisor.machine import Machine
from undervisor.hypervisor.verdict import Ending

MEMORY = 32 << 20
VMXON, VMCS, VMCS2, SHADOW = 0x610000, 0x611000, 0x612000, 0x613000
IO_A, IO_B, MSR_BITMAP, APIC_PAGE = 0x614000, 0x615000, 0x616000, 0x617000
READ_BITMAP, WRITE_BITMAP, EPTP_LIST, PML = 0x618000, 0x619000, 0x61A000, 0x61B000
MSR_LIST, MSR_LIST2, SCRATCH = 0x61C000, 0x620000, 0x624000
CODE, STACK, GDT, IDT, TSS, STUBS = 0x630000, 0x642000, 0x643000, 0x644000, 0x645000, 0x646000
DATA, USER_STACK = 0x650000, 0x652000
PML4, PDPT, PD, PT = 0x660000, 0x661000, 0x662000, 0x663000
EPT, EPT_PDPT, EPT_PD, EPT_PT = 0x680000, 0x681000, 0x682000, 0x690000
EPT2 = 0x6A0000
CS64, DS, CS32, CS16, DS16, CS3, DS3, TR = 0x08, 0x10, 0x18, 0x20, 0x28, 0x33, 0x3B, 0x40
SYMBOLS = {n: v for n, v in globals().items() if n.isupper() and isinstance(v, int)}
STUB_SIZE = 16
VALID = 1 << 31
ACTIVATE = PrimaryControls.activate_secondary_controls
EXIT_FIELDS = [f for f in F if f.area is FieldArea.READ_ONLY and f is not F.VM_INSTRUCTION_ERROR]
SAVED = [
    F.GUEST_RIP,
    F.GUEST_RSP,
    F.GUEST_RFLAGS,
    F.GUEST_CR0,
    F.GUEST_CR3,
    F.GUEST_CR4,
    F.GUEST_DR7,
    F.GUEST_EFER,
    F.GUEST_PAT,
    F.GUEST_DEBUGCTL,
    F.GUEST_INTERRUPTIBILITY_STATE,
    F.GUEST_ACTIVITY_STATE,
    F.GUEST_PENDING_DEBUG_EXCEPTIONS,
    F.GUEST_SYSENTER_CS,
    F.GUEST_SYSENTER_ESP,
    F.GUEST_SYSENTER_EIP,
    F.GUEST_CS_SELECTOR,
    F.GUEST_CS_BASE,
    F.GUEST_CS_LIMIT,
    F.GUEST_CS_ACCESS_RIGHTS,
    F.GUEST_SS_SELECTOR,
    F.GUEST_SS_ACCESS_RIGHTS,
    F.GUEST_TR_ACCESS_RIGHTS,
    F.GUEST_LDTR_ACCESS_RIGHTS,
    F.GUEST_GDTR_LIMIT,
    F.GUEST_IDTR_LIMIT,
    F.ENTRY_CONTROLS,
    F.ENTRY_INTERRUPTION_INFORMATION,
    F.PREEMPTION_TIMER_VALUE,
    F.GUEST_PDPTE0,
    F.GUEST_PDPTE1,
    F.PML_INDEX,
]
CONTROLS = {
    PinBasedControls: F.PIN_BASED_CONTROLS,
    PrimaryControls: F.PRIMARY_CONTROLS,
    SecondaryControls: F.SECONDARY_CONTROLS,
    ExitControls: F.EXIT_CONTROLS,
    EntryControls: F.ENTRY_CONTROLS,
}


class Line:
    """The serial line: the machine runs until the probe waits for what nobody has sent."""

    def __init__(self):
        self.inward, self.outward, self.machine = bytearray(), bytearray(), None

    def poll(self):
        data = bytes(self.inward)
        self.inward.clear()
        if not data:
            self.machine.request_stop()
        return data

    def wait(self):
        return b""

    def send(self, data):
        self.inward += data

    def receive(self, timeout):
        if not self.outward:
            outcome = self.machine.run(timeout)
            assert outcome.ending is Ending.STOPPED, outcome.text
        data = bytes(self.outward)
        self.outward.clear()
        return data


class Run:
    """An L2 that ran: the entry's result, L2's registers, the VMCS's fields after the exit."""

    def __init__(self, answer, fields):
        self.answer, self.fields = answer, fields

    @property
    def result(self):
        return self.answer.value.result

    @property
    def registers(self):
        return self.answer.value.registers

    def __getitem__(self, field):
        return self.fields[field]

    @property
    def entered(self):
        return self.result.succeeded

    @property
    def error(self):
        """The VM-instruction error of an entry that failed with VMfailValid."""
        return self.result.error

    @property
    def failed_entry(self):
        return bool(self[F.EXIT_REASON] >> 31)

    @property
    def reason(self):
        assert self.entered, f"no L2 ran: {self.result}"
        return ExitReason(self[F.EXIT_REASON] & 0xFFFF)

    @property
    def qualification(self):
        return self[F.EXIT_QUALIFICATION]

    @property
    def length(self):
        return self[F.EXIT_INSTRUCTION_LENGTH]

    @property
    def vector(self):
        """The vector that L2's handler was called for, None where no handler was."""
        rip = self[F.GUEST_RIP] - STUBS
        if self.reason is ExitReason.VMCALL and 0 <= rip < 256 * STUB_SIZE:
            return rip // STUB_SIZE
        return None

    @property
    def intercepted(self):
        """The vector of an exception that exited, None where the exit is another."""
        if self.reason is ExitReason.EXCEPTION_OR_NMI:
            return self[F.EXIT_INTERRUPTION_INFORMATION] & 0xFF
        return None


class Lab:
    """L1 in VMX operation with one current VMCS."""

    def __init__(self, cpu="intel", cpus=1, vmx=True):
        line = Line()
        self.machine = line.machine = Machine(
            models.named(cpu),
            memory_size=MEMORY,
            cpus=cpus,
            serial=line.outward.extend,
            source=line,
        )
        self.memory = self.machine.memory
        self.vcpu = self.machine.vcpus[0]
        image = Image.parse(program().elf, "probe")
        placement = image.place(MemoryMap.pc(MEMORY))
        for gpa, size in placement.clear:
            self.memory.clear(gpa, size)
        for gpa, data in placement.pieces:
            self.memory.write(gpa, data)
        self.machine.boot(placement.boot)
        self.probe = Probe(line, 5)
        self.probe.wait_for_hello()
        self._tables()
        if vmx:
            self.on()

    def on(self):
        self.facts = vmx_on(self.probe, VMXON, VMCS)
        self.fields = l2_fields(self.facts, CODE, STACK)
        self.fields |= {
            F.GUEST_GDTR_BASE: GDT,
            F.GUEST_GDTR_LIMIT: 0x4F,
            F.GUEST_IDTR_BASE: IDT,
            F.GUEST_IDTR_LIMIT: 0xFFF,
            F.GUEST_TR_SELECTOR: TR,
            F.GUEST_TR_BASE: TSS,
            F.GUEST_ES_SELECTOR: DS,
            F.GUEST_CS_SELECTOR: CS64,
            F.GUEST_SS_SELECTOR: DS,
            F.GUEST_DS_SELECTOR: DS,
            F.MSR_BITMAP_ADDRESS: MSR_BITMAP,
            F.IO_BITMAP_A_ADDRESS: IO_A,
            F.IO_BITMAP_B_ADDRESS: IO_B,
            F.CR0_GUEST_HOST_MASK: 0,
            F.CR4_GUEST_HOST_MASK: 0,
            F.CR0_READ_SHADOW: 0,
            F.CR4_READ_SHADOW: 0,
            F.PAGE_FAULT_ERROR_CODE_MASK: 0,
            F.PAGE_FAULT_ERROR_CODE_MATCH: 0,
            F.ENTRY_INTERRUPTION_INFORMATION: 0,
            F.ENTRY_MSR_LOAD_COUNT: 0,
            F.EXIT_MSR_LOAD_COUNT: 0,
            F.EXIT_MSR_STORE_COUNT: 0,
        }
        known = {int(f) for f in self.vcpu.model.vmcs_fields}
        self.fields = {f: v for f, v in self.fields.items() if f in known}
        self.known = known
        self.launched = False
        self.loaded = {}

    def _tables(self):
        memory = self.memory
        descriptors = [0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00CF9B000000FFFF]
        descriptors += [0x00009B000000FFFF, 0x000093000000FFFF]
        descriptors += [0x00AFFB000000FFFF, 0x00CFF3000000FFFF]
        descriptors += [0x00008B0000000067 | (TSS & 0xFFFFFF) << 16, 0]
        memory.write(GDT, b"".join(d.to_bytes(8, "little") for d in descriptors))
        memory.write(IDT, b"".join(gate(STUBS + STUB_SIZE * v, dpl=3) for v in range(256)))
        stub = assemble("vmcall; iretq").bytes.ljust(STUB_SIZE, b"\x90")
        memory.write(STUBS, stub * 256)
        memory.set_u64(TSS + 4, STACK)
        for page in (IO_A, IO_B, MSR_BITMAP):
            memory.write(page, bytes(4096))

    # -- controls ------------------------------------------------------------------------------

    def control(self, kind, *, base=None, **bits):
        """`{field: value}` for a control word with some bits changed; activates secondaries."""
        field = CONTROLS[kind]
        value = self.fields.get(field, self.facts.adjust(field, 0)) if base is None else base
        for name, on in bits.items():
            mask = int(getattr(kind, name))
            value = value | mask if on else value & ~mask
        changes = {field: value}
        if kind is SecondaryControls:
            changes[F.PRIMARY_CONTROLS] = self.fields[F.PRIMARY_CONTROLS] | ACTIVATE
        return changes

    def pin(self, **bits):
        return self.control(PinBasedControls, **bits)

    def primary(self, **bits):
        return self.control(PrimaryControls, **bits)

    def secondary(self, **bits):
        return self.control(SecondaryControls, **bits)

    def on_exit(self, **bits):
        return self.control(ExitControls, **bits)

    def on_entry(self, **bits):
        return self.control(EntryControls, **bits)

    # -- running -------------------------------------------------------------------------------

    def code(self, source, base=CODE, end="\nvmcall\n"):
        """Put L2's code in place; a VMCALL ends what does not exit."""
        self.memory.write(base, assemble(source + end, base, SYMBOLS).bytes)

    def run(self, source=None, changes=None, registers=None, *, resume=False, reads=(), end=None):
        """Write all fields, with `changes`, then enter L2 at the start of `source`."""
        if source is not None:
            self.code(source, end="\nvmcall\n" if end is None else end)
        wanted = {} if resume else dict(self.fields)
        wanted |= changes or {}
        batch = Batch()
        if not resume:
            batch.vmclear(VMCS)
            batch.vmptrld(VMCS)
            self.launched = False
        if wanted:
            writes = self._vmwrites(batch, wanted)
        run = batch.vmx_run(registers, resume=self.launched)
        asked = [f for f in (*EXIT_FIELDS, *SAVED, *reads) if f in self.known]
        asked = list(dict.fromkeys(asked))
        results = self._vmreads(batch, asked)
        self.probe.run(batch)
        if wanted:
            assert writes.value[0] == len(wanted), (
                f"VMWRITE of {list(wanted)[writes.value[0]]!r}: {writes.value[1]}"
            )
        values = struct.iter_unpack("<QB", self.memory.read(results, 9 * len(asked)))
        answer = Run(run, {f: v for f, (v, _) in zip(asked, values, strict=True)})
        if answer.entered and not answer.failed_entry:
            self.launched = True
        return answer

    def _vmwrites(self, batch, fields):
        """VMWRITE of many fields; their rows go to memory directly, which is faster."""
        total = len(fields)
        rows = (struct.pack("<IQ", field, value) for field, value in fields.items())
        self.memory.write(SCRATCH, b"".join(rows))
        return batch.call(
            "vmwrites",
            {"rsi": SCRATCH, "rcx": total},
            ("rcx", "r10"),
            lambda r: (total - r["rcx"], VmxResult.of(r)),
        )

    def _vmreads(self, batch, fields):
        """VMREAD of many fields; where their values will be."""
        wanted, results = SCRATCH + 0x2000, SCRATCH + 0x2800
        self.memory.write(wanted, struct.pack(f"<{len(fields)}I", *fields))
        batch.call("vmreads", {"rsi": wanted, "rdi": results, "rcx": len(fields)}, [])
        return results

    def resume(self, changes=None, registers=None, **more):
        """Go on from the last exit, with some fields changed."""
        return self.run(None, changes, registers, resume=True, **more)

    def skip(self, run, changes=None, registers=None, **more):
        """Go on behind the instruction that exited."""
        rip = {F.GUEST_RIP: run[F.GUEST_RIP] + run.length}
        return self.resume(rip | (changes or {}), run.registers | (registers or {}), **more)

    def ask(self, *operations):
        """Run operations `(name, *arguments)` of a batch; their answers."""
        batch = Batch()
        answers = [getattr(batch, name)(*arguments) for name, *arguments in operations]
        self.probe.run(batch)
        return answers

    def call(self, source, registers=None, out=None):
        """Run code in L1."""
        batch = Batch()
        code = assemble(source, 0, SYMBOLS)
        answer = batch.call(code, registers, *([out] if out is not None else []))
        self.probe.run(batch)
        return answer

    # -- tables --------------------------------------------------------------------------------

    def ept(self, shift=21, *, rights=7, accessed_dirty=False, root=EPT):
        """Identity EPT of pages of one size for the first GiB; fields that switch it on."""
        memory = self.memory
        pdpt, pd, pt = root + 0x1000, root + 0x2000, root + 0x10000
        for page in range(root, root + 0x3000, 4096):
            memory.write(page, bytes(4096))
        memory.set_u64(root, pdpt | 7)
        for index in range(4):
            memory.set_u64(pdpt + 8 * index, index << 30 | 0xB0 | rights)
        if shift < 30:
            memory.set_u64(pdpt, pd | 7)
            for index in range(512):
                memory.set_u64(pd + 8 * index, index << 21 | 0xB0 | rights)
        if shift == 12:
            for table in (2, 3):  # 4 to 8 MiB: all that L2 uses here
                memory.set_u64(pd + 8 * table, pt + table * 0x1000 | 7)
                for index in range(512):
                    entry = table << 21 | index << 12 | 0x30 | rights
                    memory.set_u64(pt + table * 0x1000 + 8 * index, entry)
        eptp = root | 0x1E | (0x40 if accessed_dirty else 0)
        return self.secondary(enable_ept=1) | {F.EPT_POINTER: eptp}

    def epte(self, gpa, level=1, root=EPT):
        """Where the EPT entry of a level (1: 4 KiB, 2: 2 MiB, 3: 1 GiB, 4) for `gpa` is."""
        return {
            1: root + 0x10000 + (gpa >> 21) * 0x1000 + (gpa >> 12 & 511) * 8,
            2: root + 0x2000 + (gpa >> 21 & 511) * 8,
            3: root + 0x1000 + (gpa >> 30 & 511) * 8,
            4: root + (gpa >> 39) * 8,
        }[level]

    def pages(self, **entries):
        """L2's own page tables: identity 2-MiB pages, 4 KiB from 6 to 8 MiB; CR3's field."""
        memory = self.memory
        memory.write(PML4, bytes(0x4000))
        memory.set_u64(PML4, PDPT | 7)
        memory.set_u64(PDPT, PD | 7)
        for index in range(512):
            memory.set_u64(PD + 8 * index, index << 21 | 0x87)
        memory.set_u64(PD + 24, PT | 7)
        for index in range(512):
            memory.set_u64(PT + 8 * index, 3 << 21 | index << 12 | 7)
        return {F.GUEST_CR3: PML4}

    def pte(self, gva):
        """Where L2's 4-KiB entry for an address from 6 to 8 MiB is."""
        return PT + (gva >> 12 & 511) * 8


def gate(address, selector=CS64, dpl=0, ist=0):
    low = address & 0xFFFF | selector << 16 | ist << 32 | (0x8E00 | dpl << 13) << 32
    low |= (address >> 16 & 0xFFFF) << 48
    return struct.pack("<2Q", low, address >> 32)


def event(vector, kind, *, error_code=False):
    """A VM-entry interruption-information field."""
    return VALID | kind << 8 | vector | error_code << 11
