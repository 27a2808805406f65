"""`undervisor run`: what a person at a terminal gets to see, and the exit code."""

import json
import os
import signal
import subprocess
import time

import pytest
from guests import ECHO, EXIT, IDLE, SPIN, TRIPLE_FAULT, command, example, image, undervisor


@pytest.fixture
def boot(tmp_path):
    """Runs an image of some instructions."""

    def run(body, *words, **more):
        path = tmp_path / "guest.elf"
        path.write_bytes(image(body))
        return undervisor("run", path, "--no-summary", *words, **more)

    return run


# -- serial line and exit code -----------------------------------------------------------------


def test_the_guests_output_is_ours_and_its_exit_code_too():
    found = undervisor("run", example("svm"), "--cpu", "amd", "--no-summary")
    assert found.out.splitlines()[-1] == "passed"
    assert (found.status, found.err) == (1, "")


def test_the_exit_code_is_twice_the_value_and_one(boot):
    assert boot(EXIT).status == 43


def test_the_guest_reads_what_is_typed(boot):
    found = boot(ECHO, stdin="hello.")
    assert (found.out, found.status) == ("hello", 1)


def test_the_serial_line_can_be_a_file(boot, tmp_path):
    found = boot(ECHO, "--serial", f"file:{tmp_path / 'out'}", "--timeout", "0.5", stdin="x.")
    assert found.out == ""
    assert (tmp_path / "out").read_bytes() == b""
    assert found.status == 6  # nobody types into a file


def test_the_serial_line_can_be_nothing():
    found = undervisor("run", example("svm"), "--cpu", "amd", "--no-summary", "--serial", "null")
    assert (found.out, found.status) == ("", 1)


def test_a_flat_binary_starts_in_real_mode_where_it_is_told_to(tmp_path):
    path = tmp_path / "flat"
    path.write_bytes(b"\xb8\x03\x00\xe7\xf4")  # MOV AX, 3; OUT F4H, AX
    assert undervisor("run", path, "--raw", "0x7c00", "--no-summary").status == 7


def test_modules_and_the_command_line_reach_the_guest(tmp_path):
    extra = tmp_path / "module"
    extra.write_bytes(b"M" * 4096)
    path = tmp_path / "guest.elf"
    # Exit with the number of modules and the first letter of the command line.
    path.write_bytes(
        image(
            "mov 16(%ebx), %ecx; movzbl (%ecx), %eax; add 20(%ebx), %eax; mov $0xf4, %dx;"
            "out %eax, %dx"
        )
    )
    words = ("--append", "!x", "--module", f"{extra} its words", "--module", str(extra))
    found = undervisor("run", path, "--no-summary", *words)
    first = found.status >> 1
    assert first in (ord("!") + 2, ord(str(path)[0]) + 2)  # some loaders put the name first


# -- what a guest can do wrong -----------------------------------------------------------------


def test_a_triple_fault_ends_with_the_registers(boot):
    found = boot(TRIPLE_FAULT)
    assert found.status == 4
    assert found.message.startswith("triple fault of L1 on vCPU 0")
    assert "rcx 000000001234abcd" in found.err
    assert "idtr" in found.err


def test_a_triple_fault_of_l1_shows_its_l2_as_well(tmp_path):
    from undervisor.guest.loops import Loop

    # L2's HLT ends the loop; then L1 writes to a port and we let it die instead.
    data = bytearray(Loop("vmmcall", 1, 1, "svm").elf())
    dead = b"\x0f\x01\x1c\x25\x00\x00\x00\x00\x0f\x0b"  # LIDT [0]; UD2
    end = data.index(b"\xba\xf4\x00\x00\x00\xef")  # MOV EDX, F4H; OUT DX, EAX
    data[end : end + len(dead)] = dead
    path = tmp_path / "dying.elf"
    path.write_bytes(data)
    found = undervisor("run", path, "--cpu", "amd", "--no-summary")
    assert found.status == 4
    assert "L1 on vCPU 0:" in found.err
    assert "L2 on vCPU 0, suspended:" in found.err


def test_a_guest_that_never_ends_is_ended_at_the_limit(boot):
    started = time.monotonic()
    found = boot(SPIN, "--timeout", "0.5")
    assert (found.status, time.monotonic() - started < 20) == (6, True)
    assert "time limit" in found.message


def test_a_guest_that_waits_for_input_is_ended_at_the_limit_too(tmp_path):
    path = tmp_path / "guest.elf"
    path.write_bytes(image(ECHO))
    words = command("run", path, "--no-summary", "--timeout", "0.5")
    with subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.wait(30) == 6


def test_a_guest_that_waits_for_ever_is_not_waited_for(boot):
    found = boot(IDLE)
    assert found.status == 4
    assert "cannot come" in found.message


# -- what can happen to the process ------------------------------------------------------------


def started(path, *words):
    return subprocess.Popen(
        command("run", path, "--no-summary", *words),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def the_child_of(process):
    """The process that holds the machine, once it runs."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
            children = file.read().split()
        if children:
            return int(children[0])
        time.sleep(0.01)
    raise AssertionError("no child")


@pytest.fixture
def spinning(tmp_path):
    path = tmp_path / "guest.elf"
    path.write_bytes(image("mov $0x3f8, %dx; mov $10, %al; out %al, %dx;" + SPIN))
    with started(path) as process:
        assert process.stdout.readline() == "\n"
        yield process
        process.kill()


def test_a_crash_of_the_processor_library_is_one_line_and_exit_code_8(spinning):
    os.kill(the_child_of(spinning), signal.SIGSEGV)
    _, err = spinning.communicate(timeout=30)
    assert spinning.returncode == 8
    assert err.startswith("undervisor: the machine's process died of SIGSEGV\n")


def test_control_c_ends_the_run(spinning):
    the_child_of(spinning)
    spinning.send_signal(signal.SIGINT)
    _, err = spinning.communicate(timeout=30)
    assert (spinning.returncode, err) == (130, "")


def test_the_machine_does_not_outlive_us(spinning):
    child = the_child_of(spinning)
    spinning.kill()
    spinning.wait(30)
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{child}/stat") and time.monotonic() < deadline:
        with open(f"/proc/{child}/stat") as file:
            if file.read().split()[2] == "Z":
                break
        time.sleep(0.05)
    else:
        assert not os.path.exists(f"/proc/{child}/stat")


def test_output_that_nobody_reads_ends_the_run_quietly(tmp_path):
    path = tmp_path / "guest.elf"
    path.write_bytes(image("mov $0x3f8, %dx; mov $10, %al; 1: out %al, %dx; jmp 1b"))
    with started(path) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(30) == 141
        assert process.stderr.read() == ""


# -- trace, timeline, summary ------------------------------------------------------------------


def test_the_trace_shows_the_transitions_that_the_filter_lets_through():
    words = ("--cpu", "intel", "--serial", "null", "--no-summary", "--trace")
    found = undervisor("run", example("vmx"), *words, "--trace-filter", "level=2,to=1,reason=cpuid")
    lines = found.err.splitlines()
    assert len(lines) == 3
    assert all("L2 -> L0 -> L1  CPUID" in line for line in lines)


def test_everything_is_json_on_request():
    found = undervisor("run", example("svm"), "--cpu", "amd", "--json", "--trace-filter", "to=2")
    documents = [json.loads(line) for line in found.out.splitlines()]
    kinds = [document["type"] for document in documents]
    assert set(kinds) == {"serial", "transition", "summary"}
    assert kinds[-1] == "summary"
    text = "".join(d["text"] for d in documents if d["type"] == "serial")
    assert text.endswith("passed\n")
    assert documents[-1]["status"] == 1
    assert found.err == ""


def test_the_timeline_is_written_whole(tmp_path):
    path = tmp_path / "timeline.json"
    found = undervisor(
        "run", example("svm"), "--cpu", "amd", "--cpus", "2", "--no-summary", "--timeline", path
    )
    assert found.status == 1
    events = json.loads(path.read_text())["traceEvents"]
    boxes = [event for event in events if event["ph"] == "X"]
    assert {(box["pid"], box["tid"]) for box in boxes} == {
        (vcpu, lane) for vcpu in (0, 1) for lane in (0, 1, 2)
    }
    assert all(box["ts"] >= 0 and box["dur"] > 0 for box in boxes)


def test_the_summary_is_a_tree_and_a_table_on_stderr():
    found = undervisor("run", example("vmx"), "--cpu", "intel", "--serial", "null")
    assert "L0  undervisor: CPU model intel" in found.err
    assert "reflected to L1" in found.err
    assert found.out == ""


@pytest.mark.parametrize(("vendor", "cpu"), [("svm", "amd"), ("vmx", "intel")])
def test_two_runs_give_the_same_trace_byte_for_byte(vendor, cpu):
    words = ("--cpu", cpu, "--cpus", "4", "--trace", "--no-summary", "--serial", "null")
    one, other = (undervisor("run", example(vendor), *words) for _ in range(2))
    assert one.err == other.err
    assert one.err.count("\n") > 10_000
    assert all(f"vCPU {index}" in one.err for index in range(4))
