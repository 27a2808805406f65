import pytest

from undervisor.devices.ioapic import IoApic
from undervisor.devices.lapic_layout import DeliveryMode, Reg

LEVEL, MASK, REMOTE_IRR, LOGICAL = 1 << 15, 1 << 16, 1 << 14, 1 << 11
SELECT, WINDOW, EOI = 0x00, 0x10, 0x40


@pytest.fixture
def ioapic(machine):
    return IoApic(machine.bus, 4)


def put(ioapic, register, value):
    ioapic.write(SELECT, 4, register)
    ioapic.write(WINDOW, 4, value)


def get(ioapic, register):
    ioapic.write(SELECT, 4, register)
    return ioapic.read(WINDOW, 4)


def route(ioapic, pin, low, destination=0):
    put(ioapic, 0x11 + 2 * pin, destination << 24)
    put(ioapic, 0x10 + 2 * pin, low)


def end(machine, processor=0):
    machine.store(machine.lapics[processor], Reg.EOI, 0)


def test_it_has_24_masked_pins_and_an_eoi_register(ioapic):
    assert get(ioapic, 1) == 0x00170020
    assert get(ioapic, 0) == 4 << 24
    assert [get(ioapic, 0x10 + 2 * pin) for pin in range(24)] == [MASK] * 24


def test_an_edge_interrupts_once_per_rise(ioapic, machine):
    route(ioapic, 4, 0x34, destination=2)
    ioapic.set_pin(4, True)
    ioapic.set_pin(4, True)
    assert machine.lapics[2].acknowledge() == 0x34
    end(machine, 2)
    assert machine.lapics[2].pending() is None
    ioapic.set_pin(4, False)
    ioapic.set_pin(4, True)
    assert machine.lapics[2].pending() == 0x34


def test_an_edge_on_a_masked_pin_is_lost(ioapic, machine):
    route(ioapic, 4, MASK | 0x34)
    ioapic.set_pin(4, True)
    route(ioapic, 4, 0x34)
    assert machine.lapics[0].pending() is None


def test_a_level_interrupts_again_after_eoi_while_it_is_high(ioapic, machine):
    route(ioapic, 9, LEVEL | 0x39)
    ioapic.set_pin(9, True)
    assert get(ioapic, 0x22) == LEVEL | REMOTE_IRR | 0x39
    lapic = machine.lapics[0]
    assert lapic.acknowledge() == 0x39
    assert lapic.pending() is None
    end(machine)
    assert lapic.acknowledge() == 0x39
    ioapic.set_pin(9, False)
    end(machine)
    assert lapic.pending() is None
    assert get(ioapic, 0x22) == LEVEL | 0x39


def test_a_level_that_is_high_interrupts_when_it_is_unmasked(ioapic, machine):
    route(ioapic, 9, LEVEL | MASK | 0x39)
    ioapic.set_pin(9, True)
    assert machine.lapics[0].pending() is None
    route(ioapic, 9, LEVEL | 0x39)
    assert machine.lapics[0].pending() == 0x39


def test_an_eoi_for_another_vector_leaves_remote_irr(ioapic, machine):
    route(ioapic, 9, LEVEL | 0x39)
    ioapic.set_pin(9, True)
    ioapic.write(EOI, 4, 0x38)
    assert get(ioapic, 0x22) & REMOTE_IRR
    ioapic.set_pin(9, False)
    ioapic.write(EOI, 4, 0x39)
    assert not get(ioapic, 0x22) & REMOTE_IRR


def test_switching_to_edge_clears_remote_irr_and_software_cannot_set_it(ioapic):
    route(ioapic, 9, LEVEL | REMOTE_IRR | 0x39)
    assert not get(ioapic, 0x22) & REMOTE_IRR
    ioapic.set_pin(9, True)
    assert get(ioapic, 0x22) & REMOTE_IRR
    route(ioapic, 9, MASK | 0x39)
    assert not get(ioapic, 0x22) & REMOTE_IRR


def test_a_level_nobody_took_is_sent_again_later(ioapic, machine):
    machine.store(machine.lapics[0], Reg.SVR, 0xFF)
    route(ioapic, 9, LEVEL | 0x39)
    ioapic.set_pin(9, True)
    assert not get(ioapic, 0x22) & REMOTE_IRR
    machine.store(machine.lapics[0], Reg.SVR, 0x1FF)
    route(ioapic, 9, LEVEL | 0x39)
    assert machine.lapics[0].pending() == 0x39


def test_logical_and_lowest_priority_delivery(ioapic, machine):
    for i, lapic in enumerate(machine.lapics):
        machine.store(lapic, Reg.LDR, 1 << (24 + i))
    machine.lapics[1].cr8 = 4
    route(ioapic, 4, LOGICAL | DeliveryMode.LOWEST_PRIORITY << 8 | 0x34, destination=0x06)
    ioapic.set_pin(4, True)
    assert machine.waiting(0x34) == [2]


def test_an_nmi_pin_reaches_the_processor(ioapic, machine):
    route(ioapic, 3, DeliveryMode.NMI << 8, destination=1)
    ioapic.set_pin(3, True)
    assert machine.seen("nmi") == [1]


def test_registers_that_do_not_exist_read_zero_and_ignore_writes(ioapic):
    for register in (3, 0xF, 0x40, 0xFF):
        put(ioapic, register, 0xFFFFFFFF)
        assert get(ioapic, register) == 0
    assert ioapic.read(0x20, 4) == 0


def test_a_level_that_shares_its_vector_with_a_waiting_edge_still_gets_its_eoi(ioapic, machine):
    machine.store(machine.lapics[0], Reg.ICR, 1 << 18 | 0x39)
    route(ioapic, 9, LEVEL | 0x39)
    ioapic.set_pin(9, True)
    machine.lapics[0].acknowledge()
    ioapic.set_pin(9, False)
    end(machine)
    assert not get(ioapic, 0x22) & REMOTE_IRR
