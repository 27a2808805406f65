"""The witness program runs on this machine and says what its processor says."""

import subprocess

from undervisor.host.access.live import LiveHost
from undervisor.host.fact import Known
from undervisor.lab.probe import parse, program


def test_the_program_says_what_this_processor_says(tmp_path):
    path = tmp_path / "probe"
    path.write_bytes(program())
    path.chmod(0o755)
    ran = subprocess.run([path], capture_output=True, text=True, timeout=30)
    assert ran.returncode == 0
    said = parse(ran.stdout)
    leaf = LiveHost().cpuid(1)
    assert isinstance(leaf, Known)
    assert said.hypervisor_present == bool(leaf.value.ecx >> 31)
    assert said.cpuid_ticks > 0
    assert said.plain_ticks > 0


def test_a_closed_pipe_ends_it(tmp_path):
    path = tmp_path / "probe"
    path.write_bytes(program())
    path.chmod(0o755)
    with open("/dev/full", "wb") as full:
        assert subprocess.run([path], stdout=full, timeout=30).returncode == 1


def test_the_program_is_the_same_each_time():
    assert program() == program()
