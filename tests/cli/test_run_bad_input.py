"""Input that cannot be used: one line that says so, exit code 2, no traceback, no hang."""

import shlex
import struct
import subprocess

import pytest
from guests import BASE, EXIT, command, example, image, undervisor


def refused(*words):
    found = undervisor("run", *words)
    assert found.status == 2, found
    return found.message


@pytest.fixture
def written(tmp_path):
    def write(data):
        path = tmp_path / "image"
        path.write_bytes(data)
        return path

    return write


def test_a_missing_file():
    assert refused("/nowhere/nothing.elf").startswith("cannot read /nowhere/nothing.elf")


def test_a_directory(tmp_path):
    assert "not a regular file" in refused(tmp_path)


def test_an_empty_file(written):
    assert "empty" in refused(written(b""))


def test_a_program_for_an_operating_system():
    assert "neither a Multiboot header nor a PVH" in refused("/bin/true")


def test_text(written):
    assert "neither Linux, Multiboot nor PVH" in refused(written(b"hello\n" * 1000))


@pytest.mark.parametrize("size", [5, 52, 100, 3000])
def test_a_truncated_image(written, size):
    refused(written(example("svm").read_bytes()[:size]))


def test_an_elf_that_lies_about_its_segments(written):
    data = bytearray(image(EXIT))
    struct.pack_into("<I", data, 52 + 16, 0x7FFF_FFFF)  # p_filesz of the first segment
    assert "file" in refused(written(bytes(data)))


def test_an_image_over_the_devices(written):
    assert "not in RAM" in refused(written(image(EXIT, base=0xA0000)))


def test_an_image_beyond_the_end_of_ram(written):
    path = written(image(EXIT, base=BASE, bss=64 << 20))
    assert "not in RAM" in refused(path, "--memory", "32M")


@pytest.mark.parametrize("memory", ["0", "1K", "999999G", "many", "-5M", "1.5G", ""])
def test_memory_that_cannot_be_had(memory):
    refused(example("svm"), "--memory", memory)


def test_memory_that_this_machine_has_not():
    """An address space of 4 GiB stands for a small machine."""
    words = shlex.join(command("run", example("svm"), "--memory", "16G"))
    done = subprocess.run(
        ["sh", "-c", f"ulimit -v 4194304; exec {words}"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("undervisor: no 16384 MiB of memory for the guest")


@pytest.mark.parametrize(
    ("cpu", "said"),
    [
        ("pentium", "unknown CPU model"),
        ("amd,+vmx", "vmx"),
        ("amd,+nonsense", "unknown CPU feature"),
        ("intel,phys-bits=99", "phys-bits"),
        ("", "unknown CPU model"),
    ],
)
def test_a_cpu_that_there_is_not(cpu, said):
    assert said in refused(example("svm"), "--cpu", cpu)


@pytest.mark.parametrize("cpus", ["0", "9", "-1"])
def test_a_number_of_processors_that_there_is_not(cpus):
    assert "--cpus" in refused(example("svm"), "--cpus", cpus)


@pytest.mark.parametrize("timeout", ["0", "-1", "nan", "inf"])
def test_a_limit_that_means_nothing(timeout):
    assert "--timeout" in refused(example("svm"), "--timeout", timeout)


def test_a_serial_line_that_there_is_not():
    assert "serial line 'telnet'" in refused(example("svm"), "--serial", "telnet")


def test_files_that_cannot_be_written(tmp_path):
    place = tmp_path / "no" / "where"
    assert "cannot write" in refused(example("svm"), "--serial", f"file:{place}")
    assert "cannot write" in refused(example("svm"), "--timeline", place)


def test_a_module_that_is_not_there():
    assert "cannot read" in refused(example("svm"), "--module", "/nowhere/at all")


@pytest.mark.parametrize("address", ["here", "-1", "0x100000000"])
def test_an_address_that_is_none(address):
    assert "--raw" in refused(example("svm"), "--raw", address)


def test_a_filter_that_means_nothing():
    assert "trace filter" in refused(example("svm"), "--trace-filter", "colour=red")
