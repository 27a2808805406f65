import pytest

from undervisor.devices.pic import Pic


class Pair:
    """The two controllers, initialized as kernels do: vectors 0x20 and 0x28, all unmasked."""

    def __init__(self, icw4=0x01):
        self.levels = []
        self.pic = Pic(self.levels.append)
        for controller, base, wiring in (
            (self.pic.master, 0x20, 4),
            (self.pic.slave, 0x28, 2),
        ):
            controller.write(0, 1, 0x11)
            for value in (base, wiring, icw4, 0):
                controller.write(1, 1, value)

    @property
    def asks(self):
        return bool(self.levels) and self.levels[-1]

    def pulse(self, irq):
        self.pic.set_irq(irq, False)
        self.pic.set_irq(irq, True)


@pytest.fixture
def pair():
    return Pair()


@pytest.mark.parametrize("irq", [irq for irq in range(16) if irq != 2])
def test_each_irq_has_its_vector(pair, irq):
    pair.pulse(irq)
    assert pair.asks
    assert pair.pic.peek() == 0x20 + irq
    assert pair.pic.acknowledge() == 0x20 + irq
    assert not pair.asks


def test_the_lower_irq_comes_first_and_the_slave_in_place_of_irq_2(pair):
    for irq in (3, 8, 15, 1):
        pair.pulse(irq)
    order = []
    while pair.asks:
        order.append(pair.pic.acknowledge())
        pair.pic.slave.write(0, 1, 0x20)
        pair.pic.master.write(0, 1, 0x20)
    assert order == [0x21, 0x28, 0x2F, 0x23]


def test_an_irq_in_service_holds_lower_ones_until_its_eoi(pair):
    pair.pulse(1)
    pair.pic.acknowledge()
    pair.pulse(4)
    assert not pair.asks
    pair.pulse(0)
    assert pair.asks
    assert pair.pic.acknowledge() == 0x20
    pair.pic.master.write(0, 1, 0x20)
    assert not pair.asks
    pair.pic.master.write(0, 1, 0x20)
    assert pair.pic.acknowledge() == 0x24


def test_a_masked_irq_waits(pair):
    pair.pic.master.write(1, 1, 0x10)
    pair.pulse(4)
    assert not pair.asks
    assert pair.pic.master.read(0, 1) == 0x10
    pair.pic.master.write(1, 1, 0x00)
    assert pair.asks


def test_a_request_that_vanished_is_spurious(pair):
    assert pair.pic.acknowledge() == 0x27
    assert pair.pic.master.in_service == 0


def test_automatic_eoi_leaves_nothing_in_service():
    pair = Pair(icw4=0x03)
    pair.pulse(4)
    assert pair.pic.acknowledge() == 0x24
    assert pair.pic.master.in_service == 0
    pair.pulse(4)
    assert pair.pic.acknowledge() == 0x24


def test_the_slave_asks_again_for_its_next_irq():
    pair = Pair(icw4=0x03)
    pair.pulse(9)
    pair.pulse(12)
    assert [pair.pic.acknowledge(), pair.pic.acknowledge()] == [0x29, 0x2C]


def test_a_specific_eoi_ends_that_irq(pair):
    for irq in (4, 1):
        pair.pulse(irq)
        pair.pic.acknowledge()
    pair.pic.master.write(0, 1, 0x64)
    pair.pic.master.write(0, 1, 0x0B)
    assert pair.pic.master.read(0, 1) == 0x02


def test_rotation_makes_the_ended_irq_the_lowest(pair):
    pair.pulse(3)
    pair.pic.acknowledge()
    pair.pic.master.write(0, 1, 0xA0)
    pair.pulse(3)
    pair.pulse(4)
    assert pair.pic.acknowledge() == 0x24


def test_special_mask_mode_lets_lower_irqs_through_a_masked_one_in_service(pair):
    pair.pulse(1)
    pair.pic.acknowledge()
    pair.pulse(4)
    assert not pair.asks
    pair.pic.master.write(1, 1, 0x02)
    pair.pic.master.write(0, 1, 0x68)
    assert pair.pic.acknowledge() == 0x24


def test_polling_acknowledges(pair):
    pair.pic.master.write(0, 1, 0x0C)
    assert not pair.pic.master.read(0, 1) & 0x80
    pair.pulse(5)
    pair.pic.master.write(0, 1, 0x0C)
    assert pair.pic.master.read(0, 1) == 0x85
    assert not pair.asks


def test_a_level_triggered_irq_asks_until_the_line_falls(pair):
    pair.pic.write_elcr(1, 1, 0x08)
    assert pair.pic.read_elcr(1, 1) == 0x08
    pair.pic.set_irq(11, True)
    assert pair.pic.acknowledge() == 0x2B
    pair.pic.slave.write(0, 1, 0x20)
    pair.pic.master.write(0, 1, 0x20)
    assert pair.pic.peek() == 0x2B
    pair.pic.set_irq(11, False)
    assert not pair.asks


def test_the_timer_keyboard_cascade_and_clock_cannot_be_level_triggered(pair):
    pair.pic.write_elcr(0, 1, 0xFF)
    pair.pic.write_elcr(1, 1, 0xFF)
    assert (pair.pic.read_elcr(0, 1), pair.pic.read_elcr(1, 1)) == (0xF8, 0xDE)


def test_firmware_leaves_the_bios_vectors_and_the_timer_unmasked():
    pic = Pic(lambda level: None)
    pic.set_up_by_firmware()
    pic.set_irq(0, True)
    assert pic.peek() == 0x08
    assert (pic.master.read(1, 1), pic.slave.read(1, 1)) == (0xB8, 0x8E)


def test_initialization_without_icw4_ends_after_icw3():
    pic = Pic(lambda level: None)
    pic.master.write(0, 1, 0x10)
    for value in (0x40, 0x04, 0xFE):
        pic.master.write(1, 1, value)
    assert pic.master.read(1, 1) == 0xFE
    pic.set_irq(0, True)
    assert pic.acknowledge() == 0x40
