"""MSRs: who has them, what they hold first, what a write stores."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undervisor.arch.x86 import msr
from undervisor.arch.x86.cpuid import Processor, Vendor
from undervisor.arch.x86.events import GP0, Fault
from undervisor.arch.x86.msr import MSRS, Hwcr, McgCap, Msr, SysCfg, VmCr
from undervisor.arch.x86.registers import Efer

NON_CANONICAL = 0x8000_0000_0000
ALL_ONES = (1 << 64) - 1
INTEL_FEATURES = """
    msr tsc apic x2apic mtrr pat mca lm nx syscall sep vmx rdtscp monitor xsaves
    spec-ctrl stibp ssbd arch-capabilities tsc-deadline tsc-adjust
"""
AMD_FEATURES = "msr tsc apic mtrr pat mca lm nx syscall sep svm svm-lock rdtscp ibpb"
INTEL = Processor(Vendor.INTEL, frozenset(INTEL_FEATURES.split()))
AMD = Processor(Vendor.AMD, frozenset(AMD_FEATURES.split()))
BARE = Processor(Vendor.INTEL, frozenset())


def write(number, new, processor=INTEL, old=0, **others):
    msrs = {Msr[name.upper()]: value for name, value in others.items()}
    return MSRS[processor.vendor][number].legalize(old, new, processor, msrs)


ACCEPTED = [
    (Msr.PAT, 0x0007_0406_0007_0406, INTEL),
    (Msr.PAT, 0x07070707, INTEL),
    (Msr.LSTAR, 0xFFFF_8000_0000_1000, INTEL),
    (Msr.FS_BASE, 0x1234_5678_9ABC, AMD),
    (Msr.MTRR_PHYSBASE0, 0xC000_0006, INTEL),
    (Msr.MTRR_PHYSMASK0, 0xFF_C000_0800, INTEL),
    (Msr.MTRR_DEF_TYPE, 0xC06, INTEL),
    (Msr.MTRR_FIX4K_C0000, 0x0605_0401_0006_0504, AMD),
    (Msr.MC0_CTL, ALL_ONES, INTEL),
    (Msr.MC0_STATUS, 0, INTEL),
    (Msr.MC0_ADDR, ALL_ONES, INTEL),
    (Msr.SPEC_CTRL, 7, INTEL),
    (Msr.PRED_CMD, 1, AMD),
    (Msr.XSS, 0, INTEL),
    (Msr.VM_HSAVE_PA, 0xFF_FFFF_F000, AMD),
    (Msr.VM_CR, VmCr.r_init, AMD),
    (Msr.EFER, Efer.svme | Efer.lme | Efer.nxe, AMD),
    (Msr.SYSENTER_CS, 0x1234, INTEL),
    (Msr.TSC_AUX, 0xFFFF_FFFF, INTEL),
]

FAULTING = [
    (Msr.PAT, 2, INTEL),
    (Msr.PAT, 3 << 56, AMD),
    (Msr.PAT, 0x08, AMD),
    (Msr.LSTAR, NON_CANONICAL, INTEL),
    (Msr.LSTAR, NON_CANONICAL, AMD),
    (Msr.KERNEL_GS_BASE, NON_CANONICAL, AMD),
    (Msr.SYSENTER_EIP, NON_CANONICAL, INTEL),
    (Msr.SYSENTER_CS, 1 << 32, INTEL),
    (Msr.MTRR_PHYSBASE0, 0x2, INTEL),
    (Msr.MTRR_PHYSBASE0, 0x100, INTEL),
    (Msr.MTRR_PHYSBASE0, 1 << 40, INTEL),
    (Msr.MTRR_PHYSMASK0, 1, INTEL),
    (Msr.MTRR_DEF_TYPE, 0x7, INTEL),
    (Msr.MTRR_DEF_TYPE, 0x1000, INTEL),
    (Msr.MTRR_FIX64K_00000, 0x0600_0000_0000_0002, INTEL),
    (Msr.MTRRCAP, 0x508, INTEL),
    (Msr.MC0_CTL, NON_CANONICAL, INTEL),
    (Msr.MC0_STATUS, 1, INTEL),
    (Msr.MCG_STATUS, 8, INTEL),
    (Msr.MCG_CAP, 0, INTEL),
    (Msr.SPEC_CTRL, 8, INTEL),
    (Msr.PRED_CMD, 2, INTEL),
    (Msr.XSS, 1 << 8, INTEL),
    (Msr.MISC_ENABLE, 1 << 1, INTEL),
    (Msr.ARCH_CAPABILITIES, 0, INTEL),
    (Msr.VMX_BASIC, 0, INTEL),
    (Msr.VM_HSAVE_PA, 0x1008, AMD),
    (Msr.VM_HSAVE_PA, 1 << 40, AMD),
    (Msr.VM_CR, 1 << 5, AMD),
    (Msr.EFER, Efer.svme, INTEL),
    (Msr.EFER, Efer.ffxsr, AMD),
    (Msr.X2APIC_ID, 0, INTEL),
    (Msr.X2APIC_EOI, 1, INTEL),
    (Msr.TSC_AUX, 1 << 32, INTEL),
]


@pytest.mark.parametrize(("number", "value", "processor"), ACCEPTED)
def test_a_legal_value_is_stored(number, value, processor):
    assert write(number, value, processor) == value


@pytest.mark.parametrize(("number", "value", "processor"), FAULTING)
def test_an_illegal_value_faults(number, value, processor):
    assert write(number, value, processor) is GP0


@pytest.mark.parametrize("number", [Msr.SYSENTER_EIP, Msr.SYSENTER_ESP, Msr.TSC_AUX])
def test_amd_ignores_the_upper_half_where_intel_faults(number):
    assert write(number, NON_CANONICAL | 0x1234, AMD) == 0x1234
    assert write(number, NON_CANONICAL | 0x1234, INTEL) is GP0


def test_a_locked_feature_control_faults_on_every_write():
    assert write(Msr.FEATURE_CONTROL, 5) == 5
    assert write(Msr.FEATURE_CONTROL, 5, old=5) is GP0
    assert write(Msr.FEATURE_CONTROL, 0, old=1) is GP0


def test_feature_control_has_no_smx_bits_without_smx():
    assert write(Msr.FEATURE_CONTROL, 1 << 1) is GP0
    assert write(Msr.FEATURE_CONTROL, 1 << 15) is GP0


XAPIC, X2APIC, OFF = 0xFEE0_0800, 0xFEE0_0C00, 0xFEE0_0000


@pytest.mark.parametrize(
    ("old", "new", "legal"),
    [
        (XAPIC, X2APIC, True),
        (XAPIC, OFF, True),
        (X2APIC, OFF, True),
        (OFF, XAPIC, True),
        (X2APIC, XAPIC, False),
        (OFF, X2APIC, False),
        (XAPIC, 0xFEE0_0400, False),
        (OFF, 0xFEE0_0400, False),
        (XAPIC, XAPIC | 1 << 40, False),
        (XAPIC, XAPIC | 1, False),
    ],
)
def test_the_apic_changes_mode_only_as_the_manual_draws_it(old, new, legal):
    assert write(Msr.APIC_BASE, new, old=old) == (new if legal else GP0)


def test_without_x2apic_its_enable_bit_is_reserved():
    assert write(Msr.APIC_BASE, X2APIC, AMD, old=XAPIC) is GP0
    assert Msr.X2APIC_ICR not in msr.available(AMD)


def test_a_locked_vm_cr_keeps_lock_and_svmdis():
    locked = VmCr.lock | VmCr.svmdis
    assert write(Msr.VM_CR, 0, AMD, old=locked) == locked
    assert write(Msr.VM_CR, VmCr.r_init, AMD, old=VmCr.lock) == VmCr.lock | VmCr.r_init


@pytest.mark.parametrize("old", [0, VmCr.lock])
def test_svm_can_not_be_disabled_while_it_is_enabled(old):
    assert write(Msr.VM_CR, VmCr.svmdis, AMD, old=old, efer=Efer.svme) is GP0


def test_svmdis_makes_svme_reserved():
    assert write(Msr.EFER, Efer.svme, AMD, vm_cr=VmCr.svmdis) is GP0
    assert write(Msr.EFER, Efer.svme, AMD) == Efer.svme


def test_the_svm_key_opens_the_lock_only_when_it_matches_and_is_not_zero():
    locked = VmCr.lock | VmCr.svmdis
    assert msr.unlock_svm(locked, key=7, written=7) == VmCr.svmdis
    assert msr.unlock_svm(locked, key=7, written=8) == locked
    assert msr.unlock_svm(locked, key=0, written=0) == locked


def test_the_svm_key_is_stored_only_while_unlocked_and_never_read():
    assert write(Msr.SVM_LOCK_KEY, 9, AMD, old=7) == 9
    assert write(Msr.SVM_LOCK_KEY, 9, AMD, old=7, vm_cr=VmCr.lock) == 7
    assert not MSRS[Vendor.AMD][Msr.SVM_LOCK_KEY].readable


def test_amd_can_write_a_bank_status_after_it_asked_to():
    assert write(Msr.MC0_STATUS, 1, AMD) is GP0
    assert write(Msr.MC0_STATUS, 1, AMD, hwcr=Hwcr.mc_status_write_enable) == 1


def test_the_dram_bits_of_fixed_mtrrs_appear_with_their_enable():
    value = 0x1E1E_1E1E_1E1E_1E1E
    enable = SysCfg.mtrr_fix_dram_modify
    assert write(Msr.MTRR_FIX64K_00000, value, AMD) is GP0
    assert write(Msr.MTRR_FIX64K_00000, value, AMD, syscfg=enable) == value


def test_misc_enable_keeps_its_read_only_bits():
    old = 1 << 11 | 1 << 12
    assert write(Msr.MISC_ENABLE, 0x4_00C5_0809 & ~old, old=old) == 0x4_00C5_0809 | old


def test_the_execute_disable_switch_reserves_nxe():
    assert write(Msr.EFER, Efer.nxe, INTEL) == Efer.nxe
    assert write(Msr.EFER, Efer.nxe, INTEL, misc_enable=1 << 34) is GP0


def test_a_spec_ctrl_bit_needs_its_feature():
    only_ibrs = Processor(Vendor.INTEL, frozenset({"spec-ctrl"}))
    assert write(Msr.SPEC_CTRL, 1, only_ibrs) == 1
    assert write(Msr.SPEC_CTRL, 2, only_ibrs) is GP0


def test_microcode_can_be_cleared_on_intel_and_not_on_amd():
    assert write(Msr.BIOS_SIGN_ID, 0, INTEL, old=1 << 32) == 1 << 32
    assert write(Msr.BIOS_SIGN_ID, 0, AMD) is GP0


@pytest.mark.parametrize("vendor", list(Vendor))
@given(number=st.data())
def test_a_legalizer_never_stores_more_than_64_bits_and_faults_only_with_gp(vendor, number):
    spec = number.draw(st.sampled_from(sorted(MSRS[vendor].values(), key=lambda s: s.number)))
    new = number.draw(st.integers(0, ALL_ONES))
    old = number.draw(st.integers(0, ALL_ONES))
    processor = INTEL if vendor is Vendor.INTEL else AMD
    result = spec.legalize(old, new, processor, {})
    if isinstance(result, Fault):
        assert result == GP0
    else:
        assert 0 <= result <= ALL_ONES


# Legalizers of read-only registers refuse even their own value; all others accept it.
@pytest.mark.parametrize("processor", [INTEL, AMD])
def test_every_writable_register_accepts_its_own_first_value(processor):
    for number, spec in msr.available(processor).items():
        first = spec.reset_value(processor)
        if spec.legalize is msr.read_only:
            continue
        assert spec.legalize(first, first, processor, {}) == first, msr.name_of(number)


def test_machine_check_banks_end_where_the_capability_says():
    for processor in (INTEL, AMD):
        have = msr.available(processor)
        count = McgCap(msr.reset_values(processor)[Msr.MCG_CAP]).count
        assert Msr.MC0_CTL + 4 * (count - 1) in have
        assert Msr.MC0_CTL + 4 * count not in have


@pytest.mark.parametrize(
    ("number", "processor"),
    [
        (Msr.VM_CR, INTEL),
        (Msr.FEATURE_CONTROL, AMD),
        (Msr.MISC_ENABLE, AMD),
        (Msr.XSS, AMD),
        (Msr.FEATURE_CONTROL, BARE),
        (Msr.EFER, BARE),
        (Msr.TSC_DEADLINE, BARE),
        (0xDEAD, INTEL),
    ],
)
def test_a_processor_without_the_feature_lacks_the_register(number, processor):
    assert number not in msr.available(processor)


def test_no_number_is_declared_twice_for_one_vendor():
    with pytest.raises(TypeError, match="twice"):
        msr._index([*msr.ALL, msr.MsrSpec(Msr.PAT, "again", msr.anything)])


def test_names_come_from_the_manual_or_say_that_they_are_numbers():
    assert msr.name_of(0x480) == "IA32_VMX_BASIC"
    assert msr.name_of(0x812) == "IA32_X2APIC_ISR2"
    assert msr.name_of(0x20F) == "IA32_MTRR_PHYSMASK7"
    assert msr.name_of(0xC0010114, Vendor.AMD) == "VM_CR"
    assert msr.name_of(0x1234) == "0x1234"
