"""`Lab`: a stack of real Linux levels, built, started, spoken to and ended."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final

from undervisor.errors import BadInput, GuestDied, TimedOut
from undervisor.host.access.protocol import Output
from undervisor.host.fact import Known, Unknown
from undervisor.lab import images, machines, ports, vmm
from undervisor.lab.cache import Cache
from undervisor.lab.host import LabHost, connect, depth_of, running
from undervisor.lab.keeper import READY, STAY
from undervisor.lab.places import DEFAULT, LOG, PLAN, Place
from undervisor.lab.plan import Plan
from undervisor.lab.progress import SILENT, Progress
from undervisor.lab.sources import sources

BOOT_SECONDS: Final = 180.0
"""For one level.  The slowest here, L3 under emulation, takes a tenth of that."""
RUN_SECONDS: Final = 60.0
_OUTPUT: Final = 8 << 20
_LONGEST_SOCKET: Final = 107  # bytes of a Unix socket's path
_LOOK_EVERY: Final = 1.0
_GRACE: Final = 5.0
_VMM_LOG: Final = "/tmp/vmm.log"
_VMM_PID: Final = "/run/vmm.pid"
_POWER_OFF: Final = b"off\n"


@dataclass(frozen=True, slots=True)
class Step:
    """Something that took time: seconds."""

    name: str
    seconds: float


@dataclass(slots=True)
class Level:
    """A level of a running lab."""

    number: int
    host: LabHost

    def run(self, command: str, timeout: float = RUN_SECONDS) -> Output:
        """Run a line of shell there.

        TimedOut after `timeout` seconds, and the command is killed; GuestDied where the level does
        not answer.
        """
        # `eval` keeps a command that can't be parsed, or ends with `&`, from breaking the request.
        fact = self.host.execute(f"eval {shlex.quote(command)}", timeout, _OUTPUT)
        if isinstance(fact, Known):
            status, out, err = fact.value
            return Output(status, out.decode("utf-8", "replace"), err.decode("utf-8", "replace"))
        code = fact.code if isinstance(fact, Unknown) else ""
        if code == "ETIMEDOUT":
            raise TimedOut(f"L{self.number}: `{command}` did not end in {timeout:g} seconds")
        raise GuestDied(f"L{self.number} does not answer: {fact}")

    def text(self, command: str) -> str:
        """The stripped standard output of a command, whatever its status."""
        return self.run(command).stdout.strip()


@dataclass(slots=True)
class Lab:
    """A lab; `with Lab(depth=2) as lab:` builds it, starts it and ends it.

    With a name it can be found by others while it runs (`undervisor lab ls`); `keep` lets it run
    on after this process.  BadInput where something is missing on this host, GuestDied where a
    level ends or does not start, TimedOut where one takes too long.
    """

    depth: int = 2
    cpus: int = 1
    name: str = ""
    plan: Plan = field(default=None)  # type: ignore[assignment]
    cache: Cache = field(default_factory=Cache)
    progress: Progress = SILENT
    steps: list[Step] = field(default_factory=list)
    accelerator: str = ""
    _place: Place | None = None
    _keeper: subprocess.Popen[bytes] | None = None
    _levels: dict[int, Level] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.plan is None:
            self.plan = Plan(depth=self.depth, cpus=self.cpus)
        self.depth, self.cpus = self.plan.depth, self.plan.cpus

    @classmethod
    def attach(cls, name: str = DEFAULT) -> Lab:
        """A lab that runs already; leaving its `with` block does not end it."""
        place = running(name)
        record = place.record()
        lab = cls(name=name, plan=Plan(depth=depth_of(place), cpus=int(record.get("cpus", 1))))
        lab.accelerator = str(record.get("accelerator", ""))
        lab._place = place
        return lab

    # -- starting ------------------------------------------------------------------------------

    def start(self, levels: int = 0) -> Lab:
        """Build all and start the levels, the outermost first; with `levels` no more than these."""
        try:
            self._start(levels or self.depth)
        except BaseException:
            self.close()
            raise
        return self

    def _start(self, levels: int) -> None:
        self._free_place()  # said before anything is built
        self.accelerator = machines.accelerator(self.plan)
        qemu = vmm.host_qemu()
        with self._step("images"):
            found = sources(self.plan, self.cache, self.progress)
            made = images.build(self.plan, found, self.cache, self.progress)
        self._place = self._new_place()
        command = machines.outer(self.plan, made, qemu, self.accelerator)
        with self._step("L1"), self.progress.working(f"starting L1 ({self.accelerator})"):
            self._start_keeper(self._place, command)
            self._wait_for(1)
        for number in self.plan.levels[1:levels]:
            working = self.progress.working(f"starting L{number} under the KVM of L{number - 1}")
            with self._step(f"L{number}"), working:
                self._start_inner(number)
                self._wait_for(number)

    def _free_place(self) -> Place:
        """Where the lab is going to be; BadInput where one of that name runs."""
        place = Place.named(self.name or f"run-{os.getpid()}-{secrets.token_hex(3)}")
        if place.runs():
            raise BadInput(
                f"the lab {place.name} runs already", hint=f"undervisor lab down {place.name}"
            )
        return place

    def _new_place(self) -> Place:
        place = self._free_place()
        longest = max(len(f"/{stream}.qemu") for stream in ports.of_lab(self.depth))
        if len(os.fsencode(place.folder)) + longest > _LONGEST_SOCKET:
            raise BadInput(
                f"{place.folder} is too long for the sockets that a lab has in it",
                hint="a shorter name, or XDG_RUNTIME_DIR set to a shorter folder",
            )
        place.remove()
        place.folder.mkdir(mode=0o700)
        return place

    def _start_keeper(self, place: Place, command: list[str]) -> None:
        about = {"depth": self.depth, "cpus": self.cpus, "accelerator": self.accelerator}
        plan = {"command": command, "streams": list(ports.of_lab(self.depth)), "about": about}
        (place.folder / PLAN).write_text(json.dumps(plan))
        with (place.folder / "keeper.log").open("wb") as log:
            self._keeper = subprocess.Popen(
                [sys.executable, "-P", "-m", "undervisor.lab.keeper", str(place.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        assert self._keeper.stdout is not None
        if self._keeper.stdout.readline() != READY:
            raise GuestDied(f"L1 did not start: {self._last_words(place)}")

    def _last_words(self, place: Place) -> str:
        """What QEMU, or the keeper, said at its end."""
        for name in (LOG, "keeper.log"):
            with contextlib.suppress(OSError):
                text = (place.folder / name).read_text(errors="replace").strip()
                lines = [line for line in text.splitlines() if "TCG doesn't support" not in line]
                if lines:
                    return lines[-1]
        return "without a word"

    def _start_inner(self, number: int) -> None:
        """Start a level under the KVM of the one outside; GuestDied says what that one lacks."""
        outside = self.level(number - 1)
        if outside.run("test -c /dev/kvm").status:
            log = outside.text("dmesg | grep -iE 'kvm|svm|vmx' | tail -n 1")
            raise GuestDied(
                f"L{number - 1} has no /dev/kvm: its KVM did not load ({log or 'it says nothing'})",
                hint="the processor of that level has no nested virtualization",
            )
        command = machines.inner(self.plan, number)
        outside.run(f"setsid {command} >{_VMM_LOG} 2>&1 </dev/null & echo $! >{_VMM_PID}")

    def _wait_for(self, number: int) -> None:
        """Until the level's shell answers."""
        assert self._place is not None
        word = secrets.token_hex(8)
        deadline = time.monotonic() + BOOT_SECONDS
        with connect(self._place, ports.port(ports.SHELL, number)) as line:
            line.sendall(f"echo {word[:8]}''{word[8:]}\n".encode())
            said = b""
            while word.encode() not in said:
                if time.monotonic() > deadline:
                    raise TimedOut(
                        f"L{number} did not come up in {BOOT_SECONDS:g} seconds; the end of its "
                        f"console: {self._console_end(number)}"
                    )
                if select.select([line], [], [], _LOOK_EVERY)[0]:
                    said += line.recv(4096)
                self._must_live(number)

    def _must_live(self, number: int) -> None:
        """GuestDied where the VMM of a level has ended."""
        assert self._place is not None
        if not self._place.runs():
            raise GuestDied(self._end_of_l1(self._place))
        if number > 1:
            outside = self.level(number - 1)
            if outside.run(f"kill -0 $(cat {_VMM_PID})").status:
                said = outside.text(f"tail -n 1 {_VMM_LOG}")
                raise GuestDied(
                    f"L{number} ended: its VMM in L{number - 1} says {said or 'nothing'}; "
                    f"the end of its console: {self._console_end(number)}"
                )

    def _console_end(self, number: int) -> str:
        assert self._place is not None
        with contextlib.suppress(OSError):
            raw = self._place.log(ports.port(ports.CONSOLE, number)).read_bytes()
            lines = raw.decode("utf-8", "replace").replace("\r", "").strip().splitlines()
            return lines[-1][-200:] if lines else "nothing"
        return "nothing"

    @contextlib.contextmanager
    def _step(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.steps.append(Step(name, time.monotonic() - start))

    # -- using -----------------------------------------------------------------------------------

    @property
    def place(self) -> Place:
        """Where it runs; BadInput where it does not."""
        if self._place is None:
            raise BadInput("the lab has not been started")
        return self._place

    def level(self, number: int) -> Level:
        """L1, L2, ...; BadInput for one that the lab does not have."""
        if number not in self.plan.levels:
            raise BadInput(f"this lab has no L{number}", hint=f"L1 to L{self.depth}")
        if number not in self._levels:
            self._levels[number] = Level(number, LabHost(self.place, number))
        return self._levels[number]

    def stream(self, name: str, level: int = 1) -> socket.socket:
        """A byte stream to a level: `agent` leads to `/lab/ports/agent.l1` in L1.

        One user at a time; the level's program opens its port for reading and writing at once.
        """
        try:
            return connect(self.place, ports.port(name, level))
        except OSError as error:
            raise BadInput(f"no stream {name} of L{level}: {error.strerror}") from None

    def keep(self) -> None:
        """Let the lab run on when this process ends."""
        if self._keeper is not None and self._keeper.stdin is not None:
            self._keeper.stdin.write(STAY)
            self._keeper.stdin.flush()

    def note(self, **about: Any) -> None:
        """Add to what is recorded of the lab."""
        self.place.write({**self.place.record(), **about})

    def last_words(self) -> str:
        """How L1 ended, in QEMU's last words or the console's; empty while it runs.

        A line to L1 closes a moment before the process is gone.
        """
        if self._place is None:
            return ""
        _until_gone(self._place, _LOOK_EVERY)
        return "" if self._place.runs() else self._end_of_l1(self._place)

    def _end_of_l1(self, place: Place) -> str:
        console = self._console_end(1)
        return f"L1 ended: {self._last_words(place)}; the end of its console: {console}"

    # -- ending ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Power L1 off, and with it all others; what does not end in time is killed."""
        for level in self._levels.values():
            level.host.close()
        place, self._place, self._levels = self._place, None, {}
        if place is not None:
            end(place, self._keeper)
        if self._keeper is not None:
            _finish(self._keeper)
            for pipe in (self._keeper.stdin, self._keeper.stdout):
                assert pipe is not None
                pipe.close()
            self._keeper = None

    def __enter__(self) -> Lab:
        return self if self._place is not None else self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._keeper is not None:
            self.close()
        for level in self._levels.values():
            level.host.close()


def end(place: Place, keeper: subprocess.Popen[bytes] | None = None) -> bool:
    """End the lab there and remove its folder; whether it ran."""
    ran = place.runs()
    if ran:
        with contextlib.suppress(OSError), connect(place, ports.port(ports.CONTROL, 1)) as line:
            line.sendall(_POWER_OFF)
        _until_gone(place, _GRACE)
        pid = keeper.pid if keeper is not None else place.keeper()
        if pid is not None and place.runs():
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
                _until_gone(place, _GRACE)
    place.remove()
    return ran


def _finish(keeper: subprocess.Popen[bytes]) -> None:
    """End our own keeper, even where somebody has removed its folder."""
    try:
        keeper.terminate()
        keeper.wait(_GRACE)
    except subprocess.TimeoutExpired:
        keeper.kill()
        keeper.wait()


def _until_gone(place: Place, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while place.runs() and time.monotonic() < deadline:
        time.sleep(0.02)
