import pytest

from undervisor.devices.ends import (
    DebugConsole,
    DebugExit,
    EndOfRun,
    EndReason,
    ShutdownPort,
)


@pytest.mark.parametrize(
    ("value", "status"), [(0, 1), (1, 3), (0x10, 0x21), (0xFFFFFFFF, 2**33 - 1)]
)
def test_a_debug_exit_ends_with_the_value_doubled_plus_one(value, status):
    ends = []
    DebugExit(ends.append).write(0, 4, value)
    assert ends == [EndOfRun(EndReason.DEBUG_EXIT, value)]
    assert ends[0].status == status


def test_the_word_shutdown_ends_the_run_with_success():
    ends = []
    port = ShutdownPort(ends.append)
    for byte in b"Shutdown":
        assert ends == []
        port.write(0, 1, byte)
    assert ends == [EndOfRun(EndReason.SHUTDOWN)]
    assert ends[0].status == 0


def test_another_word_does_not_end_the_run_and_a_restarted_one_does():
    ends = []
    port = ShutdownPort(ends.append)
    for byte in b"ShutdowShutShutdowX":
        port.write(0, 1, byte)
    assert ends == []
    for byte in b"SShutdown":
        port.write(0, 1, byte)
    assert len(ends) == 1


def test_the_debug_console_says_that_it_is_there_and_passes_bytes():
    seen = []
    console = DebugConsole(seen.append)
    assert console.read(0, 1) == 0xE9
    console.write(0, 1, 0x41)
    assert seen == [0x41]
