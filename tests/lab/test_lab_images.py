"""Images: the same inputs give the same bytes, and hold what a level needs."""

import os
import shutil
import struct
import time

import pytest

from undervisor.errors import BadInput
from undervisor.guest.newc import Archive
from undervisor.lab import images, sources
from undervisor.lab.cache import Cache
from undervisor.lab.plan import Plan

pytestmark = pytest.mark.qemu  # its programs and firmware go into the images


def bzimage(version=b"6.1.0-test (someone@somewhere) #1"):
    """As much of a kernel as an image's builder looks at."""
    data = bytearray(0x800)
    data[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", data, 0x20E, 0x300)
    data[0x500 : 0x500 + len(version)] = version
    return bytes(data)


@pytest.fixture
def found(tmp_path):
    """Small stand-ins for a distribution's files."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/kvm.ko").write_bytes(b"\0depends=\0")
    (tmp_path / "modules/kvm-amd.ko").write_bytes(b"\0depends=kvm\0")
    (tmp_path / "kernel").write_bytes(bzimage())
    (tmp_path / "busybox").write_bytes(b"\x7fELF busybox")
    return sources.Sources(tmp_path / "kernel", tmp_path / "modules", tmp_path / "busybox")


def names(data):
    """The names in an archive, as they are spelled there."""
    return [part.split(b"\0")[0].decode() for part in data.split(b"070701")[1:]]


def copy(found, folder):
    """The same inputs at another place, at another time."""
    shutil.copytree(found.modules, folder / "modules")
    for path in (found.kernel, found.busybox):
        shutil.copy(path, folder / path.name)
    for path in folder.rglob("*"):
        os.utime(path, (time.time() + 1000,) * 2)
    return sources.Sources(folder / "kernel", folder / "modules", folder / "busybox")


@pytest.mark.parametrize("depth", [2, 3])
def test_the_same_inputs_give_the_same_bytes(found, tmp_path, depth):
    made = []
    for number in range(2):
        place = tmp_path / f"again{number}"
        place.mkdir()
        built = images.build(Plan(depth=depth), copy(found, place), Cache(place / "cache"))
        made.append((built.initramfs.name, built.initramfs.read_bytes()))
    assert made[0] == made[1]


@pytest.mark.parametrize("changed", ["kernel", "busybox", "modules/kvm.ko"])
def test_another_input_is_another_image(found, tmp_path, changed):
    cache = Cache(tmp_path / "cache")
    before = images.build(Plan(), found, cache).initramfs
    path = tmp_path / changed
    path.write_bytes(path.read_bytes() + b"\0other")
    assert images.build(Plan(), found, cache).initramfs != before


def test_each_level_is_in_the_one_around_it(found):
    leaf = images.level_image(found, b"")
    l1 = images.level_image(found, leaf)
    assert leaf in l1
    assert not any("qemu" in name or "initramfs" in name for name in names(leaf))
    l2 = images.level_images(found, 3)
    assert leaf in l2
    assert l2 in images.level_image(found, l2)


def test_modules_load_in_the_order_that_the_image_holds(found):
    leaf = images.level_image(found, b"")
    assert b"kvm\nkvm_amd\n" in leaf


def test_an_archive_of_the_user_lies_beneath_ours(found, tmp_path):
    archive = Archive()
    archive.file("opt/mine", b"from the user")
    (tmp_path / "mine.cpio").write_bytes(archive.finish())
    theirs = sources.Sources(found.kernel, found.modules, found.busybox, tmp_path / "mine.cpio")
    image = images.level_image(theirs, b"")
    assert image.startswith(archive.finish()[:110])
    assert image.index(b"from the user") < image.index(b"lab/modules/order")


def test_given_files_need_no_package(found, tmp_path):
    plan = Plan(kernel=found.kernel, modules=found.modules, busybox=found.busybox)
    assert sources.sources(plan, Cache(tmp_path / "cache")) == found
    assert not (tmp_path / "cache").exists()


def test_a_kernel_says_its_version(found):
    assert sources.version(found.kernel.read_bytes(), "kernel") == "6.1.0-test"
    with pytest.raises(BadInput, match="no Linux bzImage"):
        sources.version(b"\x7fELF" + bytes(1000), "vmlinux")


def test_a_kernel_without_its_modules_is_told(found, tmp_path):
    plan = Plan(kernel=found.kernel, busybox=found.busybox)
    with pytest.raises(BadInput, match=r"6\.1\.0-test"):
        sources.sources(plan, Cache(tmp_path / "cache"))
