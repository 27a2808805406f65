"""What a lab is and the command lines that start it."""

import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from undervisor.errors import BadInput
from undervisor.host.access.protocol import KvmOffer
from undervisor.host.fact import Absent, Denied, Known
from undervisor.lab import machines, ports
from undervisor.lab.images import Images
from undervisor.lab.plan import Plan

IMAGES = Images(Path("/k/vmlinuz"), Path("/k/initramfs"))


@pytest.mark.parametrize(
    ("offer", "wanted"),
    [
        (Known(KvmOffer(12, 4224, False, True)), machines.KVM),
        (Known(KvmOffer(12, 4224, True, False)), machines.KVM),
        # KVM that cannot nest, such as one in software: the state's size does not tell, CPUID does.
        (Known(KvmOffer(12, 4224, False, False)), machines.TCG),
        (Absent("/dev/kvm"), machines.TCG),
        (Denied("/dev/kvm"), machines.TCG),
    ],
)
def test_kvm_is_taken_where_it_can_nest(offer, wanted):
    assert machines.accelerator(Plan(), offer) == wanted
    assert machines.accelerator(Plan(accelerator="tcg"), offer) == machines.TCG


def test_l1_has_svm_under_emulation_and_the_hosts_processor_under_kvm():
    emulated, real = (
        machines.outer(Plan(), IMAGES, Path("/bin/qemu"), kind) for kind in ("tcg", "kvm")
    )
    assert "+svm" in emulated[emulated.index("-cpu") + 1]
    assert real[real.index("-cpu") + 1] == "host"
    assert real[real.index("-accel") + 1] == "kvm"


def test_the_inner_levels_never_run_emulated():
    for level in (2, 3):
        words = shlex.split(machines.inner(Plan(depth=3), level))
        assert words[words.index("-accel") + 1] == "kvm"
        assert words.count("-accel") == 1


@pytest.mark.parametrize("depth", [2, 3])
def test_a_level_carries_the_streams_of_those_inside_it(depth):
    plan = Plan(depth=depth)
    words = machines.outer(plan, IMAGES, Path("/bin/qemu"), "tcg")
    devices = [w for w in words if w.startswith("virtserialport")]
    inner = set(ports.own(depth)) | {ports.port(ports.CONSOLE, depth)}
    assert {name for name in inner if any(f"name={name}" in d for d in devices)} == inner
    assert f"lab.ports={len(devices)}" in words[words.index("-append") + 1]
    deepest = shlex.split(machines.inner(plan, depth))
    assert f"lab.ports={len(list(ports.own(depth)))}" in deepest[deepest.index("-append") + 1]


def test_a_level_has_room_for_those_inside_it():
    for depth in (2, 3):
        plan = Plan(depth=depth)
        sizes = [plan.memory(level) for level in plan.levels]
        assert all(outer >= 2 * inner for outer, inner in pairwise(sizes))


@pytest.mark.parametrize(
    "wish",
    [{"depth": 1}, {"depth": 4}, {"cpus": 0}, {"cpus": 9}, {"accelerator": "xen"}]
    + [{name: Path("/nowhere")} for name in ("kernel", "modules", "busybox", "initramfs")],
)
def test_a_lab_that_can_not_be_is_refused(wish):
    with pytest.raises(BadInput):
        Plan(**wish)


def test_every_level_has_the_one_disk_past_the_page_cache_outside(tmp_path):
    disk = tmp_path / "a, disk"
    disk.touch()
    plan = Plan(depth=3, disk=disk)
    words = machines.outer(plan, IMAGES, Path("/bin/qemu"), "tcg")
    drive = words[words.index("-drive") + 1]
    assert drive.endswith(f"cache=none,file={tmp_path}/a,, disk")
    assert "virtio-blk-pci,drive=disk" in words
    for level in (2, 3):
        inner = shlex.split(machines.inner(plan, level))
        assert inner[inner.index("-drive") + 1].endswith("cache=none,file=/dev/vda")
        assert "virtio-blk-device,drive=disk" in inner
    assert "-drive" not in machines.outer(Plan(), IMAGES, Path("/bin/qemu"), "tcg")
    with pytest.raises(BadInput, match="for the lab's disk"):
        Plan(disk=tmp_path / "nothing")
