"""The KVM of a lab's L1 as a target: a real kvm_amd or kvm_intel runs the probe and its L2.

L1 is started when the first machine is, and again where it has died; it ends with this process.
The tests run here: in L1 there is only the agent of the `kvm` target.
"""

from __future__ import annotations

import atexit
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from undervisor.errors import BadInput
from undervisor.lab import ports
from undervisor.lab.plan import Plan
from undervisor.lab.stack import Lab
from undervisor.targets import Abilities, Job
from undervisor.targets.bridge import BridgeRunning, BridgeTarget
from undervisor.targets.kvm.target import HOST, SocketStream

PATIENCE: Final = 10.0
"""Times the built-in L0's: KVM itself is emulated where the host has no nesting."""
MOST_CPUS: Final = 4
"""Of a machine.  More wait for each other so long on L1's processor that no test ends in time."""
AGENT: Final = (
    f"setsid python3 -m undervisor.targets.kvm.agent /lab/ports/{ports.port(ports.AGENT, 1)} "
    ">/tmp/agent.log 2>&1 </dev/null & echo started"
)
"""The shell command that starts the agent in L1."""


def _lab() -> Lab:
    # One processor: more gain nothing under TCG, and an L1 with two has hung there.
    return Lab(plan=Plan(python=True, cpus=1))


class _LineToL1(SocketStream):
    """The agent's line, which at its end says what QEMU, or L1, said at theirs."""

    def __init__(self, connection: socket.socket, lab: Lab) -> None:
        super().__init__(connection)
        self._lab = lab

    def send(self, data: bytes) -> None:
        """As `SocketStream`; EOFError with L1's last words where L1 is gone."""
        try:
            super().send(data)
        except TimeoutError:
            raise
        except OSError:
            raise self._end() from None

    def receive(self, timeout: float) -> bytes:
        """As `SocketStream`; EOFError with L1's last words where L1 is gone."""
        try:
            return super().receive(timeout)
        except (EOFError, OSError):
            raise self._end() from None

    def _end(self) -> EOFError:
        return EOFError(self._lab.last_words() or "its line is closed")


class LabTarget:
    """A Linux L1 with KVM, started when it is needed."""

    name = "lab"

    def __init__(self, cpu: str = HOST, make: Callable[[], Lab] = _lab) -> None:
        if cpu != HOST:
            raise BadInput(
                f"the target lab has no CPU model {cpu!r}",
                hint="its processors are L1's: --cpu host",
            )
        self._make = make
        self._lab: Lab | None = None
        self._bridge: BridgeTarget | None = None
        self._line: socket.socket | None = None
        self._abilities: Abilities | None = None

    @property
    def abilities(self) -> Abilities:
        """What L1's KVM can do; BadInput where L1 has none.  L1 is asked once."""
        if self._abilities is None:
            abilities = self._up().abilities
            most = min(MOST_CPUS, abilities.most_cpus)
            self._abilities = replace(abilities, most_cpus=most)
        return self._abilities

    def start(self, job: Job) -> BridgeRunning:
        """Start an image on L1's KVM, in a new L1 where the old one has died."""
        return self._up().start(job)

    def close(self) -> None:
        """End L1."""
        atexit.unregister(self.close)
        lab, line = self._lab, self._line
        self._lab = self._line = self._bridge = None
        if line is not None:
            line.close()
        if lab is not None:
            lab.close()

    def _up(self) -> BridgeTarget:
        if self._bridge is None or not self._bridge.alive:
            self.close()
            atexit.register(self.close)
            self._lab = self._make()
            self._lab.start(levels=1)
            self._lab.level(1).run(AGENT)
            self._line = self._lab.stream(ports.AGENT)
            stream = _LineToL1(self._line, self._lab)
            self._bridge = BridgeTarget(stream, self.name, patience=PATIENCE)
        return self._bridge
