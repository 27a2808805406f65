"""Which kernel modules, in which order."""

import gzip
import lzma

import pytest

from undervisor.errors import BadInput
from undervisor.lab import modules


def module(depends):
    return b"\x7fELF junk\0license=GPL\0depends=" + depends + b"\0retpoline=Y\0"


@pytest.fixture
def kernel(tmp_path):
    def make(**files):
        for name, data in files.items():
            place = tmp_path / "kernel" / "drivers" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
        return tmp_path

    return make


def test_what_is_needed_comes_first(kernel):
    root = kernel(
        **{
            "kvm-amd.ko": module(b"kvm,ccp"),
            "kvm.ko": module(b"irqbypass"),
            "ccp.ko": module(b""),
            "irqbypass.ko": module(b""),
            "other.ko": module(b"kvm"),
        }
    )
    order = list(modules.in_order(modules.find(root), ["kvm-amd"]))
    assert order == ["irqbypass", "kvm", "ccp", "kvm_amd"]


def test_dashes_and_underscores_are_one_name(kernel):
    root = kernel(**{"a_b.ko": module(b"c-d"), "c-d.ko": module(b"")})
    assert list(modules.in_order(modules.find(root), ["a-b"])) == ["c_d", "a_b"]


def test_a_module_that_is_built_in_is_left_out(kernel):
    root = kernel(**{"a.ko": module(b"built_in")})
    assert list(modules.in_order(modules.find(root), ["a", "nowhere"])) == ["a"]


def test_compressed_modules_are_unpacked(kernel):
    a, b = module(b"b"), module(b"")
    root = kernel(**{"a.ko.xz": lzma.compress(a), "b.ko.gz": gzip.compress(b)})
    assert modules.in_order(modules.find(root), ["a"]) == {"b": b, "a": a}


def test_a_compression_that_is_not_known_is_told(kernel):
    root = kernel(**{"a.ko.zst": b"\x28\xb5\x2f\xfd"})
    with pytest.raises(BadInput, match="zst"):
        modules.in_order(modules.find(root), ["a"])


def test_a_damaged_module_is_told(kernel):
    root = kernel(**{"a.ko.xz": lzma.compress(module(b""))[:40]})
    with pytest.raises(BadInput, match=r"a\.ko\.xz"):
        modules.in_order(modules.find(root), ["a"])


def test_modules_that_need_each_other_are_told(kernel):
    root = kernel(**{"a.ko": module(b"b"), "b.ko": module(b"a")})
    with pytest.raises(BadInput, match="a -> b -> a"):
        modules.in_order(modules.find(root), ["a"])


def test_a_folder_without_modules_is_told(tmp_path):
    with pytest.raises(BadInput, match="no kernel modules"):
        modules.find(tmp_path)
