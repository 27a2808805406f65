"""The KVM of this machine as a target: an agent in a child for each image that runs."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

from undervisor.errors import BadInput
from undervisor.targets import Abilities, Job
from undervisor.targets.bridge import BridgeRunning, abilities, begin, check_cpus
from undervisor.targets.kvm.device import Facts, Kernel, facts
from undervisor.targets.kvm.link import Link

HOST: Final = "host"
"""The only CPU model: what KVM can give."""
SEND_TIME: Final = 30.0
"""Seconds in which the other end must take what is sent."""
GRACE: Final = 1.0
"""Seconds in which an agent must end that has nobody to speak to."""
_READ: Final = 1 << 16
_SOURCE: Final = str(Path(__file__).parents[3])
AGENT: Final = (
    # Isolated and without site-packages: it needs neither, and starts in half the time.
    sys.executable, "-I", "-S", "-c",
    "import sys; sys.path.insert(0, sys.argv.pop(1)); "
    "from undervisor.targets.kvm.agent import main; main(sys.argv[1:])",
    _SOURCE,
)  # fmt: skip


class SocketStream:
    """A socket as a stream."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        connection.settimeout(SEND_TIME)

    def send(self, data: bytes) -> None:
        """All of `data`; TimeoutError where the other end takes none of it."""
        self._connection.sendall(data)

    def receive(self, timeout: float) -> bytes:
        """Some bytes, or none after `timeout` seconds; EOFError where the other end is gone."""
        number = self._connection.fileno()
        if number < 0:  # another thread has closed it
            raise EOFError
        ready, _, _ = select.select([number], [], [], timeout)
        if not ready:
            return b""
        data = self._connection.recv(_READ)
        if not data:
            raise EOFError
        return data


class KvmRunning(BridgeRunning):
    """A machine here, with its agent."""

    def __init__(self, link: Link, process: subprocess.Popen[bytes], line: socket.socket) -> None:
        super().__init__(link, 1)
        self._process, self._line = process, line

    @property
    def pid(self) -> int:
        """The agent's process, which leads the group that the machine's is in."""
        return self._process.pid

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        end_agent(self._process, self._line)


def end_agent(process: subprocess.Popen[bytes], line: socket.socket) -> None:
    """End an agent and its machine, now: the agent by itself, so that it waits for its child."""
    line.close()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class KvmTarget:
    """KVM here; `agent` is the command that starts one."""

    name = "kvm"

    def __init__(
        self, cpu: str = HOST, interrupt_every: float = 0.0, agent: Sequence[str] = AGENT
    ) -> None:
        if cpu != HOST:
            raise BadInput(
                f"the target kvm has no CPU model {cpu!r}",
                hint="its processors are the host's: --cpu host",
            )
        self.interrupt_every = interrupt_every
        self._agent = tuple(agent)

    @property
    def facts(self) -> Facts:
        """What KVM says of itself; BadInput where there is none, or no right to it."""
        return facts(Kernel())

    @property
    def abilities(self) -> Abilities:
        """What it can do."""
        return abilities(self.facts, os.cpu_count() or 1)

    def start(self, job: Job) -> KvmRunning:
        """Start an image; BadInput where it does not fit or there is no KVM."""
        job.place()  # bad input is told before anything starts
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                self._agent, stdin=theirs.fileno(), stdout=theirs.fileno(), start_new_session=True
            )
        try:
            link = Link(SocketStream(ours))
            check_cpus(job, link.open())
            begin(link, 1, job, self.interrupt_every)
        except BaseException:
            end_agent(process, ours)
            raise
        return KvmRunning(link, process, ours)
