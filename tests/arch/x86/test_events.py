import pytest

from undervisor.arch.x86.events import (
    DOUBLE_FAULT,
    GP0,
    UD,
    EventType,
    ExceptionClass,
    Fault,
    GuestFault,
    Severity,
    Vector,
    combine,
)

PF = Fault(Vector.PF, 2, 0x1000)
WITH_CODE = {"DF", "TS", "NP", "SS", "GP", "PF", "AC", "CP", "VC", "SX"}


@pytest.mark.parametrize("vector", Vector, ids=lambda v: v.name)
def test_exactly_the_manual_s_vectors_push_an_error_code(vector):
    assert vector.has_error_code == (vector.name in WITH_CODE)


def test_classes_are_the_manual_s():
    assert Vector.UD.exception_class is ExceptionClass.FAULT
    assert Vector.BP.exception_class is ExceptionClass.TRAP
    assert Vector.DF.exception_class is ExceptionClass.ABORT
    assert Vector.DB.exception_class is ExceptionClass.FAULT_OR_TRAP
    assert Vector.PF.severity is Severity.PAGE_FAULT
    assert Vector.UD.severity is Severity.BENIGN
    assert Vector.TS.severity is Severity.CONTRIBUTORY


@pytest.mark.parametrize(
    ("first", "second", "delivered"),
    [
        (Vector.UD, GP0, GP0),
        (Vector.UD, PF, PF),
        (Vector.GP, UD, UD),
        (Vector.GP, GP0, DOUBLE_FAULT),
        (Vector.DE, Fault(Vector.NP, 8), DOUBLE_FAULT),
        (Vector.GP, PF, PF),
        (Vector.PF, GP0, DOUBLE_FAULT),
        (Vector.PF, PF, DOUBLE_FAULT),
        (Vector.PF, UD, UD),
        (Vector.DF, GP0, None),
        (Vector.DF, PF, None),
        (Vector.DF, UD, UD),
        (0x80, GP0, GP0),
    ],
)
def test_two_events_combine_as_the_manual_s_table_says(first, second, delivered):
    assert combine(first, second) == delivered


@pytest.mark.parametrize(
    "kind", [EventType.EXTERNAL_INTERRUPT, EventType.NMI, EventType.SOFTWARE_INTERRUPT]
)
@pytest.mark.parametrize("vector", [Vector.GP, Vector.PF, Vector.DF])
def test_an_interrupt_is_benign_whatever_its_vector(kind, vector):
    assert combine(vector, GP0, kind) == GP0
    assert combine(vector, GP0) != GP0


def test_a_guest_fault_carries_its_fault():
    with pytest.raises(GuestFault, match=r"#GP\(0x0\)") as raised:
        raise GuestFault(GP0)
    assert raised.value.fault is GP0
