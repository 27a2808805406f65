import pytest

from undervisor.devices.interrupts import InterruptBus
from undervisor.devices.lapic import Lapic
from undervisor.devices.lapic_layout import Reg
from undervisor.devices.lapic_timer import divisor

PERIODIC, TSC_DEADLINE, MASK = 1 << 17, 2 << 17, 1 << 16


@pytest.fixture
def start(machine, time):
    """Program the timer of processor 0 as the manual's sequence does."""

    def program(lvt, count, divide=0xB):
        lapic = machine.lapics[0]
        machine.store(lapic, Reg.LVT_TIMER, lvt)
        machine.store(lapic, Reg.DIVIDE, divide)
        machine.store(lapic, Reg.INITIAL_COUNT, count)
        return lapic

    return program


def count_of(lapic):
    return lapic.read(Reg.CURRENT_COUNT << 4, 4)


def take(lapic):
    vector = lapic.acknowledge()
    lapic.write(Reg.EOI << 4, 4, 0)
    return vector


@pytest.mark.parametrize(
    ("code", "by"),
    [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)],
)
def test_divide_configuration_table(code, by, start, time):
    assert divisor(code) == by
    lapic = start(0x40, 1000, code)
    time.move(1000 * by - 1)
    assert lapic.pending() is None
    time.move(1)
    assert lapic.pending() == 0x40


def test_one_shot_counts_down_interrupts_once_and_stays_at_zero(start, time):
    lapic = start(0x40, 1000)
    assert count_of(lapic) == 1000
    time.move(400)
    assert count_of(lapic) == 600
    time.move(600)
    assert take(lapic) == 0x40
    assert count_of(lapic) == 0
    time.move(10_000)
    assert lapic.pending() is None


def test_periodic_starts_over(start, time):
    lapic = start(PERIODIC | 0x40, 50_000)
    for _ in range(3):
        time.move(50_000)
        assert take(lapic) == 0x40
    time.move(20_000)
    assert count_of(lapic) == 30_000


def test_periods_slept_through_are_one_interrupt_and_keep_the_phase(start, time):
    lapic = start(PERIODIC | 0x40, 50_000)
    time.jump(1_010_000)
    assert take(lapic) == 0x40
    assert lapic.pending() is None
    assert count_of(lapic) == 40_000


def test_the_shortest_period_leaves_the_guest_time(start, time):
    lapic = start(PERIODIC | 0x40, 1)
    time.move(1)
    assert take(lapic) == 0x40
    assert time.clock.next_deadline() >= time.ns + 1000
    assert 0 <= count_of(lapic) <= 1


def test_a_period_that_nobody_can_notice_leaves_no_deadline(start, time, machine):
    lapic = start(PERIODIC | 0x40, 50_000)
    time.move(50_000)
    assert time.clock.next_deadline() is None  # the vector waits: another would change nothing
    time.move(120_000)
    assert count_of(lapic) == 30_000
    assert take(lapic) == 0x40
    assert time.clock.next_deadline() == 200_000
    machine.store(lapic, Reg.LVT_TIMER, PERIODIC | MASK | 0x40)
    time.move(500_000)
    assert time.clock.next_deadline() is None
    machine.store(lapic, Reg.LVT_TIMER, PERIODIC | 0x40)
    assert time.clock.next_deadline() == 700_000


def test_a_resting_timer_that_becomes_one_shot_ends_with_its_period(start, time, machine):
    lapic = start(PERIODIC | 0x40, 50_000)
    time.move(60_000)
    machine.store(lapic, Reg.LVT_TIMER, 0x40)
    assert count_of(lapic) == 40_000
    take(lapic)
    time.move(40_000)
    assert (take(lapic), count_of(lapic)) == (0x40, 0)
    assert time.clock.next_deadline() is None


def test_a_zero_count_stops(start, time, machine):
    lapic = start(0x40, 1000)
    machine.store(lapic, Reg.INITIAL_COUNT, 0)
    assert count_of(lapic) == 0
    time.move(5000)
    assert lapic.pending() is None


def test_a_masked_timer_counts_but_does_not_interrupt(start, time):
    lapic = start(MASK | 0x40, 1000)
    time.move(400)
    assert count_of(lapic) == 600
    time.move(600)
    assert lapic.pending() is None


def test_changing_between_one_shot_and_periodic_keeps_the_count(start, time, machine):
    lapic = start(PERIODIC | 0x40, 50_000)
    time.move(30_000)
    machine.store(lapic, Reg.LVT_TIMER, 0x40)
    assert count_of(lapic) == 20_000
    time.move(20_000)
    assert take(lapic) == 0x40
    assert count_of(lapic) == 0
    machine.store(lapic, Reg.LVT_TIMER, PERIODIC | 0x40)
    assert count_of(lapic) == 0


def test_a_new_divisor_applies_to_what_is_left(start, time, machine):
    lapic = start(0x40, 1000)
    time.move(400)
    machine.store(lapic, Reg.DIVIDE, 0)
    assert count_of(lapic) == 600
    time.move(600)
    assert count_of(lapic) == 300


# TSC deadline


def test_the_deadline_interrupts_when_the_tsc_reaches_it_and_reads_zero_after(start, time):
    lapic = start(TSC_DEADLINE | 0x40, 0)
    lapic.timer.write_tsc_deadline(5000)
    assert lapic.timer.tsc_deadline == 5000
    time.move(4999)
    assert lapic.pending() is None
    time.move(1)
    assert lapic.pending() == 0x40
    assert lapic.timer.tsc_deadline == 0


def test_a_deadline_in_the_past_interrupts_at_once(start, time):
    time.move(100)
    lapic = start(TSC_DEADLINE | 0x40, 0)
    lapic.timer.write_tsc_deadline(99)
    assert lapic.pending() == 0x40


def test_a_zero_deadline_disarms(start, time):
    lapic = start(TSC_DEADLINE | 0x40, 0)
    lapic.timer.write_tsc_deadline(5000)
    lapic.timer.write_tsc_deadline(0)
    time.move(10_000)
    assert lapic.pending() is None


def test_a_deadline_is_ignored_outside_its_mode_and_a_count_in_it(start, time):
    lapic = start(0x40, 0)
    lapic.timer.write_tsc_deadline(5000)
    assert lapic.timer.tsc_deadline == 0
    lapic = start(TSC_DEADLINE | 0x40, 1000)
    assert (count_of(lapic), lapic.read(Reg.INITIAL_COUNT << 4, 4)) == (0, 0)
    assert time.clock.next_deadline() is None


@pytest.mark.parametrize(("before", "after"), [(TSC_DEADLINE, 0), (TSC_DEADLINE, PERIODIC)])
def test_leaving_deadline_mode_disarms(start, time, machine, before, after):
    lapic = start(before | 0x40, 0)
    lapic.timer.write_tsc_deadline(5000)
    machine.store(lapic, Reg.LVT_TIMER, after | 0x40)
    assert lapic.timer.tsc_deadline == 0
    assert time.clock.next_deadline() is None


def test_entering_deadline_mode_stops_a_count(start, time, machine):
    lapic = start(0x40, 1000)
    machine.store(lapic, Reg.LVT_TIMER, TSC_DEADLINE | 0x40)
    assert time.clock.next_deadline() is None
    assert count_of(lapic) == 0


def test_the_deadline_is_compared_with_the_processors_own_tsc(start, time):
    time.move(1000)
    lapic = start(TSC_DEADLINE | 0x40, 0)
    lapic.timer.tsc_offset = 1_000_000
    lapic.timer.write_tsc_deadline(1_003_000)
    assert time.clock.next_deadline() == 3000
    lapic.timer.tsc_offset = 1_001_000  # the guest wrote its TSC
    assert time.clock.next_deadline() == 2000
    lapic.timer.tsc_offset = -500
    assert time.clock.next_deadline() == 1_003_500


def test_without_the_feature_the_mode_cannot_be_set(time):
    lapic = Lapic(0, time.clock, InterruptBus(), None, tsc_deadline=False)
    lapic.write(Reg.SVR << 4, 4, 0x1FF)
    lapic.write(Reg.LVT_TIMER << 4, 4, TSC_DEADLINE | 0x40)
    assert lapic.read(Reg.LVT_TIMER << 4, 4) == 0x40
    lapic.timer.write_tsc_deadline(5)
    assert lapic.timer.tsc_deadline == 0
