"""A kernel in place of KVM: it answers the ioctls, and its guests are Python generators.

A guest is a generator that yields exits and is sent what IN gives:

    def guest(cpu):
        yield cpu.out(0x3F8, b"A")
        value = yield cpu.inp(0x3FD)

What would be a violation of the API or of the rule about L2's state raises AssertionError.
"""

import mmap
import os
import struct
import time

from undervisor.arch import kvm
from undervisor.arch.kvm import Capability, Exit, MpState, Request

PAGE = 0x1000
DATA_AT = 0x800
"""Where in the shared page the data of an I/O exit is."""
RING_PAGE = 2
SVM, VMX = 1 << 2, 1 << 5
CAPABILITIES = {
    Capability.IRQCHIP: 1,
    Capability.COALESCED_MMIO: RING_PAGE,
    Capability.MAX_VCPUS: 1024,
    Capability.TSC_DEADLINE_TIMER: 1,
    Capability.IMMEDIATE_EXIT: 1,
    Capability.NESTED_STATE: 4224,
    Capability.COALESCED_PIO: 1,
    Capability.X86_GUEST_MODE: 1,
}
LEAVES = [
    (0x0, 0, 0, 0x1F, 0x68747541, 0x444D4163, 0x69746E65),
    (0x1, 0, 0, 0x800F12, 0xAA55_0899, 0x8000_0000, 0x0783_FBFF),
    (0xB, 0, 1, 0, 1, 0x100, 0x77),
    (0xB, 1, 1, 4, 8, 0x201, 0x77),
    (0x80000001, 0, 0, 0x800F12, 0, SVM, 0x2FD3FBFF),
    (0x8000001E, 0, 0, 0x77, 0x100, 0, 0),
]
HEADER = 128


class Cpu:
    """A processor of the stand-in: its page, its registers, and the words of its guest."""

    def __init__(self, index, guest):
        self.index = index
        self.page = None
        self.guest = guest(self)
        self.started = False
        self.l2 = False
        self.mp = MpState.RUNNABLE if index == 0 else MpState.UNINITIALIZED
        self.regs = dict.fromkeys(kvm.REGS_ORDER, 0) | {"rip": 0xFFF0, "rflags": 2}
        self.sregs = bytes(kvm.SREGS_SIZE)
        self.cpuid, self.msrs = {}, {}
        self.nested = struct.pack("<HHI", 0x100, 1, HEADER) + bytes(HEADER - 8)
        self.takes = None
        self.runs = self.writes = 0

    # what a guest yields

    def out(self, port, data, size=1):
        """OUT, or REP OUTS where there is more than one unit."""
        self.page[DATA_AT : DATA_AT + len(data)] = data
        self._io(1, size, port, len(data) // size)

    def inp(self, port, size=1, count=1):
        """IN, or REP INS; what it gives is sent back."""
        self._io(0, size, port, count)
        self.takes = lambda: bytes(self.page[DATA_AT : DATA_AT + size * count])

    def gathered(self, port, data):
        """OUTs that KVM gathers: no exit of their own."""
        start = RING_PAGE * PAGE
        first, last = kvm.COALESCED_RING.unpack_from(self.page, start)
        most = (PAGE - kvm.COALESCED_RING.size) // kvm.COALESCED_ENTRY.size
        for byte in data:
            assert (last + 1) % most != first, "the ring is full"
            at = start + kvm.COALESCED_RING.size + last * kvm.COALESCED_ENTRY.size
            kvm.COALESCED_ENTRY.pack_into(self.page, at, port, 1, 1, bytes([byte]))
            last = (last + 1) % most
            struct.pack_into("<I", self.page, start + 4, last)

    def mmio_read(self, address, size=4):
        """A load from where nothing is."""
        self._reason(Exit.MMIO)
        kvm.EXIT_MMIO.pack_into(self.page, kvm.EXIT_AT, address, bytes(8), size, 0)
        self.takes = lambda: bytes(self.page[kvm.EXIT_AT + 8 : kvm.EXIT_AT + 8 + size])

    def ends(self, reason, layout=None, *values):
        """An exit that the run does not survive."""
        self._reason(reason)
        if layout:
            layout.pack_into(self.page, kvm.EXIT_AT, *values)

    def _io(self, out, size, port, count):
        self._reason(Exit.IO)
        kvm.EXIT_IO.pack_into(self.page, kvm.EXIT_AT, out, size, port, count, DATA_AT)

    def _reason(self, reason):
        struct.pack_into("<I", self.page, kvm.EXIT_REASON_AT, reason)

    # KVM_RUN

    def run(self):
        """Until the guest's next exit."""
        self.runs += 1
        sent = None
        if self.takes is not None:
            sent, self.takes = self.takes(), None
        try:
            waits = self.guest.send(sent if self.started else None)
        except StopIteration:
            raise AssertionError("the guest of this test should have ended its run") from None
        self.started = True
        struct.pack_into("<H", self.page, kvm.FLAGS_AT, 4 if self.l2 else 0)
        if waits == "again":
            raise BlockingIOError
        if waits == "fails":
            raise OSError(14, "Bad address")
        while waits == "until kicked":
            if self.page[kvm.IMMEDIATE_EXIT_AT]:
                raise InterruptedError
            time.sleep(0.001)


class StandIn:
    """The kernel.  `guests` are the processors' guests; one that is missing waits for ever."""

    def __init__(self, *guests, capabilities=None, leaves=LEAVES, version=kvm.API_VERSION):
        self.guests = guests
        self.capabilities = CAPABILITIES | (capabilities or {})
        self.leaves, self.version = leaves, version
        self.cpus, self.lines, self.slots, self.asked = [], [], {}, []
        self._numbers = {}

    def open(self):
        """The device."""
        return os.open("/dev/null", os.O_RDONLY)

    def shared(self, number, size):
        """A processor's page."""
        cpu = self._numbers[number]
        cpu.page = mmap.mmap(-1, size)
        return cpu.page

    def ioctl(self, number, request, argument=0):
        """A call, by its name in lower case below."""
        self.asked.append(request)
        return getattr(self, Request(request).name.lower())(number, argument) or 0

    # the device

    def get_api_version(self, number, argument):
        return self.version

    def check_extension(self, number, argument):
        return self.capabilities.get(argument, 0)

    def get_vcpu_mmap_size(self, number, argument):
        return 3 * PAGE

    def get_supported_cpuid(self, number, buffer):
        kvm.CPUID_HEADER.pack_into(buffer, 0, len(self.leaves), 0)
        for place, leaf in enumerate(self.leaves):
            at = kvm.CPUID_HEADER.size + place * kvm.CPUID_ENTRY.size
            kvm.CPUID_ENTRY.pack_into(buffer, at, *leaf)

    def create_vm(self, number, argument):
        return os.open("/dev/null", os.O_RDONLY)

    # the machine

    def set_tss_addr(self, number, address):
        assert 0xC0000000 < address < 0xFFFE0000

    def set_identity_map_addr(self, number, address):
        assert not self.cpus, "before the first processor"

    def create_irqchip(self, number, argument):
        assert not self.cpus, "before the first processor"

    def create_pit2(self, number, argument):
        pass

    def set_user_memory_region(self, number, region):
        slot, _, gpa, size, address = kvm.MEMORY_REGION.unpack(region)
        assert (address | gpa | size) % PAGE == 0
        self.slots[slot] = gpa, size, address

    def irq_line(self, number, level):
        self.lines.append(kvm.IRQ_LEVEL.unpack(level))

    def register_coalesced_mmio(self, number, zone):
        assert kvm.COALESCED_ZONE.unpack(zone) == (0x3F8, 1, 1)

    def create_vcpu(self, number, index):
        guest = self.guests[index] if index < len(self.guests) else sleeper
        cpu = Cpu(index, guest)
        self.cpus.append(cpu)
        made = os.open("/dev/null", os.O_RDONLY)
        self._numbers[made] = cpu
        return made

    # a processor

    def run(self, number, argument):
        self._numbers[number].run()

    def set_cpuid2(self, number, buffer):
        count, _ = kvm.CPUID_HEADER.unpack_from(buffer)
        entries = list(kvm.CPUID_ENTRY.iter_unpack(buffer[kvm.CPUID_HEADER.size :]))
        assert len(entries) == count
        self._numbers[number].cpuid = {(e[0], e[1]): e[3:] for e in entries}

    def set_msrs(self, number, buffer):
        entries = kvm.MSR_ENTRY.iter_unpack(buffer[kvm.MSRS_HEADER.size :])
        self._numbers[number].msrs = {index: value for index, _, value in entries}

    def get_regs(self, number, buffer):
        buffer[:] = kvm.REGS.pack(*self._numbers[number].regs.values())

    def set_regs(self, number, buffer):
        cpu = self._written(number)
        cpu.regs = dict(zip(kvm.REGS_ORDER, kvm.REGS.unpack(buffer), strict=True))

    def get_sregs(self, number, buffer):
        buffer[:] = self._numbers[number].sregs

    def set_sregs(self, number, buffer):
        self._written(number).sregs = bytes(buffer)

    def _written(self, number):
        cpu = self._numbers[number]
        assert not cpu.l2, "registers are written while the state is L2's"
        cpu.writes += bool(cpu.runs)
        return cpu

    def get_mp_state(self, number, buffer):
        buffer[:] = kvm.MP_STATE.pack(self._numbers[number].mp)

    def get_nested_state(self, number, buffer):
        cpu = self._numbers[number]
        flags, *rest = struct.unpack_from("<HHI", cpu.nested)
        struct.pack_into("<HHI", buffer, 0, flags | cpu.l2, *rest)
        buffer[8 : len(cpu.nested)] = cpu.nested[8:]

    def set_nested_state(self, number, buffer):
        if struct.unpack_from("<I", buffer, 4)[0] != len(buffer):
            raise OSError(22, "Invalid argument")
        self._numbers[number].nested = bytes(buffer)


def sleeper(cpu):
    """A guest that does nothing, not even wait for an interrupt."""
    while True:
        yield "until kicked"


def says(data, status=0):
    """A guest that prints and ends its run."""

    def guest(cpu):
        for byte in data:
            yield cpu.out(0x3F8, bytes([byte]))
        yield cpu.out(0xF4, bytes([status]))

    return guest


def echo(cpu):
    """A guest that sends back what it gets, until it gets a dot."""
    byte = b""
    while byte != b".":
        status = yield cpu.inp(0x3FD)
        if status[0] & 1:
            byte = yield cpu.inp(0x3F8)
            yield cpu.out(0x3F8, byte)
    yield cpu.out(0xF4, b"\0")


def in_l2(cpu):
    """A guest that prints, goes to L2 and stays there."""
    yield cpu.out(0x3F8, b"1")
    cpu.l2 = True
    while True:
        yield "until kicked"
