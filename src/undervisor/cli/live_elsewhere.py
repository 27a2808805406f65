"""`check --live` of another machine: the agent goes there as a file in memory, and runs the guests.

The other machine needs Python 3.11 and leave to use /dev/kvm; nothing is written there.
"""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Iterator
from typing import Final

from undervisor.arch.kvm import API_VERSION
from undervisor.cli.live_proof import prove
from undervisor.errors import BadInput, UndervisorError
from undervisor.host.access.protocol import KvmOffer
from undervisor.host.access.shell import ShellHost
from undervisor.host.checks.live import Proof
from undervisor.host.fact import Fact, Known, Unknown
from undervisor.targets.bridge import BridgeTarget
from undervisor.targets.kvm.archive import agent
from undervisor.targets.kvm.device import Facts
from undervisor.targets.kvm.target import SocketStream

_DEVICE: Final = "/dev/kvm"
_START_SECONDS: Final = 30.0
_PATIENCE_BYTES: Final = 1 << 16
"""What a machine may print before Python starts there: banners, and no more."""
_READY, _REFUSED = b"agent-awaited\n", b"agent-refused "
_BOOT: Final = """
import os, sys
if sys.version_info < (3, 11):
    os.write(1, b"agent-refused its Python is %d.%d, not 3.11\\n" % sys.version_info[:2])
    sys.exit()
os.write(1, b"agent-" + b"awaited\\n")
left = int(sys.argv[1])
number = os.memfd_create("agent")
while left:
    data = os.read(0, min(left, 1 << 16))
    if not data:
        sys.exit()
    left -= len(data)
    os.write(number, data)
sys.path.insert(0, "/proc/self/fd/%d" % number)
from undervisor.targets.kvm.agent import main
main([])
"""


def ask_and_prove(host: ShellHost) -> tuple[Fact[KvmOffer], Proof | None]:
    """What KVM there says of itself, and what comes of a guest that is run there."""
    try:
        with _agent_on(host) as target:
            facts = _facts(target)
            vmx, svm = ("vmx" in facts.vendors), ("svm" in facts.vendors)
            offer = KvmOffer(API_VERSION, facts.nested_state, vmx, svm)
            return Known(offer, _DEVICE), prove(target, "vmx" if vmx else "svm" if svm else "")
    except UndervisorError as error:
        why = error.message
    except OSError as error:
        why = f"the line to its agent broke: {error.strerror or error}"
    return Unknown(_DEVICE, why), None


def _facts(target: BridgeTarget) -> Facts:
    """What KVM there says; BadInput for JSON of another shape than an agent's."""
    try:
        return target.facts
    except (ValueError, TypeError, KeyError) as error:
        raise BadInput("what answers is no agent of ours") from error


@contextlib.contextmanager
def _agent_on(host: ShellHost) -> Iterator[BridgeTarget]:
    file = agent()
    boot = shlex.join(["exec", "python3", "-I", "-S", "-c", _BOOT, str(len(file))])
    missing = f"{_REFUSED.decode()}it has no python3"
    script = f"command -v python3 >/dev/null || {{ echo '{missing}'; exit; }}; {boot}"
    with host.hand_over(script) as line:
        stream = SocketStream(line)
        _await_ready(stream, host.name)
        stream.send(file)
        yield BridgeTarget(stream, host.name)


def _await_ready(stream: SocketStream, name: str) -> None:
    """Until Python there waits for the agent; BadInput where it does not come to that."""
    deadline = time.monotonic() + _START_SECONDS
    said = b""
    while _READY not in said:
        left = deadline - time.monotonic()
        if left <= 0 or len(said) > _PATIENCE_BYTES:
            raise BadInput(f"no Python starts on {name} within {_START_SECONDS:g} s")
        try:
            said += stream.receive(left)
        except EOFError:
            raise BadInput(f"the connection to {name} closed before Python started") from None
        _, refused, why = said.partition(_REFUSED)
        if refused and why.endswith(b"\n"):
            raise BadInput(why.decode("utf-8", "replace").strip())
