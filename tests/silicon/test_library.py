"""The self-check at start-up: another library or another layout is told, with the remedy."""

import ctypes

import pytest
import unicorn

from undervisor.errors import ExitCode, SiliconDied
from undervisor.silicon import fixes, layout, library
from undervisor.silicon.memory import Memory
from undervisor.silicon.processor import Processor


@pytest.fixture
def bench():
    processor = Processor(Memory(1 << 20))
    return processor.engine, processor.state


def test_the_library_that_is_installed_is_the_one_that_we_know():
    library.check_version()


@pytest.mark.parametrize("version", ["2.1.3", "2.2.4", "3.0.0"])
def test_another_release_is_refused_by_name_with_the_remedy(monkeypatch, version):
    numbers = tuple(map(int, version.split(".")))
    monkeypatch.setattr(unicorn, "__version__", version)
    monkeypatch.setattr(unicorn, "uc_version", lambda: (*numbers[:2], 0))
    with pytest.raises(SiliconDied, match=f"{version} on Linux.*built on 2.1.4") as caught:
        library.check_version()
    assert caught.value.hint == "pip install unicorn==2.1.4"
    assert caught.value.exit_code == ExitCode.SILICON_DIED


def test_another_machine_is_refused(monkeypatch):
    monkeypatch.setattr(library.platform, "machine", lambda: "aarch64")
    with pytest.raises(SiliconDied, match="aarch64"):
        library.check_version()


def test_a_symbol_that_is_missing_is_named():
    with pytest.raises(SiliconDied, match="no_such_function") as caught:
        library.symbol("no_such_function")
    assert "reinstall" in caught.value.hint


def test_a_function_that_is_missing_is_noticed_before_it_is_needed(monkeypatch):
    monkeypatch.setitem(library.FUNCTIONS, "no_such_function", (None, ()))
    with pytest.raises(SiliconDied, match="no_such_function"):
        Processor(Memory(1 << 20))


@pytest.mark.parametrize("name", sorted(library.FUNCTIONS))
def test_every_internal_function_is_there(name):
    assert library.address(name)


def test_the_layout_is_found_where_it_should_be(bench):
    engine, state = bench
    layout.verify(engine, state.bytes)


def test_a_state_that_moved_by_8_bytes_is_noticed(bench):
    engine, state = bench
    moved = (ctypes.c_ubyte * layout.STATE_SIZE).from_address(state.env + 8)
    with pytest.raises(SiliconDied, match="not where it should be") as caught:
        layout.verify(engine, memoryview(moved).cast("B"))
    assert "2.1.4" in caught.value.hint


def test_features_that_moved_are_noticed(bench):
    _, state = bench
    with pytest.raises(SiliconDied, match="features are not where they should be"):
        layout.hide_random_numbers(state.env + 8)


def test_a_vendor_that_moved_is_noticed(bench):
    _, state = bench
    with pytest.raises(SiliconDied, match="vendor is not where it should be"):
        layout.be_intel(state.env + 8)


def test_code_that_is_not_what_the_repair_expects_is_left_alone(monkeypatch):
    Processor(Memory(1 << 20))  # the site holds the repair now, not the code that it replaced
    with pytest.raises(SiliconDied, match="not the code that we know"):
        fixes.repair_no_execute_walk(0)
