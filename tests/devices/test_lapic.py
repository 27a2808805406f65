import pytest

from undervisor.arch.x86.events import GP0, GuestFault
from undervisor.devices.lapic_layout import DeliveryMode, Reg

LEVEL_ASSERT = 1 << 14
LOGICAL = 1 << 11
SELF, ALL, OTHERS = 1 << 18, 2 << 18, 3 << 18
BASE = 0xFEE00000
ENABLE, EXTD, BSP = 1 << 11, 1 << 10, 1 << 8


def mode(delivery):
    return delivery << 8


def send(machine, sender, low, destination=0):
    machine.store(machine.lapics[sender], Reg.ICR_HIGH, destination << 24)
    machine.store(machine.lapics[sender], Reg.ICR, low)


def refused(call, *args):
    with pytest.raises(GuestFault) as caught:
        call(*args)
    assert caught.value.fault == GP0


def to_x2apic(lapic):
    lapic.write_apic_base(lapic.apic_base | EXTD)


# priority


def test_the_highest_vector_is_delivered_first(machine):
    lapic = machine.lapics[0]
    for vector in (0x31, 0x80, 0x45):
        send(machine, 0, SELF | vector)
    assert [lapic.acknowledge() for _ in range(1)] == [0x80]
    assert lapic.pending() is None
    machine.store(lapic, Reg.EOI, 0)
    assert lapic.pending() == 0x45


def test_only_a_higher_class_interrupts_one_in_service(machine):
    lapic = machine.lapics[0]
    send(machine, 0, SELF | 0x50)
    lapic.acknowledge()
    send(machine, 0, SELF | 0x5F)
    assert lapic.pending() is None
    send(machine, 0, SELF | 0x60)
    assert lapic.pending() == 0x60


@pytest.mark.parametrize(
    ("tpr", "in_service", "ppr"),
    [
        (0x00, None, 0x00),
        (0x35, None, 0x35),
        (0x35, 0x41, 0x40),
        (0x45, 0x41, 0x45),
        (0x53, 0x41, 0x53),
    ],
)
def test_processor_priority_is_the_higher_class_of_task_and_service(machine, tpr, in_service, ppr):
    lapic = machine.lapics[0]
    if in_service:
        send(machine, 0, SELF | in_service)
        lapic.acknowledge()
    machine.store(lapic, Reg.TPR, tpr)
    assert machine.load(lapic, Reg.PPR) == ppr


def test_task_priority_holds_interrupts_of_its_class_and_below(machine):
    lapic = machine.lapics[0]
    send(machine, 0, SELF | 0x3F)
    lapic.cr8 = 3
    assert lapic.pending() is None
    assert lapic.tpr == 0x30
    machine.processors[0].events.clear()
    lapic.cr8 = 2
    assert lapic.pending() == 0x3F
    assert machine.processors[0].events == ["wake"]


def test_end_of_interrupt_clears_the_highest_in_service(machine):
    lapic = machine.lapics[0]
    for vector in (0x40, 0x90):
        send(machine, 0, SELF | vector)
        lapic.acknowledge()
    machine.store(lapic, Reg.EOI, 0)
    assert machine.load(lapic, Reg.ISR + 4) == 0
    assert machine.load(lapic, Reg.ISR + 2) == 1
    assert machine.load(lapic, Reg.PPR) == 0x40


def test_end_of_interrupt_without_one_in_service_does_nothing(machine):
    eois = []
    machine.bus.on_eoi.append(eois.append)
    machine.store(machine.lapics[0], Reg.EOI, 0)
    assert eois == []


def test_a_vector_waits_at_most_once_and_again_while_in_service(machine):
    lapic = machine.lapics[0]
    send(machine, 0, SELF | 0x41)
    send(machine, 0, SELF | 0x41)
    lapic.acknowledge()
    send(machine, 0, SELF | 0x41)
    assert lapic.pending() is None
    machine.store(lapic, Reg.EOI, 0)
    assert lapic.acknowledge() == 0x41
    machine.store(lapic, Reg.EOI, 0)
    assert lapic.pending() is None


def test_an_acknowledge_with_nothing_pending_gives_the_spurious_vector(lapic):
    assert lapic.acknowledge() == 0xFF


@pytest.mark.parametrize(("level", "told"), [(True, [0x41]), (False, [])])
def test_only_level_interrupts_broadcast_their_end(machine, level, told):
    eois = []
    machine.bus.on_eoi.append(eois.append)
    lapic = machine.lapics[0]
    lapic.accept(DeliveryMode.FIXED, 0x41, level)
    assert bool(machine.load(lapic, Reg.TMR + 2) & 2) is level
    lapic.acknowledge()
    machine.store(lapic, Reg.EOI, 0)
    assert eois == told


# destinations


@pytest.mark.parametrize(
    ("low", "destination", "reached"),
    [
        (0, 2, [2]),
        (0, 0xFF, [0, 1, 2, 3]),
        (0, 9, []),
        (SELF, 3, [1]),
        (ALL, 0, [0, 1, 2, 3]),
        (OTHERS, 0, [0, 2, 3]),
    ],
)
def test_physical_destinations_and_shorthands(machine, low, destination, reached):
    send(machine, 1, low | 0x77, destination)
    assert machine.waiting(0x77) == reached


@pytest.mark.parametrize(
    ("destination", "reached"), [(0x01, [0]), (0x0A, [1, 3]), (0xF0, []), (0xFF, [0, 1, 2, 3])]
)
def test_flat_logical_destinations_are_a_mask(machine, destination, reached):
    for i, lapic in enumerate(machine.lapics):
        machine.store(lapic, Reg.LDR, 1 << (24 + i))
    send(machine, 0, LOGICAL | 0x77, destination)
    assert machine.waiting(0x77) == reached


@pytest.mark.parametrize(
    ("destination", "reached"),
    [(0x01, [0]), (0x03, [0, 1]), (0x11, [2]), (0x1F, [2, 3]), (0x21, []), (0xFF, [0, 1, 2, 3])],
)
def test_cluster_logical_destinations_match_cluster_then_mask(machine, destination, reached):
    for i, lapic in enumerate(machine.lapics):
        machine.store(lapic, Reg.DFR, 0)
        machine.store(lapic, Reg.LDR, (i // 2) << 28 | 1 << (24 + i % 2))
    send(machine, 0, LOGICAL | 0x77, destination)
    assert machine.waiting(0x77) == reached


def test_x2apic_logical_ids_are_cluster_and_bit(machine_of):
    machine = machine_of(18)
    for lapic in machine.lapics:
        to_x2apic(lapic)
    assert machine.lapics[17].read_msr(0x80D) == 1 << 16 | 1 << 1
    machine.lapics[0].write_msr(0x830, (1 << 16 | 3) << 32 | LOGICAL | 0x77)
    assert machine.waiting(0x77) == [16, 17]


def test_x2apic_broadcast_is_32_bits_wide(machine):
    for lapic in machine.lapics:
        to_x2apic(lapic)
    machine.lapics[0].write_msr(0x830, 0xFF << 32 | 0x77)
    assert machine.waiting(0x77) == []
    machine.lapics[0].write_msr(0x830, 0xFFFFFFFF << 32 | 0x77)
    assert machine.waiting(0x77) == [0, 1, 2, 3]


def test_lowest_priority_goes_to_one_of_the_matches(machine):
    for i, lapic in enumerate(machine.lapics):
        machine.store(lapic, Reg.LDR, 1 << (24 + i))
        machine.store(lapic, Reg.TPR, (0x50, 0x40, 0x20, 0x30)[i])
    send(machine, 0, LOGICAL | mode(DeliveryMode.LOWEST_PRIORITY) | 0x77, 0x0B)
    assert machine.waiting(0x77) == [3]


@pytest.mark.parametrize(
    ("delivery", "event"),
    [
        (DeliveryMode.SMI, "smi"),
        (DeliveryMode.NMI, "nmi"),
        (DeliveryMode.INIT, "init"),
        (DeliveryMode.STARTUP, ("sipi", 0x9A)),
    ],
)
def test_each_delivery_mode_reaches_the_processor(machine, delivery, event):
    vector = 0x9A if delivery is DeliveryMode.STARTUP else 0
    send(machine, 0, mode(delivery) | LEVEL_ASSERT | vector, 2)
    assert machine.seen(event) == [2]


def test_starting_a_processor_is_init_then_two_startups_and_no_deassert(machine):
    send(machine, 0, OTHERS | mode(DeliveryMode.INIT) | LEVEL_ASSERT | 1 << 15)
    send(machine, 0, OTHERS | mode(DeliveryMode.INIT) | 1 << 15)
    send(machine, 0, OTHERS | mode(DeliveryMode.STARTUP) | LEVEL_ASSERT | 8)
    send(machine, 0, OTHERS | mode(DeliveryMode.STARTUP) | LEVEL_ASSERT | 8)
    assert [p.events for p in machine.processors] == [
        [],
        *[["init", ("sipi", 8), ("sipi", 8)]] * 3,
    ]


def test_the_icr_reads_back_idle(machine):
    send(machine, 0, 0x4000 | 0x77, 3)
    assert machine.load(machine.lapics[0], Reg.ICR) == 0x4077
    assert machine.load(machine.lapics[0], Reg.ICR_HIGH) == 3 << 24


# enabling and disabling


def test_a_software_disabled_apic_takes_no_fixed_interrupt_but_nmi_init_and_startup(machine):
    machine.store(machine.lapics[1], Reg.SVR, 0xFF)
    send(machine, 0, 0x77, 1)
    assert machine.waiting(0x77) == []
    for delivery in (DeliveryMode.NMI, DeliveryMode.INIT, DeliveryMode.STARTUP):
        send(machine, 0, mode(delivery) | LEVEL_ASSERT, 1)
    assert machine.processors[1].events == ["nmi", "init", ("sipi", 0)]


def test_software_disabling_masks_every_local_vector_until_written_again(lapic, machine_of):
    store, load = machine_of(1).store, machine_of(1).load
    store(lapic, Reg.LVT_TIMER, 0x41)
    store(lapic, Reg.SVR, 0xFF)
    assert load(lapic, Reg.LVT_TIMER) == 0x10041
    store(lapic, Reg.LVT_TIMER, 0x42)
    assert load(lapic, Reg.LVT_TIMER) == 0x10042
    store(lapic, Reg.SVR, 0x1FF)
    store(lapic, Reg.LVT_TIMER, 0x42)
    assert load(lapic, Reg.LVT_TIMER) == 0x42


def test_a_disabled_apic_answers_nothing_and_can_be_enabled_again(machine):
    lapic = machine.lapics[1]
    send(machine, 0, 0x77, 1)
    assert lapic.mmio_page == BASE
    lapic.write_apic_base(BASE)
    assert (lapic.enabled, lapic.mmio_page, lapic.pending()) == (False, -1, None)
    for delivery in (DeliveryMode.FIXED, DeliveryMode.NMI, DeliveryMode.INIT):
        send(machine, 0, mode(delivery) | LEVEL_ASSERT | 0x77, 1)
    assert machine.processors[1].events == ["wake"]
    lapic.write_apic_base(BASE | ENABLE)
    assert machine.load(lapic, Reg.SVR) == 0xFF
    assert machine.load(lapic, Reg.ID) == 1 << 24
    machine.store(lapic, Reg.SVR, 0x1FF)
    send(machine, 0, 0x78, 1)
    assert lapic.pending() == 0x78


def test_only_the_first_processor_is_the_boot_processor(machine):
    assert [lapic.apic_base for lapic in machine.lapics] == [
        BASE | ENABLE | BSP,
        *[BASE | ENABLE] * 3,
    ]


def test_the_base_page_moves(lapic):
    lapic.write_apic_base(0x12345000 | ENABLE)
    assert lapic.mmio_page == 0x12345000


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (ENABLE, EXTD),
        (ENABLE | EXTD, ENABLE),
        (ENABLE | EXTD, EXTD),
        (0, EXTD),
        (0, ENABLE | EXTD),
        (ENABLE, ENABLE | 1),
        (ENABLE, ENABLE | 1 << 9),
        (ENABLE, ENABLE | 1 << 40),
    ],
)
def test_forbidden_apic_base_values_and_transitions_fault(lapic, old, new):
    lapic.write_apic_base(BASE | old)
    refused(lapic.write_apic_base, BASE | new)
    assert lapic.apic_base == BASE | old


@pytest.mark.parametrize(
    ("old", "new"),
    [(ENABLE, ENABLE | EXTD), (ENABLE | EXTD, 0), (ENABLE, 0), (0, ENABLE), (ENABLE, ENABLE)],
)
def test_allowed_apic_base_transitions(lapic, old, new):
    lapic.write_apic_base(BASE | old)
    lapic.write_apic_base(BASE | new)
    assert lapic.apic_base == BASE | new


def test_init_resets_all_but_base_and_id(machine):
    lapic = machine.lapics[2]
    to_x2apic(lapic)
    lapic.write_msr(0x808, 0x50)
    lapic.accept(DeliveryMode.FIXED, 0x77, False)
    lapic.reset_by_init()
    assert lapic.x2apic_mode
    assert lapic.read_msr(0x802) == 2
    assert (lapic.tpr, lapic.pending(), lapic.read_msr(0x80F)) == (0, None, 0xFF)
    assert lapic.read_msr(0x835) == 0x10000


# registers


def test_the_version_names_six_local_vectors(machine):
    assert machine.load(machine.lapics[0], Reg.VERSION) == 0x50014


def test_narrow_loads_see_their_bytes_and_other_parts_of_a_slot_are_zero(lapic):
    assert lapic.read(0x30, 1) == 0x14
    assert lapic.read(0x32, 1) == 0x05
    assert lapic.read(0x30, 2) == 0x0014
    assert lapic.read(0x34, 4) == 0
    lapic.write(0x84, 4, 0x50)
    lapic.write(0x80, 1, 0x50)
    assert lapic.tpr == 0


def test_an_undefined_register_is_an_error_that_shows_after_a_write(machine):
    lapic = machine.lapics[0]
    assert lapic.read(0x3D0, 4) == 0
    assert machine.load(lapic, Reg.ESR) == 0
    machine.store(lapic, Reg.ESR, 0)
    assert machine.load(lapic, Reg.ESR) == 0x80
    machine.store(lapic, Reg.ESR, 0)
    assert machine.load(lapic, Reg.ESR) == 0


def test_an_illegal_vector_is_not_sent_and_interrupts_through_the_error_entry(machine):
    lapic = machine.lapics[0]
    machine.store(lapic, Reg.LVT_ERROR, 0xE1)
    send(machine, 0, 0x0F, 1)
    assert lapic.pending() == 0xE1
    machine.store(lapic, Reg.ESR, 0)
    assert machine.load(lapic, Reg.ESR) == 0x20


def test_a_local_source_with_an_illegal_vector_is_a_receive_error(machine, time):
    lapic = machine.lapics[0]
    machine.store(lapic, Reg.LVT_TIMER, 0x05)
    machine.store(lapic, Reg.INITIAL_COUNT, 10)
    time.move(100)
    machine.store(lapic, Reg.ESR, 0)
    assert machine.load(lapic, Reg.ESR) == 0x40


@pytest.mark.parametrize("offset", range(0, 0x400, 16))
def test_every_offset_can_be_read_and_written(lapic, offset):
    lapic.write(offset, 4, 0xFFFFFFFF)
    assert 0 <= lapic.read(offset, 4) <= 0xFFFFFFFF


def test_msrs_fault_in_xapic_mode_and_mmio_is_gone_in_x2apic_mode(lapic):
    refused(lapic.read_msr, 0x802)
    refused(lapic.write_msr, 0x80B, 0)
    to_x2apic(lapic)
    assert lapic.mmio_page == -1
    assert lapic.read_msr(0x803) == 0x50014


READABLE = {0x02, 0x03, 0x08, 0x0A, 0x0D, 0x0F, *range(0x10, 0x29), 0x30, *range(0x32, 0x3A), 0x3E}
WRITABLE = {0x08, 0x0B, 0x0F, 0x28, 0x30, *range(0x32, 0x39), 0x3E, 0x3F}


@pytest.mark.parametrize("register", range(0x100))
def test_x2apic_registers_are_those_of_the_manual(lapic, register):
    to_x2apic(lapic)
    if register in READABLE:
        lapic.read_msr(0x800 + register)
    else:
        refused(lapic.read_msr, 0x800 + register)
    if register in WRITABLE:
        lapic.write_msr(0x800 + register, 0)
    else:
        refused(lapic.write_msr, 0x800 + register, 0)


@pytest.mark.parametrize(
    ("msr", "value"),
    [
        (0x808, 0x100),
        (0x80B, 1),
        (0x80F, 0x1400),
        (0x828, 1),
        (0x830, 1 << 20),
        (0x830, 1 << 13),
        (0x832, 1 << 19),
        (0x832, 0x100),
        (0x838, 1 << 32),
        (0x83E, 4),
        (0x83F, 0x100),
    ],
)
def test_x2apic_reserved_bits_fault(lapic, msr, value):
    to_x2apic(lapic)
    refused(lapic.write_msr, msr, value)


def test_the_self_ipi_register_interrupts_its_own_processor(machine):
    lapic = machine.lapics[1]
    to_x2apic(lapic)
    lapic.write_msr(0x83F, 0x66)
    assert machine.waiting(0x66) == [1]


# local pins


class External:
    def __init__(self, vector):
        self.vector = vector
        self.taken = 0

    def peek(self):
        return self.vector

    def acknowledge(self):
        self.taken += 1
        return self.vector


def test_external_interrupts_pass_lint0_in_virtual_wire_mode_whatever_the_priority(machine):
    lapic = machine.lapics[0]
    lapic.external = External(0x21)
    lapic.set_up_by_firmware()
    lapic.cr8 = 15
    lapic.set_lint(0, True)
    assert lapic.pending() == 0x21
    assert lapic.acknowledge() == 0x21
    assert lapic.external.taken == 1
    lapic.set_lint(0, False)
    assert lapic.pending() is None


def test_a_masked_lint0_stops_external_interrupts_and_a_disabled_apic_passes_them(machine):
    lapic = machine.lapics[0]
    lapic.external = External(0x21)
    lapic.set_lint(0, True)
    assert lapic.pending() is None
    lapic.write_apic_base(BASE | BSP)
    assert lapic.pending() == 0x21


def test_a_rise_on_lint1_is_an_nmi_as_firmware_sets_it(machine):
    lapic = machine.lapics[0]
    lapic.set_up_by_firmware()
    lapic.set_lint(1, True)
    lapic.set_lint(1, True)
    assert machine.processors[0].events == ["nmi"]


def test_a_level_triggered_lint_interrupts_again_while_it_is_high(machine):
    lapic = machine.lapics[0]
    machine.store(lapic, Reg.LVT_LINT1, 1 << 15 | 0x44)
    lapic.set_lint(1, True)
    assert machine.load(lapic, Reg.LVT_LINT1) == 1 << 15 | 1 << 14 | 0x44
    assert lapic.acknowledge() == 0x44
    machine.store(lapic, Reg.EOI, 0)
    assert lapic.pending() == 0x44
    lapic.acknowledge()
    lapic.set_lint(1, False)
    machine.store(lapic, Reg.EOI, 0)
    assert lapic.pending() is None
    assert machine.load(lapic, Reg.LVT_LINT1) == 1 << 15 | 0x44


def test_a_performance_interrupt_masks_its_entry(machine):
    lapic = machine.lapics[0]
    machine.store(lapic, Reg.LVT_PERFORMANCE, mode(DeliveryMode.NMI))
    lapic.performance_interrupt()
    lapic.performance_interrupt()
    assert machine.processors[0].events == ["nmi"]
    assert machine.load(lapic, Reg.LVT_PERFORMANCE) & 1 << 16
