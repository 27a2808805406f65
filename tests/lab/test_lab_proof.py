"""The verdict of `lab run`, from facts as levels really gave them, and from facts gone wrong."""

from dataclasses import replace

import pytest

from undervisor.lab.evidence import CLAIMS, Counted, LevelFacts, Proof
from undervisor.lab.probe import SAMPLES, parse
from undervisor.lab.probe import Testimony as Said  # a name that pytest does not collect

# As L1 on QEMU's TCG, L2 and L3 said on a machine without KVM.
L1 = LevelFacts(
    1, "6.1.0-56-cloud-amd64", 1, Said(True, "TCGTCGTCGTCG", 0, 82, 74),
    "", True, "", "tsc", True, "1",
    Counted({"exits": 7567, "nested_run": 0}, {"exits": 8139, "nested_run": 0}),
)  # fmt: skip
L2 = LevelFacts(
    2, "6.1.0-56-cloud-amd64", 1, Said(True, "KVMKVMKVM", 0x100FAFB, 63358, 74),
    "KVM", True, "", "kvm-clock", True, "1",
)  # fmt: skip
L1_OF_3 = replace(
    L1, counted=Counted({"exits": 1, "nested_run": 4}, {"exits": 9001, "nested_run": 739})
)
L2_OF_3 = replace(L2, counted=Counted({"exits": 100}, {"exits": 672}))
L3 = replace(L2, number=3, testimony=Said(True, "KVMKVMKVM", 0x100FAFB, 801995, 76))


def broken(*levels):
    return {(claim.level, claim.name) for claim in Proof(levels).claims if not claim.holds}


def test_kvm_on_kvm_is_proven():
    assert Proof((L1, L2)).proven
    assert len(Proof((L1, L2)).claims) == len(CLAIMS)


def test_three_levels_are_proven_and_the_lowest_kvm_saw_the_third():
    proof = Proof((L1_OF_3, L2_OF_3, L3))
    assert proof.proven
    assert "735 times" in proof.claims[-1].evidence


WRONG = {
    "KVM outside": (replace(L1, kvm_device=False), L2),
    "KVM by name": (L1, replace(L2, testimony=replace(L2.testimony, signature="TCGTCGTCGTCG"))),
    "KVM to its kernel": (L1, replace(L2, hypervisor="")),
    "exits counted outside": (
        replace(L1, counted=Counted({"exits": 7}, {"exits": 7 + SAMPLES - 1})),
        L2,
    ),
    "CPUID exits": (L1, replace(L2, testimony=replace(L2.testimony, cpuid_ticks=600))),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_each_claim_can_fail_alone(name):
    assert broken(*WRONG[name]) == {(2, name)}
    assert not Proof(WRONG[name]).proven


def test_an_emulated_l2_is_not_proven():
    # Full QEMU in L1 without KVM: what L2 says then.
    emulated = replace(
        L2, testimony=Said(True, "TCGTCGTCGTCG", 0, 91, 80), hypervisor="", clocksource="tsc"
    )
    idle = replace(L1, counted=Counted({"exits": 0}, {"exits": 0}))
    assert len(broken(idle, emulated)) == 4


def test_a_name_alone_proves_nothing():
    # A guest of TCG may be given KVM's signature (`-cpu ...,kvm=on`); no KVM counts its exits.
    named = replace(L2, testimony=replace(L2.testimony, cpuid_ticks=91))
    idle = replace(L1, counted=Counted({"exits": 0}, {"exits": 0}))
    assert broken(idle, named) == {(2, "exits counted outside"), (2, "CPUID exits")}


def test_an_l3_that_the_lowest_kvm_did_not_see_is_not_proven():
    unseen = replace(L1_OF_3, counted=Counted({"nested_run": 4}, {"nested_run": 4}))
    assert broken(unseen, L2_OF_3, L3) == {
        (2, "exits counted outside"),
        (3, "entries counted below"),
    }


def test_one_level_proves_nothing():
    assert not Proof((L1,)).proven


def test_the_facts_are_in_the_document():
    said = Proof((L1, L2)).as_json()
    assert said["proven"] is True
    assert said["levels"][0]["counted"]["rise"]["exits"] == 572
    assert said["levels"][1]["testimony"]["signature"] == "KVMKVMKVM"


def probe_text(leaves, cpuid, plain):
    return "".join(f"{n:016x}\n" for n in [*leaves, *[cpuid] * SAMPLES, *[plain] * SAMPLES])


KVM_LEAVES = [0, 0, 1 << 31, 0, 0x40000001, 0x4B4D564B, 0x564B4D56, 0x4D, 0x100FAFB, 0, 0, 0]


def test_what_the_program_prints_is_understood():
    said = parse(probe_text(KVM_LEAVES, 63358, 74))
    assert said == Said(True, "KVMKVMKVM", 0x100FAFB, 63358, 74)


def test_leaves_of_no_hypervisor_are_not_believed():
    # On bare metal CPUID answers an unknown leaf with the data of the highest one.
    bare = [*KVM_LEAVES[:2], 0, *KVM_LEAVES[3:]]
    said = parse(probe_text(bare, 100, 74))
    assert (said.hypervisor_present, said.signature, said.features) == (False, "", 0)


@pytest.mark.parametrize("text", ["", "0000\n", "sh: /lab/probe: not found\n"])
def test_what_it_did_not_print_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011 (the text differs, the kind is the promise)
        parse(text)
