import pytest

from undervisor.devices.bus import MmioBus, PortBus


class Recorder:
    def __init__(self):
        self.log = []

    def read(self, offset, size):
        self.log.append(("read", offset, size))
        return 0x10 + offset

    def write(self, offset, size, value):
        self.log.append(("write", offset, size, value))


@pytest.mark.parametrize(("size", "ones"), [(1, 0xFF), (2, 0xFFFF), (4, 0xFFFFFFFF)])
def test_an_absent_port_reads_all_ones_and_ignores_writes(size, ones):
    bus = PortBus()
    bus.write(0x1234, size, 0)
    assert bus.read(0x1234, size) == ones
    assert bus.read(0xFFFF, size) == ones


def test_a_device_sees_offsets_and_sizes():
    bus, device = PortBus(), Recorder()
    bus.register(0x100, 8, device)
    assert bus.read(0x102, 4) == 0x12
    bus.write(0x107, 2, 0xBEEF)
    assert device.log == [("read", 2, 4), ("write", 7, 2, 0xBEEF)]


def test_a_wide_access_to_a_byte_device_is_split_over_its_neighbours_too():
    bus, one, other = PortBus(), Recorder(), Recorder()
    bus.register(0x10, 2, one, byte_only=True)
    bus.register(0x12, 1, other, byte_only=True)
    assert bus.read(0x10, 4) == 0xFF101110
    bus.write(0x11, 2, 0xABCD)
    assert one.log[-1] == ("write", 1, 1, 0xCD)
    assert other.log[-1] == ("write", 0, 1, 0xAB)


def test_two_devices_cannot_share_a_port_or_an_address():
    ports, mmio = PortBus(), MmioBus()
    ports.register(0x10, 4, Recorder())
    mmio.register(0x1000, 0x1000, Recorder())
    with pytest.raises(ValueError, match="taken"):
        ports.register(0x13, 1, Recorder())
    with pytest.raises(ValueError, match="taken"):
        ports.register(0xFFFF, 2, Recorder())
    with pytest.raises(ValueError, match="taken"):
        mmio.register(0x1FFF, 1, Recorder())


def test_mmio_goes_to_the_device_that_covers_it_and_reads_ones_elsewhere():
    bus, device = MmioBus(), Recorder()
    bus.register(0x1000, 0x100, device)
    assert bus.covers(0x10FF)
    assert not bus.covers(0x1100)
    assert bus.read(0x1020, 8) == 0x30
    bus.write(0x1000, 4, 7)
    bus.write(0x2000, 4, 7)
    assert bus.read(0x2000, 8) == (1 << 64) - 1
    assert device.log == [("read", 0x20, 8), ("write", 0, 4, 7)]
