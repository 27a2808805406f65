import pytest
from hypothesis import given
from hypothesis import strategies as st

from undervisor.arch.x86.events import GP0
from undervisor.arch.x86.registers import (
    Cr0,
    Cr3,
    Cr4,
    Dr6,
    Dr7,
    Efer,
    Gpr,
    Rflags,
    Xcr0,
    efer_after_cr0,
    legalize_cr0,
    legalize_cr3,
    legalize_cr4,
    legalize_cr8,
    legalize_dr6,
    legalize_dr7,
    legalize_efer,
    legalize_lmsw,
    legalize_rflags,
    legalize_xcr0,
)

u64 = st.integers(0, (1 << 64) - 1)
REAL = Cr0.et
PROTECTED = Cr0.of(pe=1, et=1, ne=1, wp=1)
PAGED = PROTECTED | Cr0.pg
LONG = Efer.of(lme=1, lma=1)
CR4_ALL = int(Cr4.DECLARED)
EFER_ALL = int(Efer.DECLARED)


def test_registers_are_encoded_in_the_order_of_instructions():
    assert [Gpr(i).name for i in (0, 1, 2, 3, 4, 7, 8, 15)] == [
        "RAX", "RCX", "RDX", "RBX", "RSP", "RDI", "R8", "R15",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("register", "bits"),
    [
        (Cr0, [0, 1, 2, 3, 4, 5, 16, 18, 29, 30, 31]),
        (Cr4, [*range(15), *range(16, 26), 27, 28, 32]),
        (Efer, [0, 8, 10, 11, 12, 13, 14, 15, 17, 18, 20, 21]),
        (Rflags, [0, 1, 2, 4, 6, 7, 8, 9, 10, 11, 12, 14, 16, 17, 18, 19, 20, 21]),
        (Dr6, [0, 1, 2, 3, 11, 13, 14, 15, 16]),
        (Dr7, [*range(12), 13, 16, 18, 20, 22, 24, 26, 28, 30]),
        (Xcr0, [0, 1, 2, 3, 4, 5, 6, 7, 9, 17, 18, 19, 62]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_fields_begin_at_the_manual_s_bits(register, bits):
    assert [field.lsb for field in register.FIELDS.values()] == bits


# Each row changes one thing of a legal load of CR0.
@pytest.mark.parametrize(
    ("old", "new", "cr4", "efer", "cs_long"),
    [
        (PROTECTED, PROTECTED | 1 << 32, 0, 0, False),
        (REAL, Cr0.pg, 0, 0, False),
        (PROTECTED, PROTECTED | Cr0.nw, 0, 0, False),
        (PROTECTED, PAGED, 0, Efer.lme, False),
        (PROTECTED, PAGED, Cr4.pae, Efer.lme, True),
        (PAGED, PROTECTED, Cr4.pae | Cr4.pcide, LONG, False),
        (PAGED, PROTECTED, Cr4.pae, LONG, True),
        (PAGED, PAGED & ~Cr0.wp, Cr4.cet, 0, False),
    ],
    ids=[
        "high bits",
        "PG without PE",
        "NW without CD",
        "long mode without PAE",
        "long mode with CS.L",
        "PG off with PCIDE",
        "PG off in 64-bit mode",
        "WP off with CET",
    ],
)
def test_an_illegal_load_of_cr0_faults(old, new, cr4, efer, cs_long):
    assert legalize_cr0(old, new, cr4=cr4, efer=efer, cs_long=cs_long) == GP0


def test_cr0_ignores_reserved_bits_and_keeps_et():
    assert legalize_cr0(REAL, 0x11 | 1 << 10, cr4=0, efer=0) == 0x11
    assert legalize_cr0(REAL, 0, cr4=0, efer=0) == Cr0.et
    assert legalize_cr0(PROTECTED, PAGED, cr4=Cr4.pae, efer=Efer.lme) == PAGED
    assert legalize_cr0(PAGED, PROTECTED, cr4=Cr4.pae, efer=LONG) == PROTECTED


def test_cs_l_means_nothing_outside_long_mode():
    assert legalize_cr0(PAGED, PROTECTED, cr4=Cr4.pae, efer=0, cs_long=True) == PROTECTED


def test_long_mode_becomes_active_and_inactive_with_paging():
    assert efer_after_cr0(Efer.lme, PAGED) == LONG
    assert efer_after_cr0(LONG, PROTECTED) == Efer.lme
    assert efer_after_cr0(0, PAGED) == 0


def test_lmsw_sets_but_never_clears_pe():
    assert legalize_lmsw(REAL, 0xFFFF) == REAL | 0xF
    assert legalize_lmsw(PROTECTED | Cr0.ts, 0) == PROTECTED


def test_cr3_refuses_bits_above_the_physical_width_in_long_mode_only():
    at40 = 1 << 40
    assert legalize_cr3(at40, cr4=Cr4.pae, efer=LONG, physical_width=40) == GP0
    assert legalize_cr3(at40, cr4=Cr4.pae, efer=LONG, physical_width=41) == at40
    assert legalize_cr3(at40 | 0x1000, cr4=0, efer=0, physical_width=40) == 0x1000


def test_cr3_s_no_flush_bit_needs_pcide_and_is_not_stored():
    no_flush = Cr3.no_flush | 0x1001
    assert legalize_cr3(no_flush, cr4=Cr4.pcide, efer=LONG, physical_width=40) == 0x1001
    assert legalize_cr3(no_flush, cr4=0, efer=LONG, physical_width=40) == GP0


def test_cr3_s_pointer_masking_bits_need_the_feature():
    value = Cr3.lam_u48 | 0x1000
    assert legalize_cr3(value, cr4=0, efer=LONG, physical_width=40) == GP0
    assert legalize_cr3(value, cr4=0, efer=LONG, physical_width=40, lam=True) == value


@pytest.mark.parametrize(
    ("old", "new", "supported", "cr0", "cr3", "efer"),
    [
        (0, 1 << 15, CR4_ALL, PAGED, 0, 0),
        (0, Cr4.smep, CR4_ALL & ~Cr4.smep, PAGED, 0, 0),
        (Cr4.pae, 0, CR4_ALL, PAGED, 0, LONG),
        (Cr4.pae, Cr4.pae | Cr4.la57, CR4_ALL, PAGED, 0, LONG),
        (Cr4.pae, Cr4.pae | Cr4.pcide, CR4_ALL, PAGED, 0, 0),
        (Cr4.pae, Cr4.pae | Cr4.pcide, CR4_ALL, PAGED, 0x1005, LONG),
        (0, Cr4.cet, CR4_ALL, PAGED & ~Cr0.wp, 0, 0),
    ],
    ids=[
        "reserved bit",
        "unsupported bit",
        "PAE off in long mode",
        "LA57 changed in long mode",
        "PCIDE outside long mode",
        "PCIDE with a PCID in CR3",
        "CET without WP",
    ],
)
def test_an_illegal_load_of_cr4_faults(old, new, supported, cr0, cr3, efer):
    assert legalize_cr4(old, new, supported=supported, cr0=cr0, cr3=cr3, efer=efer) == GP0


def test_a_legal_load_of_cr4_is_stored():
    new = Cr4.pae | Cr4.pcide | Cr4.cet
    stored = legalize_cr4(Cr4.pae, new, supported=CR4_ALL, cr0=PAGED, cr3=0x1000, efer=LONG)
    assert stored == new
    # PCIDE that is set already does not look at CR3 again.
    assert legalize_cr4(new, new, supported=CR4_ALL, cr0=PAGED, cr3=0x1005, efer=LONG) == new


def test_efer_refuses_what_the_processor_lacks_and_a_change_of_lme_under_paging():
    supported = EFER_ALL & ~Efer.svme
    assert legalize_efer(0, Efer.svme, supported=supported, cr0=REAL) == GP0
    assert legalize_efer(0, 1 << 16, supported=EFER_ALL, cr0=REAL) == GP0
    assert legalize_efer(0, Efer.lme, supported=EFER_ALL, cr0=PAGED) == GP0
    assert legalize_efer(0, Efer.lme, supported=EFER_ALL, cr0=PROTECTED) == Efer.lme
    assert legalize_efer(LONG, LONG | Efer.sce, supported=EFER_ALL, cr0=PAGED) == LONG | Efer.sce


@given(old=u64, new=u64, cr0=u64)
def test_software_never_changes_lma(old, new, cr0):
    stored = legalize_efer(old, new, supported=EFER_ALL, cr0=cr0)
    assert stored == GP0 or not (stored ^ old) & Efer.lma


@pytest.mark.parametrize(
    "names",
    [
        "",
        "sse",
        "x87 avx",
        "x87 sse opmask zmm_hi256 hi16_zmm",
        "x87 sse avx opmask",
        "x87 bndregs",
        "x87 tilecfg",
    ],
)
def test_an_inconsistent_xcr0_faults(names):
    value = Xcr0.of(**dict.fromkeys(names.split(), 1))
    assert legalize_xcr0(value, supported=int(Xcr0.DECLARED)) == GP0


def test_a_consistent_xcr0_is_stored_if_supported():
    assert legalize_xcr0(0b11, supported=0b11) == 3
    assert legalize_xcr0(0b111, supported=0b11) == GP0
    everything = int(Xcr0.DECLARED)
    assert legalize_xcr0(everything, supported=everything) == everything


@given(u64)
def test_debug_registers_keep_their_fixed_bits(value):
    for legalize, fixed_one, fixed_zero in (
        (legalize_dr6, 0xFFFF_0FF0, 0x1000),
        (legalize_dr7, 0x400, 0xD800),
    ):
        stored = legalize(value)
        if value >> 32:
            assert stored == GP0
        else:
            assert stored & fixed_one == fixed_one
            assert not stored & fixed_zero


def test_debug_registers_store_what_is_defined():
    assert legalize_dr6(0xE00F) == 0xFFFF_EFFF
    assert legalize_dr7(Dr7.gd | Dr7.l0 | Dr7.len3) == Dr7.gd | Dr7.l0 | Dr7.len3 | 0x400


def test_task_priority_has_four_bits():
    assert legalize_cr8(15) == 15
    assert legalize_cr8(16) == GP0


@given(u64)
def test_rflags_keep_their_fixed_bits(value):
    stored = legalize_rflags(value)
    assert stored & 2
    assert not stored & Rflags.reserved()
