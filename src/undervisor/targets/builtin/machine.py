"""A machine of the built-in L0 made of a job, and the L0's words for its end as a target's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from undervisor.devices.serial import Input
from undervisor.hypervisor import models
from undervisor.hypervisor.machine import Machine
from undervisor.hypervisor.trace import NO_TRACE, Tracer
from undervisor.hypervisor.verdict import Ending, Outcome
from undervisor.targets import End, How, Job

_HOW: Final = {
    Ending.GUEST: How.FINISHED,
    Ending.TRIPLE_FAULT: How.GUEST_DIED,
    Ending.VMX_ABORT: How.GUEST_DIED,
    Ending.IDLE: How.IDLE,
    Ending.TIMEOUT: How.TIMED_OUT,
    Ending.STOPPED: How.STOPPED,
    Ending.UNKNOWN_EXIT: How.TARGET_DIED,
}


def build(
    job: Job,
    model: models.CpuModel,
    *,
    serial: Callable[[bytes], None] = lambda data: None,
    source: Input | None = None,
    tracer: Tracer = NO_TRACE,
    quirks: Iterable[str] = (),
    kind: type[Machine] = Machine,
) -> Machine:
    """A machine with the image in its memory, ready to run; BadInput where it does not fit."""
    job.place()  # before any memory is taken
    machine = kind(
        model,
        memory_size=job.memory,
        cpus=job.cpus,
        command_line=job.append,
        serial=serial,
        source=source,
        tracer=tracer,
        quirks=quirks,
    )
    placement = job.place(machine.platform.rsdp)
    for gpa, size in placement.clear:
        machine.memory.clear(gpa, size)
    for gpa, data in placement.pieces:
        machine.memory.write(gpa, data)
    machine.boot(placement.boot)
    return machine


def how_it_ended(outcome: Outcome) -> End:
    """The outcome of the L0 in the words of targets."""
    text, _, report = outcome.text.partition("\n")
    return End(_HOW[outcome.ending], text, outcome.status, report)
