"""What `undervisor bench` measures, each thing once.

Rounds are timed by the wall clock and by the process's CPU time.  Ratios are of CPU time, which
other programs on the machine disturb least.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Final

from undervisor.arch.vmx.boundary import valid_state
from undervisor.arch.vmx.capabilities import CURRENT_PROCESSOR
from undervisor.arch.vmx.checks import ENTRY_RULES, EntryChecker, first_failure
from undervisor.arch.vmx.fields import VmcsField
from undervisor.cli.resident import resident_bytes
from undervisor.errors import GuestDied, UndervisorError
from undervisor.guest.image import Image
from undervisor.guest.loops import COMPUTE, MEMORY, ROUND_TRIPS_SVM, ROUND_TRIPS_VMX, Loop
from undervisor.hypervisor import models
from undervisor.hypervisor.machine import Machine
from undervisor.hypervisor.verdict import Ending
from undervisor.silicon.glue import EXIT_BUDGET, EXIT_IOIO
from undervisor.silicon.processor import RESUME, STOP
from undervisor.targets import Job
from undervisor.targets.builtin import build

RAM: Final = 64 << 20
CPU: Final = {"vmx": "intel", "svm": "amd", "": "amd"}
LIMIT: Final = 120.0
QEMU: Final = "qemu-system-x86_64"
_FOREVER: Final = 1 << 40


def _machine(loop: Loop, serial: Callable[[bytes], None], cpu: str = "") -> Machine:
    model = models.named(cpu or CPU[loop.vendor])
    image = Image.parse(loop.elf(model.vmx), "the measured loop")
    return build(Job(image, memory=RAM), model, serial=serial)


@dataclass(frozen=True, slots=True)
class Rounds:
    """Seconds of one round: medians over all but the first, in which code is translated."""

    wall: float
    cpu: float


Stamp = tuple[float, float]


def _now() -> Stamp:
    return time.perf_counter(), time.process_time()


def nested(loop: Loop) -> Rounds:
    """A loop in L2 (or in L1, without a vendor) on our L0."""
    stamps: list[Stamp] = []
    machine = _machine(loop, lambda data: stamps.append(_now()))
    outcome = machine.run(LIMIT)
    if outcome.ending is not Ending.GUEST or outcome.status != 1:
        raise GuestDied(f"the measured loop did not end well: {outcome.text} {outcome.status}")
    return _rounds(stamps)


def _rounds(stamps: list[Stamp]) -> Rounds:
    pairs = list(pairwise(stamps))[1:]
    wall, cpu = ([after[i] - before[i] for before, after in pairs] for i in (0, 1))
    return Rounds(statistics.median(wall), statistics.median(cpu))


def _at_first_round(loop: Loop) -> Machine:
    """A machine stopped when its guest, on no hypervisor, begins its first round."""
    machine = _machine(loop, lambda data: machine.request_stop())
    outcome = machine.run(LIMIT)
    if outcome.ending is not Ending.STOPPED:
        raise GuestDied(f"the measured loop did not start: {outcome.text}")
    return machine


def raw_exit(exits: int) -> float:
    """CPU seconds of a raw exit of the silicon: CPUID, stop, resume in the same process."""
    processor = _at_first_round(Loop(ROUND_TRIPS_VMX, _FOREVER, 1)).processor
    q = processor.state.q

    def on_exit(code: int) -> int:
        q[16] += 2
        return STOP

    run = processor.run
    for _ in range(min(exits, 1000)):
        run(on_exit)
    started = time.process_time()
    for _ in range(exits):
        run(on_exit)
    return (time.process_time() - started) / exits


def raw_loop(loop: Loop) -> Rounds:
    """A loop on the bare silicon under one level of nested paging."""
    processor = _at_first_round(loop).processor
    q, stamps = processor.state.q, [_now()]

    def on_exit(code: int) -> int:
        if code == EXIT_IOIO:  # the newline behind a round; OUT DX, AL is one byte
            stamps.append(_now())
            q[16] += 1
            processor.set_budget(_FOREVER)
            return STOP if len(stamps) > loop.rounds else RESUME
        if code != EXIT_BUDGET:
            raise GuestDied(f"the measured loop left the silicon with exit {code:#x}")
        processor.set_budget(_FOREVER)
        return RESUME

    processor.run(on_exit)
    return _rounds(stamps)


def round_trip_loop(vendor: str, count: int, rounds: int) -> Loop:
    """The loop whose every iteration is one round trip L2 -> L1 -> L2."""
    body = ROUND_TRIPS_VMX if vendor == "vmx" else ROUND_TRIPS_SVM
    return Loop(body, count, rounds, vendor)


def work_loop(kind: str, count: int, rounds: int, vendor: str = "") -> Loop:
    """The compute or the memory loop."""
    return Loop({"compute": COMPUTE, "memory": MEMORY}[kind], count, rounds, vendor)


def on_qemu(loop: Loop) -> Rounds | None:
    """A loop on QEMU's TCG; None where QEMU is not installed."""
    program = shutil.which(QEMU)
    if not program:
        return None
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "loop.elf"
        image.write_bytes(loop.elf())
        command = [program, "-accel", "tcg", "-cpu", "EPYC,+svm", "-m", str(RAM >> 20)]
        command += ["-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"]
        command += ["-device", "isa-debug-exit,iobase=0xf4,iosize=0x4", "-kernel", str(image)]
        stamps, status = _stamps_of(command)
    if status != 1 or len(stamps) != loop.rounds + 1:
        raise GuestDied(f"the measured loop did not end well on QEMU: status {status}")
    return _rounds(stamps)


def _stamps_of(command: list[str]) -> tuple[list[Stamp], int]:
    """When each newline came out of a program, with its CPU time then, and its exit status."""
    stamps: list[Stamp] = []
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline and (piece := os.read(process.stdout.fileno(), 1)):
            if piece == b"\n":
                stamps.append((time.perf_counter(), _cpu_time(process.pid)))
        if time.monotonic() >= deadline:
            process.kill()
    return stamps, process.returncode


def _cpu_time(pid: int) -> float:
    """Seconds that all threads of a process have run, to the nanosecond."""
    spent = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has ended
            spent += int((task / "schedstat").read_text().split()[0])
    return spent / 1e9


# -- whole processes ---------------------------------------------------------------------------


def first_l2(vendor: str, times: int) -> list[float]:
    """Seconds from the start of the process to the first instruction of L2, by the trace.

    Modules are compiled before, as they are after an installation.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        if "PYTHONDONTWRITEBYTECODE" in os.environ:
            environment["PYTHONPYCACHEPREFIX"] = folder
        _start(vendor, environment)
        return [_start(vendor, environment) for _ in range(times)]


def _start(vendor: str, environment: dict[str, str]) -> float:
    image = resources.files("undervisor") / "data" / "examples" / f"{vendor}.elf"
    with resources.as_file(image) as path:
        command = [sys.executable, "-P", "-m", "undervisor", "run", str(path), "--cpu", CPU[vendor]]
        command += ["--trace-filter", "to=2", "--no-summary", "--serial", "null"]
        started = time.perf_counter()
        with subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        ) as process:
            assert process.stderr is not None
            line = process.stderr.readline()
            spent = time.perf_counter() - started
            process.stderr.read()
    if b"-> L2" not in line:
        raise GuestDied(f"no L2 was entered: {line.decode(errors='replace').strip()}")
    return spent


# -- memory ------------------------------------------------------------------------------------


def example_resident(vendor: str, cpus: int) -> int:
    """Bytes in memory beside the guest's RAM after an example's run, in a process of its own."""
    image = resources.files("undervisor") / "data" / "examples" / f"{vendor}.elf"
    with resources.as_file(image) as path:
        command = [sys.executable, "-P", "-m", "undervisor", "run", str(path), "--cpu", CPU[vendor]]
        command += ["--json", "--cpus", str(cpus)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT)
    last = json.loads(done.stdout.splitlines()[-1])
    return int(last["resident_bytes"])


def growth(vendor: str, trips: int) -> int:
    """Bytes by which the process grew over the last nine tenths of so many round trips."""
    sizes: list[int] = []
    count = max(trips // 20, 1)
    loop = round_trip_loop(vendor, count, 20)
    machine = _machine(loop, lambda data: sizes.append(resident_bytes()))
    outcome = machine.run(LIMIT * 10)
    if outcome.status != 1:
        raise GuestDied(f"the measured loop did not end well: {outcome.text}")
    return sizes[-1] - sizes[2]


# -- checks of VM entry ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CheckRates:
    """States in a second: every rule, after one field was written, and all fields only read."""

    full: float
    incremental: float
    plain: float


ONE_TEST: Final = {
    "vmx": ("vmx.exits.cpuid_always_exits", "intel"),
    "svm": ("svm.state.an_exit_clears_the_injected_event", "amd"),
}


def one_test(vendor: str, peers: list[str], times: int) -> dict[str, list[float]]:
    """Seconds to boot the probe and run one test, on our L0 and on peers, in turn.

    As in a run of the whole suite: what the first starts on each find out is not asked again, and
    they are not counted.  A peer that is not installed has no times.
    """
    from undervisor.conformance.prelude import Earlier
    from undervisor.conformance.runner import run_test
    from undervisor.conformance.suite import select
    from undervisor.targets import catalogue

    name, cpu = ONE_TEST[vendor]
    (test,) = select([name])
    targets = {"builtin": catalogue.named("builtin", cpu)}
    seen: dict[str, list[float]] = {"builtin": []}
    for peer in peers:
        seen[peer] = []
        with contextlib.suppress(UndervisorError):
            target = catalogue.named(peer, cpu)
            if run_test(test, target).verdict.good:
                targets[peer] = target
    earlier = {where: Earlier() for where in targets}
    for where, target in targets.items():
        for _ in range(2):  # from then on, each start is like the next
            run_test(test, target, earlier[where])
    for _ in range(times):
        for where, target in targets.items():
            seen[where].append(run_test(test, target, earlier[where]).seconds)
    return seen


def checks(seconds: float) -> CheckRates:
    """The checks of a valid 64-bit state, and a plain pass over the fields that its rules read."""
    state = valid_state("long")
    checker = EntryChecker(CURRENT_PROCESSOR)
    written = {VmcsField.GUEST_RIP}
    assert checker.check(state, written) is None, (
        "a valid state is measured: every rule is looked at"
    )
    fields = tuple(dict.fromkeys(field for rule in ENTRY_RULES for field in rule.reads))

    def read_all() -> None:
        for field in fields:
            state[field]

    return CheckRates(
        _rate(lambda: first_failure(state), seconds),
        _rate(lambda: checker.check(state, written), seconds),
        _rate(read_all, seconds),
    )


def _rate(work: Callable[[], object], seconds: float) -> float:
    """How often `work` can be done in a second of CPU time."""
    done, started = 0, time.process_time()
    while (spent := time.process_time() - started) < seconds:
        for _ in range(50):
            work()
        done += 50
    return done / spent
