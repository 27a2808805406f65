"""Each rule of VMRUN is broken alone, from a valid state."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from undervisor.arch.rules import Outcome
from undervisor.arch.svm.capabilities import ANY_PROCESSOR, SvmFeatures
from undervisor.arch.svm.checks import (
    CR4_FEATURES,
    EFER_FEATURES,
    RULES,
    VmrunChecker,
    check_vmrun,
)
from undervisor.arch.svm.vmcb import EventInfo, Vmcb
from undervisor.arch.svm.vmcb import VmcbField as F
from undervisor.arch.x86.events import EventType, Vector
from undervisor.arch.x86.registers import Cr0, Cr4, Efer

PROCESSOR = replace(ANY_PROCESSOR, physical_width=40)
SMALL = PROCESSOR.physical_width
LIMIT = 1 << SMALL
AVIC, X2AVIC, VNMI = 1 << 31, 1 << 30, 1 << 26


def valid(changes=()):
    """A 64-bit guest under nested paging, in a VMCB."""
    vmcb = Vmcb(bytearray(4096))
    vmcb.intercept_word3 = 1 << 1
    vmcb.intercept_word4 = 1
    vmcb.iopm_base_pa, vmcb.msrpm_base_pa = 0x10000, 0x20000
    vmcb.guest_asid = 1
    vmcb.nested_control, vmcb.n_cr3, vmcb.g_pat = 1, 0x30000, 0x0007_0406_0007_0406
    vmcb.efer = Efer.of(svme=1, lme=1, lma=1, nxe=1, sce=1)
    vmcb.cr0 = Cr0.of(pe=1, mp=1, et=1, ne=1, wp=1, am=1, pg=1)
    vmcb.cr4 = Cr4.of(pae=1, pge=1, osfxsr=1)
    vmcb.cr3 = 0x5000
    vmcb.dr6, vmcb.dr7 = 0xFFFF_0FF0, 0x400
    vmcb.cs_attributes = 0xA9B
    vmcb.rflags, vmcb.rip = 2, 0x1000
    for field, value in dict(changes).items():
        vmcb[field] = value
    return vmcb


def event(kind, vector=0, **more):
    return {F.EVENTINJ: EventInfo.of(v=1, type=kind, vector=vector, **more)}


def efer(**fields):
    return {F.EFER: Efer(valid().efer).replace(**fields)}


def cr0(**fields):
    return {F.CR0: Cr0(valid().cr0).replace(**fields)}


def cr4(**fields):
    return {F.CR4: Cr4(valid().cr4).replace(**fields)}


def avic(bits=AVIC, **fields):
    return {F.V_INTR_CONTROL: bits} | {F[name.upper()]: value for name, value in fields.items()}


NO_PAGING_HOST = {"host_cr0": 0x11}
NO_LONG_MODE = {"long_mode": False}
SMALL_AVIC = {"features2": 0}
EXCEPTION, INTERRUPT = EventType.EXCEPTION, EventType.EXTERNAL_INTERRUPT

# rule, what breaks it, what the processor lacks.  Several rows for one rule show its edges.
BROKEN = [
    ("efer.svme", efer(svme=0), {}),
    ("efer.reserved", {F.EFER: valid().efer | 1 << 1}, {}),
    ("efer.reserved", {F.EFER: valid().efer | 1 << 63}, {}),
    ("efer.lme", efer(lma=0), NO_LONG_MODE),
    ("efer.lma", efer(lme=0), NO_LONG_MODE),
    ("cr0.nw_without_cd", cr0(nw=1), {}),
    ("cr0.high", {F.CR0: valid().cr0 | 1 << 32}, {}),
    ("cr0.high", {F.CR0: valid().cr0 | 1 << 63}, {}),
    ("cr3.high", {F.CR3: 1 << 52}, {}),
    ("cr3.high", {F.CR3: 1 << 63}, {}),
    ("cr3.width", {F.CR3: LIMIT}, {}),
    ("cr3.width", {F.CR3: 1 << 51}, {}),
    ("cr4.reserved", {F.CR4: valid().cr4 | 1 << 15}, {}),
    ("cr4.reserved", cr4(vmxe=1), {}),
    ("dr6.high", {F.DR6: 0xFFFF_FFFF_FFFF_0FF0}, {}),
    ("dr6.high", {F.DR6: 1 << 32}, {}),
    ("dr7.high", {F.DR7: 1 << 32}, {}),
    ("dr7.high", {F.DR7: 1 << 63}, {}),
    ("long_mode.pae", cr4(pae=0), {}),
    ("long_mode.pae", cr4(pae=0) | {F.CS_ATTRIBUTES: 0xE9B}, {}),
    ("long_mode.pe", cr0(pe=0), {}),
    ("long_mode.cs", {F.CS_ATTRIBUTES: 0xE9B}, {}),
    ("intercept.vmrun", {F.INTERCEPT_WORD4: 0xFFFF_FFFE}, {}),
    ("msrpm.range", {F.MSRPM_BASE_PA: LIMIT - 0x2000}, {}),
    ("msrpm.range", {F.MSRPM_BASE_PA: LIMIT - 0x1000}, {}),
    ("msrpm.range", {F.MSRPM_BASE_PA: LIMIT}, {}),
    ("msrpm.range", {F.MSRPM_BASE_PA: (1 << 64) - 1}, {}),
    ("iopm.range", {F.IOPM_BASE_PA: LIMIT - 0x2000}, {}),
    ("iopm.range", {F.IOPM_BASE_PA: LIMIT}, {}),
    ("asid.zero", {F.GUEST_ASID: 0}, {}),
    *(("eventinj.type", event(kind), {}) for kind in (1, 5, 6, 7)),
    *(("eventinj.vector", event(EXCEPTION, v), {}) for v in (2, 9, 15, 20, 22, 27, 31, 32, 255)),
    ("eventinj.cp", event(EXCEPTION, Vector.CP), {"cr4": ANY_PROCESSOR.cr4 & ~Cr4.cet}),
    ("eventinj.vc", event(EXCEPTION, Vector.VC), {"sev_es": False}),
    ("eventinj.mode", event(EXCEPTION, Vector.BR), {}),
    ("eventinj.mode", event(EXCEPTION, Vector.OF), {}),
    ("cet.s_cet", {F.S_CET: 1 << 2}, {}),
    ("cet.s_cet", {F.S_CET: 1 << 63}, {}),
    ("cet.wp", cr0(wp=0) | cr4(cet=1), {}),
    ("np.host_paging", {}, NO_PAGING_HOST),
    ("np.n_cr3.high", {F.N_CR3: 1 << 52}, {}),
    ("np.n_cr3.width", {F.N_CR3: LIMIT}, {}),
    ("np.g_pat.reserved", {F.G_PAT: 0x0007_0406_0007_0486}, {}),
    ("np.g_pat.reserved", {F.G_PAT: 0x0807_0406_0007_0406}, {}),
    ("np.g_pat.type", {F.G_PAT: 0x0007_0406_0007_0402}, {}),
    ("np.g_pat.type", {F.G_PAT: 0x0307_0406_0007_0406}, {}),
    ("vnmi.intercept", avic(VNMI, intercept_word3=0), {}),
    ("avic.x2avic", avic(X2AVIC), {}),
    ("avic.max_index", avic(avic_physical_table=256), {}),
    ("avic.x2_max_index", avic(AVIC | X2AVIC, avic_physical_table=512), SMALL_AVIC),
    ("avic.backing_page", avic(avic_backing_page=LIMIT), {}),
    ("avic.physical_table", avic(avic_physical_table=LIMIT), {}),
    ("avic.physical_table", avic(AVIC | X2AVIC, avic_physical_table=LIMIT - 0x1000 | 0x200), {}),
    ("avic.logical_table", avic(avic_logical_table=LIMIT), {}),
    *(
        (f"efer.{name}", efer(**{name: 1}), {"efer": ANY_PROCESSOR.efer & ~Efer.FIELDS[name].mask})
        for name in EFER_FEATURES
    ),
    *(
        (f"cr4.{name}", cr4(**{name: 1}), {"cr4": ANY_PROCESSOR.cr4 & ~Cr4.FIELDS[name].mask})
        for name in CR4_FEATURES
    ),
]

# Legal states next to the edges of the rules.
LEGAL = [
    ("the valid state", {}, {}),
    ("NW with CD", cr0(nw=1, cd=1), {}),
    ("the highest CR3", {F.CR3: LIMIT - 0x1000}, {}),
    ("low bits of CR3", {F.CR3: 0x5FFF}, {}),
    ("any CR3 outside long mode", {F.CR3: (1 << 64) - 1} | efer(lme=0, lma=0), {}),
    ("paged real mode", cr0(pe=0) | efer(lme=0, lma=0), {}),
    ("no PAE outside long mode", cr4(pae=0) | efer(lme=0, lma=0), {}),
    ("LME without paging", cr0(pg=0, pe=0) | cr4(pae=0), {}),
    ("L and D outside long mode", {F.CS_ATTRIBUTES: 0xE9B} | efer(lme=0, lma=0), {}),
    ("LMA does not matter", efer(lma=0), {}),
    ("the last MSRPM", {F.MSRPM_BASE_PA: LIMIT - 0x3000}, {}),
    ("the MSRPM's low bits", {F.MSRPM_BASE_PA: LIMIT - 0x3000 | 0xFFF}, {}),
    ("the last IOPM", {F.IOPM_BASE_PA: LIMIT - 0x3000 | 0xFFF}, {}),
    ("the largest ASID", {F.GUEST_ASID: 0xFFFF_FFFF}, {}),
    ("an event that is not valid", {F.EVENTINJ: 0x7FFF_F7FF}, {}),
    ("an NMI of any vector", event(EventType.NMI, 255), {}),
    ("an interrupt", event(INTERRUPT, 2), {}),
    ("a software interrupt", event(EventType.SOFTWARE_INTERRUPT, 5), {}),
    ("#GP with its code", event(EXCEPTION, 13, ev=1, error_code=0xFFFF_FFFF), {}),
    ("#GP without its code", event(EXCEPTION, 13), {}),
    ("#BR in compatibility mode", event(EXCEPTION, 5) | {F.CS_ATTRIBUTES: 0xC9B}, {}),
    ("#BR outside long mode", event(EXCEPTION, 5) | efer(lme=0, lma=0), {}),
    ("shadow stacks", {F.S_CET: 3} | cr4(cet=1), {}),
    ("S_CET without shadow stacks", {F.S_CET: 4}, {"cr4": ANY_PROCESSOR.cr4 & ~Cr4.cet}),
    ("N_CR3 unused", {F.N_CR3: (1 << 64) - 1, F.NESTED_CONTROL: 0}, {}),
    ("G_PAT unused", {F.G_PAT: (1 << 64) - 1, F.NESTED_CONTROL: 0}, {}),
    ("no host paging needed", {F.NESTED_CONTROL: 0}, NO_PAGING_HOST),
    ("NP_ENABLE on a processor without it", {F.N_CR3: (1 << 64) - 1}, {"features": 0}),
    ("a virtual NMI", avic(VNMI), {}),
    ("no NMI intercept, no virtual NMIs", {F.INTERCEPT_WORD3: 0}, {}),
    ("the last backing page", avic(avic_backing_page=LIMIT - 0x1000), {}),
    ("no virtual NMIs", avic(VNMI, intercept_word3=0), {"features": SvmFeatures.np}),
    ("AVIC", avic(avic_physical_table=0x5000 | 255), {}),
    ("x2AVIC", avic(AVIC | X2AVIC, avic_physical_table=511), SMALL_AVIC),
    ("large x2AVIC", avic(AVIC | X2AVIC, avic_physical_table=4095), {}),
    ("x2AVIC's logical table", avic(AVIC | X2AVIC, avic_logical_table=LIMIT), {}),
    ("no AVIC", avic(avic_backing_page=LIMIT), {"features": SvmFeatures.np}),
    ("reserved bits of TLB_CONTROL", {F.TLB_CONTROL: 2}, {}),
    ("reserved low bits of CR0", {F.CR0: valid().cr0 | 1 << 10}, {}),
]


def names(verdict):
    return [violation.rule.id for violation in verdict.broken]


@pytest.mark.parametrize(("rule", "changes", "lacks"), BROKEN, ids=[row[0] for row in BROKEN])
def test_a_state_that_breaks_one_rule_is_refused_for_it_alone(rule, changes, lacks):
    processor = replace(PROCESSOR, **lacks)
    verdict = check_vmrun(valid(changes), processor)
    assert names(verdict) == [f"svm.{rule}"]
    assert verdict.broken[0].rule.outcome is Outcome.VMEXIT_INVALID
    refused = VmrunChecker(processor).check(valid(changes))
    assert refused is not None
    assert refused.broken == verdict.broken


@pytest.mark.parametrize(("name", "changes", "lacks"), LEGAL, ids=[row[0] for row in LEGAL])
def test_a_legal_state_breaks_no_rule(name, changes, lacks):
    verdict = check_vmrun(valid(changes), replace(PROCESSOR, **lacks))
    assert names(verdict) == []
    assert verdict.unchecked == []


def test_every_rule_is_broken_by_a_row():
    assert {rule.id for rule in RULES} == {f"svm.{row[0]}" for row in BROKEN}


def test_rules_are_complete_declarations():
    assert len(RULES) >= 35
    assert len({rule.id for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule.text, rule.id
        assert rule.section, rule.id
        assert rule.remedy, rule.id
        assert rule.reads, rule.id


class Recorder(dict):
    """A state that remembers which fields were read."""

    def __init__(self, state):
        super().__init__(state)
        self.seen = set()

    def __getitem__(self, field):
        self.seen.add(field)
        return super().__getitem__(field)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_a_rule_reads_only_the_fields_that_it_names(rule):
    for _, changes, lacks in BROKEN + LEGAL:
        state = Recorder(valid(changes).items())
        rule.holds(state, replace(PROCESSOR, **lacks))
        assert state.seen <= set(rule.reads)


def test_all_broken_rules_are_named_at_once():
    verdict = check_vmrun(valid({F.GUEST_ASID: 0, F.INTERCEPT_WORD4: 0, F.DR7: 1 << 40}), PROCESSOR)
    assert names(verdict) == ["svm.dr7.high", "svm.intercept.vmrun", "svm.asid.zero"]
    assert str(verdict.broken[0]) == (
        "svm.dr7.high: DR7 bits 63:32 must be 0 (DR7 = 0x10000000000) "
        "[Canonicalization and Consistency Checks]"
    )


def test_a_missing_field_makes_its_rules_unchecked_not_passed():
    state = dict(valid())
    del state[F.CR4]
    verdict = check_vmrun(state, PROCESSOR)
    unchecked = {rule.id for rule in verdict.unchecked}
    assert "svm.cr4.reserved" in unchecked
    assert "svm.long_mode.pae" in unchecked
    assert all(F.CR4 in rule.reads for rule in verdict.unchecked)


def test_the_checker_forgets_its_good_states_before_they_are_too_many():
    checker = VmrunChecker(PROCESSOR, remember=4)
    for asid in range(1, 50):
        assert checker.check(valid({F.GUEST_ASID: asid})) is None
    assert checker.check(valid({F.GUEST_ASID: 0})) is not None


def test_the_checker_refuses_a_width_that_its_shortcut_can_not_serve():
    with pytest.raises(ValueError, match="at least 32 bits"):
        VmrunChecker(replace(PROCESSOR, physical_width=31))


CHECKED = sorted({field for rule in RULES for field in rule.reads})
edits = st.tuples(st.sampled_from(CHECKED), st.integers(0, 63))


@settings(max_examples=300)
@given(st.lists(st.lists(edits, max_size=3), min_size=1, max_size=8))
def test_the_checker_agrees_with_the_rules_whatever_came_before(sequence):
    checker = VmrunChecker(PROCESSOR)
    assert checker.check(valid()) is None
    for changes in sequence:
        vmcb = valid()
        for field, bit in changes:
            vmcb[field] ^= 1 << bit % (8 * field.width)
        verdict = checker.check(vmcb)
        expected = check_vmrun(vmcb, PROCESSOR)
        assert (verdict.broken if verdict else []) == expected.broken


def test_no_single_bit_escapes_the_checker():
    checker = VmrunChecker(PROCESSOR, remember=1 << 20)
    assert checker.check(valid()) is None
    for field in CHECKED:
        for bit in range(8 * field.width):
            vmcb = valid()
            vmcb[field] ^= 1 << bit
            verdict = checker.check(vmcb)
            assert (verdict is None) == (not check_vmrun(vmcb, PROCESSOR).broken), (field, bit)
