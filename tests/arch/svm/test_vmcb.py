from itertools import pairwise

import pytest

from undervisor.arch.svm.vmcb import (
    SAVE_AREA,
    SEV_ES_FIELDS,
    SIZE,
    CleanBits,
    EventInfo,
    VirtualInterrupt,
    Vmcb,
    VmcbField,
)
from undervisor.arch.x86.segments import Segment

F = VmcbField

# Offsets as the manual's tables print them, apart from the declaration.
PRINTED = {
    "IOPM_BASE_PA": 0x040,
    "GUEST_ASID": 0x058,
    "TLB_CONTROL": 0x05C,
    "INTERRUPT_SHADOW": 0x068,
    "EXITCODE": 0x070,
    "EXITINFO1": 0x078,
    "EXITINTINFO": 0x088,
    "NESTED_CONTROL": 0x090,
    "EVENTINJ": 0x0A8,
    "N_CR3": 0x0B0,
    "CLEAN_BITS": 0x0C0,
    "NRIP": 0x0C8,
    "VMSA_POINTER": 0x108,
    "CPL": 0x4CB,
    "EFER": 0x4D0,
    "CR4": 0x548,
    "CR0": 0x558,
    "RFLAGS": 0x570,
    "RIP": 0x578,
    "RSP": 0x5D8,
    "RAX": 0x5F8,
    "CR2": 0x640,
    "G_PAT": 0x668,
    "SPEC_CTRL": 0x6E0,
}


@pytest.fixture
def vmcb():
    return Vmcb(bytearray(SIZE))


@pytest.mark.parametrize(("name", "offset"), PRINTED.items())
def test_a_field_is_where_the_manual_prints_it(name, offset):
    assert F[name] == offset


def test_fields_do_not_overlap_and_stay_inside():
    fields = sorted(F)
    for one, next_ in pairwise(fields):
        assert one + one.width <= next_, f"{one.name} overlaps {next_.name}"
    assert fields[-1] + fields[-1].width <= SIZE
    assert len(F) == len(F.__members__), "two names for one offset"


def test_fields_are_aligned_as_machine_words():
    for field in F:
        if field.width in (2, 4, 8):
            assert field % field.width == 0, field.name


def test_the_fields_of_sev_es_do_not_overlap_the_common_ones():
    spans = [(F(f) - SAVE_AREA, f.width) for f in F if f >= F.ES_SELECTOR]
    spans = sorted(spans + list(SEV_ES_FIELDS.values()))
    for (one, width), (next_, _) in pairwise(spans):
        assert one + width <= next_, hex(one)


@pytest.mark.parametrize("field", F, ids=lambda f: f.name)
def test_a_field_reads_back_as_attribute_and_item_and_touches_no_other_byte(vmcb, field):
    value = (1 << 8 * field.width) - 2
    setattr(vmcb, field.name.lower(), value)
    assert getattr(vmcb, field.name.lower()) == vmcb[field] == value
    raw = bytes(vmcb.b)
    assert int.from_bytes(raw[field : field + field.width], "little") == value
    assert not any(raw[:field]) and not any(raw[field + field.width :])  # noqa: PT018
    vmcb[field] = 1
    assert getattr(vmcb, field.name.lower()) == 1


def test_a_view_writes_the_memory_it_was_given():
    memory = bytearray(2 * SIZE)
    Vmcb(memoryview(memory)[SIZE:]).rip = 0x1122334455667788
    assert memory[SIZE + 0x578 :][:8] == bytes.fromhex("8877665544332211")


def test_a_view_of_another_size_is_refused():
    with pytest.raises(ValueError, match="4096 bytes"):
        Vmcb(bytearray(SIZE - 1))


def test_a_value_too_wide_for_its_field_is_refused(vmcb):
    with pytest.raises(ValueError):  # noqa: PT011  memoryview's own
        vmcb.cpl = 256
    with pytest.raises(OverflowError):
        vmcb[F.CPL] = 256


def test_an_unknown_field_name_is_refused(vmcb):
    with pytest.raises(AttributeError):
        vmcb.no_such_field = 1
    with pytest.raises(AttributeError):
        _ = vmcb.no_such_field


def test_a_segment_reads_back(vmcb):
    segment = Segment(0x10, 0x1234_5678_9ABC, 0xFFFF_FFFF, 0xA9B)
    vmcb.set_segment(F.CS_SELECTOR, segment)
    assert vmcb.segment(F.CS_SELECTOR) == segment
    assert (vmcb.cs_selector, vmcb.cs_attributes) == (0x10, 0xA9B)
    assert (vmcb.cs_limit, vmcb.cs_base) == (0xFFFF_FFFF, 0x1234_5678_9ABC)


def test_vmload_moves_its_state_and_nothing_else(vmcb):
    source = Vmcb(bytearray(b"\xff" * SIZE))
    vmcb.copy_vmload_state(source)
    moved = {field for field in F if vmcb[field]}
    segments = {f for f in F if f.name.split("_")[0] in ("FS", "GS", "LDTR", "TR")}
    msrs = {F.STAR, F.LSTAR, F.CSTAR, F.SFMASK, F.KERNEL_GS_BASE}
    assert moved == segments | msrs | {F.SYSENTER_CS, F.SYSENTER_ESP, F.SYSENTER_EIP}


def test_layouts_have_the_manual_s_bits():
    assert EventInfo.of(v=1, type=3, ev=1, vector=13, error_code=0x18) == 0x18_8000_0B0D
    assert VirtualInterrupt.of(v_irq=1, v_intr_prio=0xF, v_ign_tpr=1) == 0x1F_0100
    assert VirtualInterrupt.v_intr_masking == 1 << 24
    assert CleanBits.DECLARED == 0x1FFF
