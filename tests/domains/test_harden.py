from dataclasses import replace

import pytest

from undervisor.domains.choice import Outcome
from undervisor.domains.cpu_features import MITIGATIONS
from undervisor.domains.harden import Options, harden, overhead
from undervisor.domains.limits import problems
from undervisor.domains.model import (
    Cpu,
    CpuLimits,
    Disk,
    Guest,
    Interface,
    Memory,
    MemoryLimits,
    Mode,
    Policy,
)

GUEST = Guest(
    "l1", Memory(8 << 20), vcpus=4,
    cpu=Cpu(Mode.PASSTHROUGH, features=(("vmx", Policy.REQUIRE),)),
    disks=(Disk("vda", "/a"),), interfaces=(Interface("bridge", "virbr0", "virtio"),),
)  # fmt: skip


def hardened(guest=GUEST, **options):
    found = harden(guest, Options(**options))
    return found.guest, {choice.id: choice for choice in found.choices}


def test_limits_leave_room_for_qemu():
    guest, _ = hardened()
    assert guest.memory_limits.hard >= GUEST.memory.size + overhead(GUEST)
    assert guest.memory_limits.soft == GUEST.memory.size
    assert guest.cpu_limits.quota <= guest.cpu_limits.period
    assert guest.cpu_limits.emulator_quota == guest.cpu_limits.emulator_period
    assert problems(guest) == ()


def test_the_guides_limits_are_corrected():
    guides = replace(GUEST, memory_limits=MemoryLimits(8 << 20, 6 << 20),
                     cpu_limits=CpuLimits(2048, 100000, 200000))  # fmt: skip
    ids = {p.id for p in problems(guides)}
    assert {"hard-limit", "soft-below-ram", "quota-idle"} <= ids
    guest, choices = hardened(guides)
    assert problems(guest) == ()
    assert choices["memory-limit"].outcome is Outcome.CHANGED


def test_a_limit_that_is_wide_enough_stays():
    wide = replace(GUEST, memory_limits=MemoryLimits(64 << 20, 32 << 20))
    assert hardened(wide)[0].memory_limits == wide.memory_limits


@pytest.mark.parametrize("name", ["spec-ctrl", "amd-stibp", "ssbd", "md-clear"])
def test_mitigations_are_given_back_never_taken(name):
    taken = replace(GUEST, cpu=GUEST.cpu.with_feature(name, Policy.DISABLE))
    guest, choices = hardened(taken)
    assert guest.cpu.policy(name) is None
    assert MITIGATIONS[name] in choices["mitigations"].why


def test_no_mitigation_is_ever_disabled_by_hardening():
    guest, choices = hardened()
    assert not [n for n, p in guest.cpu.features if n in MITIGATIONS and not p.gives]
    assert choices["spec-ctrl"].outcome is Outcome.REFUSED
    assert guest.cpu.policy("invtsc") is Policy.DISABLE


def test_invtsc_stays_where_speed_was_chosen():
    fast = replace(GUEST, cpu=replace(GUEST.cpu, migratable=False))
    assert hardened(fast)[0].cpu.policy("invtsc") is None


def test_interfaces_move_to_the_isolated_network_or_stay():
    (interface,) = hardened()[0].interfaces
    assert (interface.kind, interface.source) == ("network", "isolated")
    guest, choices = hardened(network="")
    assert guest.interfaces == GUEST.interfaces
    assert choices["network"].outcome is Outcome.REFUSED


def test_hardening_twice_is_hardening_once():
    once = hardened()[0]
    assert hardened(once)[0] == once
    assert hardened(once, cpu_percent=50)[0].cpu_limits.quota == 50000


def test_every_wrong_advice_is_told_every_time():
    _, choices = hardened()
    assert {"spec-ctrl", "shares", "execmem", "log-level"} <= set(choices)
