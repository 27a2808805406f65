"""The proof of `check --live`: a guest that enters VMX operation or enables SVM and runs an L2."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.svm.vmcb import SIZE, Vmcb, VmcbField
from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField
from undervisor.errors import GuestDied, TimedOut, UndervisorError
from undervisor.guest.asm import assemble
from undervisor.guest.image import Image
from undervisor.guest.probe.client import Batch, Probe
from undervisor.guest.probe.program import FREE, LEAST_RAM, program
from undervisor.guest.probe.svm_setup import l2_vmcb, svm_on
from undervisor.guest.probe.vmx_setup import l2_fields, vmx_on
from undervisor.host.checks.live import Proof
from undervisor.targets import Job, Running, Target

TIME: Final = 20.0
"""Seconds for one answer of the guest; a healthy one takes milliseconds."""
_GRACE: Final = 1.0
PAGES: Final = tuple(FREE + 0x10000 + 0x1000 * number for number in range(5))
"""Pages of the guest for the structures, the code and the stack of its L2."""
_PART, _SUM = 41, 46
"""What L2 is given, and what it must make of it."""
_CODE: Final = "mov $5, %eax; add %rbx, %rax; "


def prove(target: Target, vendor: str) -> Proof:
    """Run a guest on `target` and, with `vendor`'s extension, an L2 in it."""
    begin = time.monotonic()
    job = Job(Image.parse(program().elf, "probe"), memory=LEAST_RAM)
    try:
        running = target.start(job)
    except UndervisorError as error:
        return Proof(vendor, False, "the start of the guest", str(error))
    with running:
        probe = Probe(running, TIME)
        try:
            probe.wait_for_hello()
        except UndervisorError as error:
            return Proof(vendor, False, "the guest's first word", _why(error, running))
        started = Proof(vendor, True, boot_seconds=time.monotonic() - begin)
        return _nest(started, probe, running) if vendor else started


def _nest(started: Proof, probe: Probe, running: Running) -> Proof:
    """What comes of an L2 in a guest that has started."""
    begin = time.monotonic()
    try:
        left = _RUN[started.vendor](probe)
    except UndervisorError as error:
        step = f"an L2 with {started.vendor}"
        return replace(started, failed=step, why=_why(error, running))
    return replace(started, l2_exit=left, l2_seconds=time.monotonic() - begin)


def _why(error: UndervisorError, running: Running) -> str:
    """What went wrong, and how the machine ended where it has."""
    try:
        return f"{error.message}; {running.wait(_GRACE).text}"
    except TimedOut:
        return error.message


def _vmx(probe: Probe) -> str:
    region, vmcs, code, stack, scratch = PAGES
    facts = vmx_on(probe, region, vmcs)
    fields = {int(f): value for f, value in l2_fields(facts, code, stack + 0x1000).items()}
    batch = Batch()
    batch.write(code, assemble(_CODE + "vmcall").bytes)
    wrote = batch.vmwrites(fields, scratch)
    run = batch.vmx_run({"rbx": _PART})
    reason = batch.vmread(VmcsField.EXIT_REASON)
    probe.run(batch)
    count, outcome = wrote.value
    if not outcome.succeeded:
        field = VmcsField(list(fields)[count])
        raise GuestDied(f"VMWRITE of {field.name}: {outcome.outcome.value} {outcome.error}")
    result = run.value.result
    if not result.succeeded:
        raise GuestDied(f"VMLAUNCH: {result.outcome.value} {result.error}")
    number = reason.value.value
    names = {int(one): one.name for one in ExitReason}
    text = f"VM exit {number:#x} ({names.get(number & 0xFFFF, 'unknown')})"
    return _judged(text, number == ExitReason.VMCALL, run.value.registers["rax"])


def _svm(probe: Probe) -> str:
    save, vmcb, code, stack, _ = PAGES
    l1 = svm_on(probe, save)
    batch = Batch()
    batch.write(code, assemble(_CODE + "vmmcall").bytes)
    batch.write(vmcb, bytes(l2_vmcb(l1, code, stack + 0x1000)))
    run = batch.svm_run(vmcb, {"rbx": _PART})
    after = batch.read(vmcb, SIZE)
    probe.run(batch)
    _ = run.value
    area = Vmcb(bytearray(after.value))
    number = area[VmcbField.EXITCODE]
    names = {int(one): one.name for one in ExitCode}
    text = f"#VMEXIT {number:#x} ({names.get(number, 'unknown')})"
    return _judged(text, number == ExitCode.VMMCALL, area[VmcbField.RAX])


def _judged(text: str, expected: bool, result: int) -> str:
    if not expected:
        raise GuestDied(f"L2 left with {text}, not with the call at its end")
    if result != _SUM:
        raise GuestDied(f"L2 computed {result}, not {_SUM}")
    return text


_RUN: Final[dict[str, Callable[[Probe], str]]] = {"vmx": _vmx, "svm": _svm}
