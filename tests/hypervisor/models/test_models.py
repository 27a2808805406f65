"""The named models: what they report belongs together."""

import pytest

from undervisor.arch.vmx.fields import VmcsField
from undervisor.arch.x86 import cpuid
from undervisor.arch.x86.cpuid import BY_NAME, Leaf, Output, Vendor, Version
from undervisor.arch.x86.msr import MiscEnable, Msr
from undervisor.arch.x86.registers import Cr4, Efer
from undervisor.hypervisor import models
from undervisor.hypervisor.models import CpuidState
from undervisor.hypervisor.models.dependencies import ARCH_CAPABILITIES, NEEDS, ONLY, missing
from undervisor.hypervisor.models.leaves import HYPERVISOR_SIGNATURE
from undervisor.hypervisor.models.support import EMULATED, NATIVE, SUPPORTED, UNSUPPORTED
from undervisor.hypervisor.models.vmx_features import VMX_BY_NAME

NAMES = models.names()
INTEL = [name for name in NAMES if name.startswith("intel")]
AMD = [name for name in NAMES if name.startswith("amd")]
ONE = CpuidState()
FOUR = CpuidState(apic_id=2, cpus=4)
every_model = pytest.mark.parametrize("name", NAMES)


def reported(model):
    """The names of all feature bits that the model's CPUID answers report."""
    names = set()
    for leaf, subleaf in {(f.leaf, f.subleaf) for f in cpuid.FEATURES}:
        answer = model.cpuid(leaf, subleaf, ONE)
        limit = model.cpuid(leaf & 0x80000000, 0, ONE).eax
        if leaf <= limit:
            names |= {feature.name for feature in cpuid.features_in(leaf, subleaf, answer)}
    return names


def test_each_feature_has_exactly_one_fate():
    fates = [set(NATIVE), set(EMULATED), set(UNSUPPORTED)]
    known = set(BY_NAME) | set(VMX_BY_NAME) | set(ARCH_CAPABILITIES)
    assert set.union(*fates) == known - cpuid.DYNAMIC
    assert sum(map(len, fates)) == len(set.union(*fates))


def test_every_reason_is_a_sentence_of_its_own():
    assert all(len(reason) > 8 and "\n" not in reason for reason in UNSUPPORTED.values())


@every_model
def test_a_model_offers_only_what_works(name):
    assert models.named(name).features <= SUPPORTED


@every_model
def test_every_feature_of_a_model_has_what_it_needs(name):
    assert missing(models.named(name).features) == {}


@every_model
def test_cpuid_reports_exactly_the_models_features(name):
    model = models.named(name)
    assert reported(model) == {f for f in model.features if f in BY_NAME}


@every_model
def test_a_model_has_nothing_of_the_other_vendor(name):
    model = models.named(name)
    assert all(ONLY.get(feature, model.vendor) is model.vendor for feature in model.features)


def test_names_in_the_dependencies_exist():
    known = set(BY_NAME) | set(VMX_BY_NAME) | set(ARCH_CAPABILITIES)
    assert set(NEEDS) | set().union(*NEEDS.values()) <= known


def test_the_full_models_have_everything_that_works():
    union = models.named("intel").features | models.named("amd").features
    assert union == SUPPORTED


@pytest.mark.parametrize(
    ("leaf", "bit", "number"),
    [
        (0x1, ("ecx", "vmx"), Msr.VMX_BASIC),
        (0x1, ("ecx", "vmx"), Msr.FEATURE_CONTROL),
        (0x80000001, ("ecx", "svm"), Msr.VM_HSAVE_PA),
        (0x80000001, ("ecx", "svm"), Msr.VM_CR),
        (0x1, ("ecx", "x2apic"), Msr.X2APIC_ICR),
        (0x1, ("ecx", "tsc-deadline"), Msr.TSC_DEADLINE),
        (0x1, ("edx", "mtrr"), Msr.MTRRCAP),
        (0x1, ("edx", "pat"), Msr.PAT),
        (0x1, ("edx", "mca"), Msr.MCG_CAP),
        (0x7, ("ebx", "tsc-adjust"), Msr.TSC_ADJUST),
        (0x7, ("edx", "arch-capabilities"), Msr.ARCH_CAPABILITIES),
        (0xD, None, Msr.XSS),
        (0x80000001, ("edx", "lm"), Msr.LSTAR),
    ],
)
@every_model
def test_an_msr_exists_exactly_where_cpuid_says(name, leaf, bit, number):
    model = models.named(name)
    if bit is None:
        there = model.cpuid(0xD, 1, ONE).eax & BY_NAME["xsaves"].mask
    else:
        register, feature = bit
        there = getattr(model.cpuid(leaf, 0, ONE), register) & BY_NAME[feature].mask
        if leaf > model.cpuid(leaf & 0x80000000, 0, ONE).eax:
            there = 0
    assert (number in model.msr_table) == bool(there)
    assert (number in model.msrs()) == bool(there)


@every_model
def test_the_initial_msrs_are_those_of_the_table_and_legal(name):
    model = models.named(name)
    for firmware in (True, False):
        values = model.msrs(firmware=firmware)
        assert values.keys() == model.msr_table.keys()
        for value in values.values():
            assert type(value) is int
            assert 0 <= value < 1 << 64
    mtrrs = {n: v for n, v in model.msrs().items() if 0x200 <= n < 0x270 or n == 0x2FF}
    for number, value in mtrrs.items():
        legalize = model.msr_table[number].legalize
        assert legalize(value, value, model.processor, {}) == value


def test_firmware_locks_vmx_on_and_power_up_does_not():
    model = models.named("intel")
    assert model.msrs()[Msr.FEATURE_CONTROL] == 0b101
    assert model.msrs(firmware=False)[Msr.FEATURE_CONTROL] == 0


@pytest.mark.parametrize("name", INTEL)
def test_an_intel_leaf_out_of_range_repeats_the_highest_basic_leaf(name):
    model = models.named(name)
    highest = model.cpuid(0, 0, FOUR).eax
    for leaf in (highest + 1, 0x3FFFFFFF, 0x40000001, 0x80000009, 0xFFFFFFFF):
        for subleaf in (0, 1):
            assert model.cpuid(leaf, subleaf, FOUR) == model.cpuid(highest, subleaf, FOUR)


@pytest.mark.parametrize("name", AMD)
def test_an_amd_leaf_out_of_range_is_zero(name):
    model = models.named(name)
    limits = model.cpuid(0, 0, ONE).eax, model.cpuid(0x80000000, 0, ONE).eax
    for leaf in (limits[0] + 1, limits[1] + 1, 0x3FFFFFFF, 0x40000001, 0xFFFFFFFF):
        assert model.cpuid(leaf, 0, ONE) == (0, 0, 0, 0)


@every_model
def test_leaves_in_range_without_data_are_zero(name):
    model = models.named(name)
    assert model.cpuid(3, 0, ONE) == (0, 0, 0, 0)


@every_model
def test_the_performance_monitoring_leaf_says_version_0(name):
    model = models.named(name)
    if model.cpuid(0, 0, ONE).eax >= Leaf.PERFORMANCE_MONITORING:
        assert model.cpuid(Leaf.PERFORMANCE_MONITORING, 0, ONE) == (0, 0, 0, 0)


@every_model
def test_the_model_names_itself(name):
    model = models.named(name)
    assert cpuid.vendor_string(model.cpuid(0, 0, ONE)) == model.vendor.value
    version = Version(model.cpuid(1, 0, ONE).eax)
    who = model.identity
    assert (version.family, version.model, version.stepping) == (
        who.family,
        who.model,
        who.stepping,
    )
    brand = b"".join(
        part.to_bytes(4, "little")
        for leaf in (0x80000002, 0x80000003, 0x80000004)
        for part in model.cpuid(leaf, 0, ONE)
    )
    assert brand.rstrip(b"\0").decode() == who.brand
    assert cpuid.signature_registers(HYPERVISOR_SIGNATURE, 0x40000000) == model.cpuid(
        0x40000000, 0, ONE
    )


def test_without_the_hypervisor_bit_its_leaves_are_out_of_range():
    model = models.named("amd,-hypervisor")
    assert model.cpuid(0x40000000, 0, ONE) == (0, 0, 0, 0)


@every_model
def test_leaf_1_follows_the_state(name):
    model = models.named(name)
    quiet = model.cpuid(1, 0, ONE)
    osxsave, apic, many = (BY_NAME[f].mask for f in ("osxsave", "apic", "ht"))
    assert not quiet.ecx & osxsave
    assert quiet.edx & apic
    assert not quiet.edx & many
    assert model.cpuid(1, 0, CpuidState(osxsave=True)).ecx == quiet.ecx | osxsave
    assert model.cpuid(1, 0, CpuidState(apic_enabled=False)).edx == quiet.edx & ~apic
    assert model.cpuid(1, 0, FOUR).edx == quiet.edx | many
    brand = cpuid.BrandAndApicId(model.cpuid(1, 0, FOUR).ebx)
    assert (brand.initial_apic_id, brand.logical_processors) == (2, 4)
    assert brand.clflush_size * 8 == 64


@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("name", ["intel", "amd"])
def test_every_description_of_the_topology_agrees(name, cpus):
    model = models.named(name)
    state = CpuidState(apic_id=cpus - 1, cpus=cpus)
    smt, core, end = (model.cpuid(0xB, i, state) for i in range(3))
    assert (smt.eax, smt.ebx, smt.ecx, smt.edx) == (0, 1, 0x100, cpus - 1)
    assert (core.ebx, core.ecx, core.edx) == (cpus, 0x201, cpus - 1)
    assert cpus <= 1 << core.eax < 2 * cpus
    assert (end.eax, end.ebx, end.ecx) == (0, 0, 2)
    assert cpuid.BrandAndApicId(model.cpuid(1, 0, state).ebx).logical_processors == 1 << core.eax
    if model.vendor is Vendor.AMD:
        counts = cpuid.CoreCount(model.cpuid(0x80000008, 0, state).ecx)
        assert (counts.threads + 1, counts.apic_id_size) == (cpus, core.eax)
        assert model.cpuid(0x8000001E, 0, state).eax == cpus - 1


@pytest.mark.parametrize(("name", "leaf"), [("intel", 4), ("amd", 0x8000001D)])
def test_the_cache_leaves_multiply_to_the_cache_sizes(name, leaf):
    model = models.named(name)
    sizes = []
    for subleaf in range(5):
        eax, ebx, ecx, _ = model.cpuid(leaf, subleaf, FOUR)
        parameters, geometry = cpuid.CacheParameters(eax), cpuid.CacheGeometry(ebx)
        if parameters.cache_type == cpuid.CacheType.NONE:
            break
        lines = (geometry.ways + 1) * (geometry.partitions + 1) * (geometry.line_size + 1)
        sizes.append((parameters.level, lines * (ecx + 1), parameters.sharing + 1))
    shared = [(level, share) for level, _, share in sizes]
    assert shared == [(1, 1), (1, 1), (2, 1), (3, 4)]
    assert sizes[0][1] == 32 << 10
    assert sizes[3][1] == 8 << 20
    if name == "amd":
        l1 = model.cpuid(0x80000005, 0, FOUR)
        l2_l3 = model.cpuid(0x80000006, 0, FOUR)
        assert [size for _, size, _ in sizes] == [
            (l1.ecx >> 24) << 10,
            (l1.edx >> 24) << 10,
            (l2_l3.ecx >> 16) << 10,
            (l2_l3.edx >> 18) << 19,
        ]


@every_model
def test_the_extended_state_is_x87_and_sse(name):
    model = models.named(name)
    if not model.has("xsave"):
        assert model.xcr0_supported == 0
        return
    state = model.cpuid(0xD, 0, ONE)
    assert (state.eax, state.ebx, state.ecx, state.edx) == (3, 576, 576, 0)
    assert model.xcr0_supported == 3
    assert model.cpuid(0xD, 2, ONE) == (0, 0, 0, 0)


@every_model
def test_the_address_widths_are_the_models(name):
    model = models.named(name)
    widths = cpuid.AddressWidths(model.cpuid(0x80000008, 0, ONE).eax)
    assert (widths.physical, widths.linear) == (model.physical_width, model.linear_width)


@pytest.mark.parametrize("name", AMD)
def test_amd_repeats_the_common_features_in_its_own_leaf(name):
    model = models.named(name)
    common = model.cpuid(1, 0, ONE).edx & cpuid.AMD_EDX_ALIASES
    assert model.cpuid(0x80000001, 0, ONE).edx & cpuid.AMD_EDX_ALIASES == common


@pytest.mark.parametrize("name", AMD)
def test_the_svm_leaf_reports_asids_and_features(name):
    answer = models.named(name).cpuid(Leaf.SVM, 0, ONE)
    assert answer.eax == 1
    assert answer.ebx > 1
    assert bool(answer.edx & BY_NAME["npt"].mask) == (name != "amd-opteron")


def test_the_tsc_leaf_gives_the_frequency_of_the_virtual_clock():
    model = models.named("intel")
    denominator, numerator, crystal, _ = model.cpuid(0x15, 0, ONE)
    assert crystal * numerator // denominator == models.TSC_HZ
    assert model.cpuid(0x16, 0, ONE).eax * 1_000_000 == models.TSC_HZ


def test_limiting_cpuid_hides_the_leaves_above_2():
    model = models.named("intel")
    limited = CpuidState(misc_enable=MiscEnable.monitor | MiscEnable.limit_cpuid)
    assert model.cpuid(0, 0, limited).eax == 2
    assert model.cpuid(7, 0, limited) == model.cpuid(2, 0, ONE)
    assert model.cpuid(0x80000001, 0, limited) == model.cpuid(0x80000001, 0, ONE)


def test_misc_enable_hides_monitor_and_execute_disable():
    model = models.named("intel")
    state = CpuidState(misc_enable=MiscEnable.xd_disable)
    assert not model.cpuid(1, 0, state).ecx & BY_NAME["monitor"].mask
    assert not model.cpuid(0x80000001, 0, state).edx & BY_NAME["nx"].mask


def test_amd_has_no_misc_enable_that_could_hide_anything():
    model = models.named("amd")
    for leaf in (0, 1, 7, 0x80000001):
        usual = model.cpuid(leaf, 0, ONE)
        assert model.cpuid(leaf, 0, CpuidState(misc_enable=0)) == usual
        assert model.cpuid(leaf, 0, CpuidState(misc_enable=(1 << 64) - 1)) == usual


def test_monitor_can_not_be_enabled_on_a_model_without_it():
    model = models.named("intel,-monitor")
    for misc_enable in (0, MiscEnable.monitor):
        answer = model.cpuid(1, 0, CpuidState(misc_enable=misc_enable))
        assert not answer.ecx & BY_NAME["monitor"].mask


@pytest.mark.parametrize(
    ("feature", "bit"),
    [("smep", Cr4.smep), ("pcid", Cr4.pcide), ("vmx", Cr4.vmxe), ("xsave", Cr4.osxsave)],
)
def test_a_cr4_bit_comes_and_goes_with_its_feature(feature, bit):
    assert models.named("intel").cr4_supported & bit
    assert not models.named(f"intel,-{feature}").cr4_supported & bit


def test_svme_is_amds():
    assert models.named("amd").efer_supported({}) & Efer.svme
    assert not models.named("amd,-svm").efer_supported({}) & Efer.svme
    assert not models.named("intel").efer_supported({}) & Efer.svme


def test_a_model_without_vmx_has_no_vmcs():
    model = models.named("intel,-vmx")
    assert model.vmx is None
    assert model.vmcs_fields == frozenset()
    assert not [number for number in model.msrs() if 0x480 <= number <= 0x493]


def test_vmcs_fields_follow_the_features():
    assert VmcsField.EPT_POINTER in models.named("intel").vmcs_fields
    core2 = models.named("intel-core2").vmcs_fields
    assert not {VmcsField.EPT_POINTER, VmcsField.VPID, VmcsField.PREEMPTION_TIMER_VALUE} & core2
    assert {VmcsField.GUEST_RIP, VmcsField.HOST_RSP, VmcsField.EXIT_REASON} <= core2


@every_model
def test_feature_registers_are_plain_integers(name):
    model = models.named(name)
    for leaf in (*range(0x20), 0x40000000, *range(0x80000000, 0x80000020)):
        assert all(type(part) is int for part in model.cpuid(leaf, 0, FOUR))
        assert all(0 <= part < 1 << 32 for part in model.cpuid(leaf, 0, FOUR))


def test_output_registers_are_in_the_order_of_the_answer():
    assert cpuid.Answer._fields == tuple(output.name.lower() for output in Output)
