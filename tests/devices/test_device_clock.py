from undervisor.devices.clock import STALE_ENTRIES_KEPT


def test_timers_run_by_deadline_then_by_arming(time):
    ran = []
    for name, deadline in (("c", 30), ("a", 10), ("b1", 20), ("b2", 20)):
        time.clock.at(deadline, lambda name=name: ran.append(name))
    assert time.clock.next_deadline() == 10
    time.jump(25)
    assert ran == ["a", "b1", "b2"]
    assert time.clock.next_deadline() == 30


def test_a_cancelled_timer_never_runs(time):
    ran = []
    timer = time.clock.at(10, lambda: ran.append(1))
    timer.cancel()
    timer.cancel()
    assert time.clock.next_deadline() is None
    time.jump(20)
    assert ran == []


def test_arming_again_replaces_the_deadline(time):
    ran = []
    timer = time.clock.at(10, lambda: ran.append(time.ns))
    timer.arm(50)
    assert (time.clock.next_deadline(), timer.deadline) == (50, 50)
    time.move(100)
    assert ran == [50]
    assert timer.deadline is None


def test_a_timer_armed_while_running_due_ones_runs_when_it_is_due(time):
    ran = []
    time.clock.at(10, lambda: time.clock.at(15, lambda: ran.append("inner")))
    time.jump(20)
    assert ran == ["inner"]


def test_a_million_replaced_deadlines_do_not_pile_up(time):
    timer = time.clock.timer(lambda: None)
    for deadline in range(10_000):
        timer.arm(1_000_000_000 + deadline)
    assert len(time.clock._heap) <= STALE_ENTRIES_KEPT + 2
    assert time.clock.next_deadline() == 1_000_009_999
