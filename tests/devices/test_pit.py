import pytest

from undervisor.devices.pit import FREQUENCY, NS, Pit, counter, next_rise, output

CONTROL = 3


@pytest.fixture
def ticks(time):
    """When channel 0 interrupted, in clock pulses."""
    seen = []

    def tick():
        seen.append(time.ns * FREQUENCY // NS)
        return pit.matters

    pit = Pit(time.clock, tick)
    pit.seen, pit.matters = seen, True
    return pit


def put(pit, *pairs):
    for offset, value in pairs:
        pit.write(offset, 1, value)


def program(pit, channel, mode, count):
    put(
        pit,
        (CONTROL, channel << 6 | 0x30 | mode << 1),
        (channel, count & 0xFF),
        (channel, count >> 8),
    )


def pulses(count):
    """The time of `count` clock pulses, rounded up to a nanosecond."""
    return -(-count * NS // FREQUENCY)


def read(pit, channel):
    low = pit.read(channel, 1)
    return low | pit.read(channel, 1) << 8


# OUT by mode: pulses since the start at which it is (low, high), for a count of 10.
MODES = {
    0: ([0, 9], [10, 11, 1000]),
    1: ([0, 9], [10, 1000]),
    2: ([9, 19, 29], [0, 8, 10, 18]),
    3: ([5, 9, 15, 19], [0, 4, 10, 14]),
    4: ([10], [0, 9, 11, 1000]),
    5: ([10], [0, 9, 11, 1000]),
}


@pytest.mark.parametrize("mode", MODES)
def test_output_follows_the_mode_definitions(mode):
    low, high = MODES[mode]
    assert [output(mode, 10, at) for at in low] == [False] * len(low)
    assert [output(mode, 10, at) for at in high] == [True] * len(high)


@pytest.mark.parametrize("mode", MODES)
def test_the_next_rise_is_where_output_rises(mode):
    rises = [at for at in range(1, 40) if output(mode, 10, at) and not output(mode, 10, at - 1)]
    for at in range(39):
        later = [rise for rise in rises if rise > at]
        if later:
            assert next_rise(mode, 10, at) == later[0]
        elif mode not in (2, 3):
            assert next_rise(mode, 10, at) is None


@pytest.mark.parametrize(
    ("mode", "values"),
    [
        (0, [10, 9, 0, 0xFFFF]),
        (2, [10, 9, 10, 9]),
        (3, [10, 8, 10, 8]),
    ],
)
def test_the_counter_counts_down(mode, values):
    assert [counter(mode, 10, at) for at in (0, 1, 10, 11)] == values


def test_an_odd_square_wave_is_high_one_pulse_longer():
    wave = [output(3, 5, at) for at in range(10)]
    assert wave == [True, True, True, False, False] * 2


def test_mode_0_interrupts_once(ticks, time):
    program(ticks, 0, 0, 1000)
    time.move(pulses(5000))
    assert ticks.seen == [1000]


@pytest.mark.parametrize("mode", [2, 3])
def test_modes_2_and_3_interrupt_every_period(ticks, time, mode):
    program(ticks, 0, mode, 1000)
    time.move(pulses(5000))
    assert ticks.seen == [1000, 2000, 3000, 4000, 5000]


def test_mode_4_interrupts_once_a_pulse_after_the_count(ticks, time):
    program(ticks, 0, 4, 1000)
    time.move(pulses(5000))
    assert ticks.seen == [1001]


def test_a_count_of_zero_is_65536(ticks, time):
    program(ticks, 0, 2, 0)
    time.move(pulses(65536 * 2))
    assert ticks.seen == [65536, 131072]


def test_periods_slept_through_are_one_interrupt(ticks, time):
    program(ticks, 0, 2, 1000)
    time.jump(pulses(10_500))
    assert len(ticks.seen) == 1
    assert time.clock.next_deadline() == pulses(11_000)


def test_a_new_control_word_stops_the_interrupts(ticks, time):
    program(ticks, 0, 2, 1000)
    put(ticks, (CONTROL, 0x30))
    time.move(pulses(5000))
    assert ticks.seen == []


def test_a_latched_count_stays_while_the_counter_goes_on(ticks, time):
    program(ticks, 0, 2, 1000)
    time.move(pulses(100))
    put(ticks, (CONTROL, 0x00))
    time.move(pulses(200))
    assert read(ticks, 0) == 900
    assert read(ticks, 0) == 700


def test_low_and_high_byte_access(ticks, time):
    put(ticks, (CONTROL, 0x14), (0, 0x80))  # low byte, mode 2
    assert ticks.read(0, 1) == 0x80
    assert ticks.read(0, 1) == 0x80
    put(ticks, (CONTROL, 0x24), (0, 0x12))  # high byte
    assert ticks.read(0, 1) == 0x12
    time.move(pulses(0x1200))
    assert ticks.seen[-1] >= 0x1200


def test_read_back_gives_status_then_count(ticks, time):
    put(ticks, (CONTROL, 0x34))
    put(ticks, (CONTROL, 0xE2))  # status of channel 0
    assert ticks.read(0, 1) == 0x80 | 0x40 | 0x30 | 0x04  # OUT, null count, both bytes, mode 2
    put(ticks, (0, 0xE8), (0, 0x03))
    time.move(pulses(10))
    put(ticks, (CONTROL, 0xC2))  # status and count
    assert ticks.read(0, 1) == 0xB4
    assert read(ticks, 0) == 990


def test_bcd_counts_in_decimal(ticks, time):
    put(ticks, (CONTROL, 0x35), (0, 0x00), (0, 0x10))
    time.move(pulses(1))
    assert read(ticks, 0) == 0x0999
    time.move(pulses(2500))
    assert len(ticks.seen) == 2


def test_the_gate_of_channel_2_starts_it_and_port_61_shows_its_output(ticks, time):
    program(ticks, 2, 0, 1000)
    time.move(pulses(2000))
    assert not ticks.read_speaker(0, 1) & 0x20
    assert read(ticks, 2) == 1000
    ticks.write_speaker(0, 1, 0x01)
    time.move(pulses(999))
    assert not ticks.read_speaker(0, 1) & 0x20
    time.move(pulses(2))
    assert ticks.read_speaker(0, 1) & 0x21 == 0x21


def test_a_count_after_the_gate_opened_starts_at_once(ticks, time):
    ticks.write_speaker(0, 1, 0x01)
    program(ticks, 2, 0, 1000)
    time.move(pulses(1000))
    assert ticks.read_speaker(0, 1) & 0x20


def test_a_closed_gate_holds_the_count(ticks, time):
    ticks.write_speaker(0, 1, 0x01)
    program(ticks, 2, 0, 1000)
    time.move(pulses(400))
    ticks.write_speaker(0, 1, 0x00)
    time.move(pulses(400))
    assert read(ticks, 2) == 600
    ticks.write_speaker(0, 1, 0x01)
    time.move(pulses(100))
    assert read(ticks, 2) in (500, 501)


@pytest.mark.parametrize(("mode", "after"), [(1, True), (5, False)])
def test_triggered_modes_wait_for_the_gate_and_restart_with_it(ticks, time, mode, after):
    program(ticks, 2, mode, 1000)
    time.move(pulses(5000))
    assert ticks.channels[2].output()
    ticks.write_speaker(0, 1, 0x01)
    assert ticks.channels[2].output() is (mode == 5)
    time.move(pulses(900))
    ticks.write_speaker(0, 1, 0x00)
    ticks.write_speaker(0, 1, 0x01)
    time.move(pulses(999))
    assert ticks.channels[2].output() is (mode == 5)
    time.ns += 839
    assert ticks.channels[2].output() is after


def test_the_refresh_bit_toggles(ticks, time):
    seen = set()
    for _ in range(4):
        seen.add(ticks.read_speaker(0, 1) & 0x10)
        time.move(15_085)
    assert seen == {0, 0x10}


def test_firmware_leaves_the_timer_at_18_hertz(ticks, time):
    ticks.set_up_by_firmware()
    time.move(NS)
    assert len(ticks.seen) == 18


def test_ticks_that_do_not_matter_leave_no_deadline_and_keep_the_phase(ticks, time):
    ticks.matters = False
    program(ticks, 0, 2, 1000)
    time.move(pulses(5000))
    assert ticks.seen == [1000]
    assert time.clock.next_deadline() is None
    assert read(ticks, 0) == 1000
    ticks.matters = True
    ticks.channels[0].resume()
    time.move(pulses(2000))
    assert ticks.seen == [1000, 6000, 7000]
