"""A machine's time in the hands of a test, and a processor that remembers what reached it."""

import pytest

from undervisor.devices.clock import Clock
from undervisor.devices.interrupts import InterruptBus
from undervisor.devices.lapic import Lapic
from undervisor.devices.lapic_layout import Reg


class Time:
    """Nanoseconds that a test moves; `clock` calls back as it does."""

    def __init__(self):
        self.ns = 0
        self.clock = Clock(lambda: self.ns)

    def move(self, ns):
        """Let time pass, stopping at each deadline as the loop does."""
        end = self.ns + ns
        while (deadline := self.clock.next_deadline()) is not None and deadline <= end:
            self.ns = max(self.ns, deadline)
            self.clock.run_due()
        self.ns = end

    def jump(self, ns):
        """Let time pass at once, past deadlines."""
        self.ns += ns
        self.clock.run_due()


class Processor:
    """What a local APIC signalled, in order."""

    def __init__(self):
        self.events = []

    def nmi(self):
        self.events.append("nmi")

    def init(self):
        self.events.append("init")

    def sipi(self, vector):
        self.events.append(("sipi", vector))

    def smi(self):
        self.events.append("smi")

    def wake(self):
        self.events.append("wake")


class Machine:
    """Local APICs on one bus, software-enabled."""

    def __init__(self, time, count):
        self.bus = InterruptBus()
        self.processors = [Processor() for _ in range(count)]
        self.lapics = [Lapic(i, time.clock, self.bus, p) for i, p in enumerate(self.processors)]
        for lapic in self.lapics:
            self.store(lapic, Reg.SVR, 0x1FF)

    @staticmethod
    def store(lapic, register, value):
        lapic.write(register << 4, 4, value)

    @staticmethod
    def load(lapic, register):
        return lapic.read(register << 4, 4)

    def waiting(self, vector):
        """The IDs of the APICs that have `vector` pending."""
        part, bit = divmod(vector, 32)
        return [
            lapic.initial_id for lapic in self.lapics if lapic._readers[Reg.IRR + part]() >> bit & 1
        ]

    def seen(self, event):
        """The IDs of the processors that saw `event`."""
        return [i for i, p in enumerate(self.processors) if event in p.events]


@pytest.fixture
def time():
    return Time()


@pytest.fixture
def machine(time):
    return Machine(time, 4)


@pytest.fixture
def lapic(time):
    return Machine(time, 1).lapics[0]


@pytest.fixture
def machine_of(time):
    return lambda count: Machine(time, count)
