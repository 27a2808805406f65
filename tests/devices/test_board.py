import pytest

from undervisor.devices.board import (
    FastA20,
    Keyboard,
    Pci,
    Power,
    ResetControl,
    Vga,
    VideoMemory,
)
from undervisor.devices.ends import EndOfRun, EndReason

RESET, POWER_OFF = EndOfRun(EndReason.RESET), EndOfRun(EndReason.POWER_OFF)


@pytest.fixture
def ends():
    return []


def test_a20_is_on_and_only_a_rise_of_bit_0_resets(ends):
    port = FastA20(ends.append)
    port.write(0, 1, 0x00)
    assert port.read(0, 1) == 0x02
    assert ends == []
    port.write(0, 1, 0x03)
    assert ends == [RESET]


@pytest.mark.parametrize(("value", "resets"), [(0x02, False), (0x04, True), (0x06, True), (0xE, 1)])
def test_reset_control_resets_with_bit_2(ends, value, resets):
    ResetControl(ends.append).write(0, 1, value)
    assert ends == [RESET] * resets


def test_the_keyboard_controller_resets_with_a_pulse_or_its_output_port(ends):
    keyboard = Keyboard(ends.append)
    keyboard.write_command(0, 1, 0xFF)  # pulses nothing
    keyboard.write_command(0, 1, 0xD1)
    keyboard.write_data(0, 1, 0x03)
    assert ends == []
    keyboard.write_command(0, 1, 0xFE)
    assert ends == [RESET]
    keyboard.write_command(0, 1, 0xD1)
    keyboard.write_data(0, 1, 0x02)
    assert ends == [RESET] * 2


def test_the_keyboard_controller_tests_itself(ends):
    keyboard = Keyboard(ends.append)
    assert keyboard.read_status(0, 1) & 3 == 0
    keyboard.write_command(0, 1, 0xAA)
    assert keyboard.read_status(0, 1) & 1
    assert keyboard.read_data(0, 1) == 0x55
    assert not keyboard.read_status(0, 1) & 1


def test_the_keyboard_controllers_command_byte_is_kept(ends):
    keyboard = Keyboard(ends.append)
    keyboard.write_command(0, 1, 0x60)
    keyboard.write_data(0, 1, 0x47)
    keyboard.write_command(0, 1, 0x20)
    assert keyboard.read_data(0, 1) == 0x47


def test_a_keyboard_reset_is_acknowledged_and_answers_stay_bounded(ends):
    keyboard = Keyboard(ends.append)
    keyboard.write_data(0, 1, 0xFF)
    assert [keyboard.read_data(0, 1) for _ in range(3)] == [0xFA, 0xAA, 0]
    for _ in range(1000):
        keyboard.write_data(0, 1, 0xF4)
    assert len(keyboard._answers) <= 16


def address(bus, device, function, register):
    return 1 << 31 | bus << 16 | device << 11 | function << 8 | register


def test_a_pci_scan_finds_the_host_bridge_and_nothing_else():
    pci = Pci()
    found = {}
    for bus in range(2):
        for device in range(32):
            for function in range(8):
                pci.write_address(0, 4, address(bus, device, function, 0))
                if (ids := pci.read_data(0, 4)) != 0xFFFFFFFF:
                    found[bus, device, function] = ids
    assert found == {(0, 0, 0): 0x12378086}


def test_pci_registers_are_read_in_parts():
    pci = Pci()
    pci.write_address(0, 4, address(0, 0, 0, 0x08))
    assert (pci.read_data(2, 2), pci.read_data(3, 1)) == (0x0600, 0x06)
    pci.write_address(0, 4, address(0, 0, 0, 0x0C))
    assert pci.read_data(2, 1) == 0x00  # one function, plain header
    assert pci.read_address(0, 4) == address(0, 0, 0, 0x0C)


def test_pci_data_without_the_enable_bit_is_absent():
    pci = Pci()
    pci.write_address(0, 4, 0)
    assert pci.read_data(0, 4) == 0xFFFFFFFF


def test_sleep_enable_with_the_type_of_s5_powers_off(time, ends):
    power = Power(time.clock, ends.append)
    power.write(4, 2, 0x1C00)
    power.write(4, 2, 0x3C00)
    assert ends == []
    power.write(4, 2, 0x2000)
    assert ends == [POWER_OFF]
    power.write(5, 1, 0x20)
    assert ends == [POWER_OFF] * 2


def test_the_machine_is_always_in_acpi_mode(time, ends):
    power = Power(time.clock, ends.append)
    power.write(4, 2, 0)
    assert power.read(4, 2) == 0x0001


def test_event_enables_are_kept_and_no_status_is_set(time, ends):
    power = Power(time.clock, ends.append)
    power.write(2, 2, 0x0120)
    power.write(0, 2, 0xFFFF)
    assert (power.read(0, 2), power.read(2, 2), power.read(0, 4)) == (0, 0x0120, 0x01200000)


def test_the_pm_timer_counts_24_bits_at_its_frequency(time, ends):
    power = Power(time.clock, ends.append)
    time.move(1_000_000_000)
    assert power.read(8, 4) == 3_579_545
    time.move(4_000_000_000)
    assert power.read(8, 4) == 5 * 3_579_545 & 0xFFFFFF


def test_waiting_for_a_retrace_ends():
    vga = Vga()
    seen = {vga.read(0x2A, 1) & 0x08 for _ in range(2)}
    assert seen == {0, 8}


def test_video_memory_keeps_text_and_ends_at_its_end():
    memory = VideoMemory()
    memory.write(0x18000, 2, 0x0741)
    assert (memory.read(0x18000, 1), memory.read(0x18000, 4)) == (0x41, 0x0741)
    memory.write(0x1FFFE, 4, 0x44332211)
    assert memory.read(0x1FFFE, 4) == 0xFFFF2211
