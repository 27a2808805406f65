"""QEMU as a target: its TCG, which emulates SVM, or KVM under it where that nests."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from undervisor.errors import BadInput
from undervisor.guest.image import Protocol
from undervisor.guest.rom import boot_rom
from undervisor.targets import Abilities, End, How, Job
from undervisor.targets.emulator import EmulatorRunning, Remains
from undervisor.targets.measured import features
from undervisor.targets.process import Program, cause, find

PROGRAM, PACKAGE = "qemu-system-x86_64", "qemu-system-x86"
MOST_CPUS: Final = 8
PATIENCE: Final = 3.0
TCG_MODELS: Final = {"amd": "max,+svm"}
KVM_MODELS: Final = {"amd": "host", "intel": "host"}
"""Our names of processors; any other is QEMU's own, with its overrides."""
ACCELERATORS: Final = {
    # One thread: processors that wait for each other in loops take turns, instead of keeping the
    # host's cores from the one that works.
    "tcg": "tcg,thread=single",
    "kvm": "kvm",
}
SOFTWARE_KVM: Final = Path("/sys/module/kvm_pvm")
_OPTIONS: Final = [
    *("-machine", "pc", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-S"),
    *("-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-d", "cpu_reset", "-D", "log"),
]
_GREETING: Final = b'{"execute":"qmp_capabilities"}{"execute":"cont"}'
"""The guest starts when the monitor has been told to report events, so that none is missed."""
_STOPPED: Final = '"event": "STOP"'
"""Nobody here pauses the machine: KVM met an error, and QEMU would wait for ever."""
_ELF64: Final = b"\x7fELF\x02"


class QemuTarget:
    """QEMU with a CPU model: "amd" (and under KVM "intel"), or QEMU's own words for one."""

    def __init__(self, cpu: str = "amd", accel: str = "tcg", binary: str = PROGRAM) -> None:
        """BadInput where the program, the model or nesting under KVM is not there."""
        self.cpu, self.accel = cpu, accel
        self.name = f"qemu ({cpu})" if accel == "tcg" else f"qemu, {accel} ({cpu})"
        self._model = _models(accel, cpu).get(cpu, cpu)
        self._binary = find(binary, PACKAGE)

    @cached_property
    def abilities(self) -> Abilities:
        """What its processors say: a machine is started once to ask them."""
        found = features(self)
        return Abilities(found & {"vmx", "svm"}, MOST_CPUS, found, patience=PATIENCE)

    def start(self, job: Job) -> EmulatorRunning:
        """Start an image, by `-kernel` if QEMU takes it and else from a ROM of ours."""
        if not 1 <= job.cpus <= MOST_CPUS:
            raise BadInput(f"{job.cpus} processors", hint=f"QEMU gets 1 to {MOST_CPUS} here")
        boot, files = _from_rom(job) if _needs_rom(job) else _by_kernel(job)
        line, their_line = socket.socketpair()
        monitor, their_monitor = socket.socketpair()
        with their_line, their_monitor:
            command = [self._binary, "-accel", ACCELERATORS[self.accel], "-cpu", self._model]
            command += ["-smp", str(job.cpus), "-m", f"{job.memory >> 10}k", *_OPTIONS]
            command += ["-chardev", f"socket,id=line,fd={their_line.fileno()}"]
            command += ["-serial", "chardev:line"]
            command += ["-chardev", f"socket,id=monitor,fd={their_monitor.fileno()}"]
            command += ["-mon", "chardev=monitor,mode=control", *boot]
            try:
                monitor.sendall(_GREETING)
                program = Program(command, files, [their_line, their_monitor])
            except BaseException:
                line.close()
                monitor.close()
                raise
        return EmulatorRunning(program, line, judge, monitor=monitor, fatal=_STOPPED.encode())


# -- the accelerators ----------------------------------------------------------------------------


def _tcg(cpu: str) -> dict[str, str]:
    if cpu == "intel":
        raise BadInput(
            "QEMU's TCG emulates AMD's SVM and not Intel's VMX",
            hint="VMX is on the targets builtin and bochs; --cpu amd is for this one",
        )
    return TCG_MODELS


def _kvm() -> dict[str, str]:
    from undervisor.targets.kvm.device import Kernel, facts

    if SOFTWARE_KVM.exists():
        raise BadInput(
            "/dev/kvm is kvm_pvm here, KVM in software, which has no nesting",
            hint="accel=tcg emulates SVM",
        )
    if not facts(Kernel()).vendors:
        raise BadInput(
            "/dev/kvm gives its guests neither VMX nor SVM",
            hint="nesting must be on in kvm_intel or kvm_amd (`undervisor enable`); accel=tcg "
            "emulates SVM without it",
        )
    return KVM_MODELS


def _models(accel: str, cpu: str) -> dict[str, str]:
    """Our names of CPU models; BadInput where the accelerator has not what `cpu` needs."""
    if accel not in ACCELERATORS:
        raise BadInput(f"QEMU's accelerator {accel!r}", hint=f"one of {', '.join(ACCELERATORS)}")
    return _tcg(cpu) if accel == "tcg" else _kvm()


# -- the image -----------------------------------------------------------------------------------

Boot = tuple[list[str], dict[str, bytes]]
"""QEMU's options and the files that they name."""


def _needs_rom(job: Job) -> bool:
    """Flat binaries, and what QEMU's loader of Multiboot refuses."""
    image = job.image
    is_elf64 = image.file.startswith(_ELF64)
    return not image.file or (image.protocol is Protocol.MULTIBOOT and is_elf64)


def _from_rom(job: Job) -> Boot:
    placement = job.place()
    options, files = ["-bios", "rom"], {"rom": boot_rom(placement)}
    for number, (gpa, data) in enumerate(placement.pieces):
        options += ["-device", f"loader,file=ram{number},addr={gpa:#x},force-raw=on"]
        files[f"ram{number}"] = data
    return options, files


def _by_kernel(job: Job) -> Boot:
    job.place()  # what does not fit is told in our words
    options = ["-kernel", "kernel"]
    files = {"kernel": job.image.file}
    if job.append:
        options += ["-append", job.append]
    if job.modules:
        words = []
        for module in job.modules:
            name = Path(module.name).name
            if name in files or name == "log":
                raise BadInput(f"the name {name} of a module is taken", hint="rename the file")
            files[name] = module.data
            words.append(f"{name} {module.cmdline}".strip().replace(",", ",,"))
        options += ["-initrd", ",".join(words)]
    return options, files


# -- the end -------------------------------------------------------------------------------------

_SHUTDOWNS: Final = {
    "guest-shutdown": (How.FINISHED, "ended by the guest: ACPI power-off"),
    "guest-reset": (How.FINISHED, "ended by the guest: reset"),
    "guest-panic": (How.GUEST_DIED, "the guest reported a panic"),
    "host-signal": (How.TARGET_DIED, "QEMU was ended from outside"),
}
_TRIPLE_FAULT: Final = End(How.GUEST_DIED, "triple fault")


def judge(remains: Remains) -> End:
    """How QEMU ended, from its events, its exit status and its log."""
    events = list(_events(remains.said.splitlines()))
    names = {event["event"] for event in events}
    words = remains.words.strip()
    if _STOPPED in remains.said:
        return End(How.TARGET_DIED, f"QEMU gave the machine up: {_last(words)}", report=words)
    for event in events:
        if event["event"] == "SHUTDOWN":
            return _shut_down(str(event["data"]["reason"]), remains)
    if "RESUME" in names and remains.status % 2 == 1 and remains.status > 0:
        return End(How.FINISHED, "ended by the guest: debug exit", remains.status, words)
    return End(How.TARGET_DIED, f"QEMU {cause(remains.status)}: {_last(words)}", report=words)


def _shut_down(reason: str, remains: Remains) -> End:
    log = remains.folder / "log"
    if reason == "guest-reset" and log.exists() and "Triple fault" in log.read_text():
        return _TRIPLE_FAULT
    how, text = _SHUTDOWNS.get(reason, (How.TARGET_DIED, f"QEMU ended by {reason}"))
    return End(how, text, report=remains.words.strip())


def _events(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            message = json.loads(line)
        except ValueError:  # a line that was cut off
            continue
        if isinstance(message, dict) and "event" in message:
            yield message


def _last(words: str) -> str:
    return words.splitlines()[-1] if words else "it said nothing"
