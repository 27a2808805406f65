import pytest

from undervisor.devices.rtc import NS, Rtc, periodic_ns

A, B, C, D = 0x0A, 0x0B, 0x0C, 0x0D
SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY = 0, 2, 4, 6, 7, 8, 9, 0x32
GIB = 1 << 30


class Chip:
    def __init__(self, time, ram_size=256 << 20, cpu_count=4):
        self.levels = []
        self.rtc = Rtc(time.clock, self.levels.append, ram_size, cpu_count)

    def get(self, register):
        self.rtc.write(0, 1, register)
        return self.rtc.read(1, 1)

    def put(self, register, value):
        self.rtc.write(0, 1, register)
        self.rtc.write(1, 1, value)

    def wide(self, register, count):
        return sum(self.get(register + at) << (8 * at) for at in range(count))


@pytest.fixture
def chip(time):
    return Chip(time)


def test_the_clock_starts_at_a_fixed_date_in_bcd(chip):
    date = [chip.get(r) for r in (CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS)]
    assert date == [0x20, 0x26, 0x01, 0x01, 0x05, 0x00, 0x00, 0x00]


def test_the_clock_runs_in_virtual_time(chip, time):
    time.move((23 * 3600 + 59 * 60 + 58) * NS)
    assert [chip.get(r) for r in (HOURS, MINUTES, SECONDS)] == [0x23, 0x59, 0x58]
    time.move(2 * NS)
    assert [chip.get(r) for r in (DAY, HOURS, MINUTES, SECONDS)] == [0x02, 0, 0, 0]


@pytest.mark.parametrize(
    ("control", "hour", "shown"),
    [(0x06, 13, 13), (0x02, 13, 0x13), (0x04, 13, 0x81), (0x00, 0, 0x12), (0x00, 12, 0x92)],
)
def test_hours_are_in_the_chosen_format(chip, time, control, hour, shown):
    time.move(hour * 3600 * NS)
    chip.put(B, control)
    assert chip.get(HOURS) == shown


def test_a_time_set_while_halted_counts_on(chip, time):
    chip.put(B, 0x82)
    date = {CENTURY: 0x19, YEAR: 0x99, MONTH: 0x12, DAY: 0x31, HOURS: 0x23, MINUTES: 0x59}
    for register, value in date.items():
        chip.put(register, value)
    chip.put(SECONDS, 0x59)
    time.move(5 * NS)
    assert chip.get(SECONDS) == 0x59
    chip.put(B, 0x02)
    time.move(NS)
    assert [chip.get(r) for r in (CENTURY, YEAR, MONTH, DAY, HOURS)] == [0x20, 0x00, 1, 1, 0]


def test_a_date_that_does_not_exist_changes_nothing(chip):
    chip.put(MONTH, 0x13)
    chip.put(DAY, 0x00)
    chip.put(HOURS, 0xFF)
    assert [chip.get(r) for r in (MONTH, DAY, HOURS)] == [1, 1, 0]


def test_an_update_is_announced_before_each_second(chip, time):
    assert chip.get(A) == 0x26
    time.move(NS - 100_000)
    assert chip.get(A) == 0xA6


def test_status_d_says_that_the_battery_is_good(chip):
    chip.put(D, 0)
    assert chip.get(D) == 0x80


def test_the_nmi_mask_in_the_index_changes_nothing(chip):
    assert chip.get(0x80 | D) == 0x80
    assert chip.rtc.read(0, 1) == 0xFF


@pytest.mark.parametrize(
    ("ram", "extended_kib", "above_16m", "above_4g"),
    [
        (8 << 20, 7 << 10, 0, 0),
        (64 << 20, 63 << 10, 48 * 16, 0),
        (256 << 20, 0xFFFF, 240 * 16, 0),
        (4 * GIB, 0xFFFF, (3 * GIB - (16 << 20)) >> 16, GIB >> 16),
    ],
)
def test_memory_sizes_are_as_firmware_stores_them(time, ram, extended_kib, above_16m, above_4g):
    chip = Chip(time, ram)
    assert chip.wide(0x15, 2) == 640
    assert chip.wide(0x17, 2) == chip.wide(0x30, 2) == extended_kib
    assert chip.wide(0x34, 2) == above_16m
    assert chip.wide(0x5B, 3) == above_4g


def test_the_processor_count_is_stored_less_one(time):
    assert Chip(time, cpu_count=8).get(0x5F) == 7


def test_other_cells_are_memory(chip):
    chip.put(0x0F, 0x0A)
    assert chip.get(0x0F) == 0x0A


@pytest.mark.parametrize(
    ("rate", "ns"), [(0, None), (1, 3_906_250), (2, 7_812_500), (6, 976_562), (15, 500_000_000)]
)
def test_periodic_rates(rate, ns):
    assert periodic_ns(rate) == ns


def test_periodic_interrupts_wait_for_register_c(chip, time):
    chip.put(B, 0x42)
    chip.get(C)
    chip.levels.clear()
    time.move(976_563)
    assert chip.levels[-1] is True
    assert chip.get(C) & 0xC0 == 0xC0
    assert chip.levels[-1] is False
    time.move(976_563)
    assert chip.levels[-1] is True


def test_update_ended_interrupts_each_second(chip, time):
    chip.put(B, 0x12)
    for _ in range(3):
        time.move(NS)
        assert chip.get(C) & 0x90 == 0x90


def test_an_alarm_interrupts_at_its_time_and_a_wildcard_at_any(chip, time):
    for register, value in ((1, 0x05), (3, 0xC0), (5, 0xFF)):
        chip.put(register, value)
    chip.put(B, 0x22)
    rang = []
    for second in range(1, 130):
        time.move(NS)
        if chip.get(C) & 0x20:
            rang.append(second)
    assert rang == [5, 65, 125]


def test_a_poll_of_register_c_sees_what_passed_without_interrupts(chip, time):
    chip.get(C)
    time.move(NS)
    assert chip.get(C) == 0x50
    assert chip.get(C) == 0x00
    assert True not in chip.levels


def test_an_interrupt_that_is_not_answered_leaves_no_deadline(chip, time):
    chip.put(B, 0x52)
    time.move(NS)
    assert time.clock.next_deadline() is None
    time.move(2 * NS)
    assert chip.get(C) == 0xD0
    assert time.clock.next_deadline() is not None
