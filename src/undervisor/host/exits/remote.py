"""Trace KVM's events on another machine: what `live` does here, asked for in shell there.

Nothing of ours has to be installed there.  The tracing instance is removed at the end, and by a
watchdog of its own where the connection ends before.
"""

from __future__ import annotations

import contextlib
import math
import secrets
import shlex
from collections.abc import Generator, Iterator

from undervisor.errors import BadInput
from undervisor.host.access.protocol import Host
from undervisor.host.access.shell import ShellHost
from undervisor.host.exits.live import TRACEFS
from undervisor.host.exits.trace import LINE_LIMIT, TRACEPOINTS
from undervisor.host.fact import Denied, Fact, Known, Unknown

_WIDTH = 128
"""Characters of an event that are sent: the reason comes before them."""
_ANSWER_SECONDS = 30.0
_WATCHDOG_SECONDS = 60


def tracefs(host: Host) -> str:
    """Where tracefs is mounted there; BadInput where it is not, or not for this user."""
    for folder in TRACEFS:
        fact = host.listdir(f"{folder}/events/kvm")
        if isinstance(fact, Known):
            return folder
        if isinstance(fact, Denied | Unknown):
            raise BadInput(f"cannot trace on {host.name}: {fact}", hint="tracing needs root there")
    raise BadInput(
        f"{host.name} shows no KVM tracepoints",
        hint="as root there: mount -t tracefs nodev /sys/kernel/tracing; and KVM must be loaded",
    )


@contextlib.contextmanager
def instance(host: Host, folder: str, seconds: float) -> Iterator[str]:
    """A tracing instance there with KVM's events switched on, for `seconds` and a while."""
    place = f"{folder}/instances/undervisor-{secrets.token_hex(4)}"
    there = shlex.quote(place)
    # It tells its group when it is out of the shell's, and then holds nothing of the request.
    watchdog = "echo $$; exec >/dev/null; "
    watchdog += f"sleep {int(seconds) + _WATCHDOG_SECONDS}; rmdir {there}"
    script = (
        f"mkdir {there} || exit 1; "
        f"echo $(setsid sh -c {shlex.quote(watchdog)} 2>/dev/null </dev/null &); "
        f"for event in {' '.join(TRACEPOINTS)}; do "
        f"switch={there}/events/kvm/$event/enable; ! [ -e $switch ] || echo 1 >$switch; done"
    )
    made = _run(host, script)
    if not isinstance(made, Known):
        raise BadInput(f"cannot trace on {host.name}: {made}", hint="tracing needs root there")
    try:
        yield place
    finally:
        group = made.value.strip()
        kill = f"kill -- -{group}; " if group.isascii() and group.isdigit() else ""
        # A reader that was left behind ends with the next event; else the watchdog comes after it.
        _run(host, f"for i in 1 2 3; do rmdir {there} && {{ {kill}break; }}; sleep 1; done")


def lines(host: Host, place: str, seconds: float) -> Generator[list[str], None, None]:
    """What trace_pipe says there within `seconds`, in batches of whole lines.

    To be closed before the instance ends, so that nobody reads there any more.
    """
    if not isinstance(host, ShellHost):
        raise BadInput(f"{host.name} has no shell to trace through")
    pipe = shlex.quote(f"{place}/trace_pipe")
    # Whoever ends the reader loses what it holds, so it is ended once. BusyBox's cat would splice,
    # and events get lost there without a word.
    script = f"timeout {math.ceil(seconds)} dd bs=64k if={pipe} 2>&2 | cut -c 1-{_WIDTH}"
    rest = ""
    try:
        for piece in host.follow(script, seconds + _ANSWER_SECONDS):
            *whole, rest = (rest + piece.decode("utf-8", "replace")).split("\n")
            rest = rest[:LINE_LIMIT]
            yield whole
    except OSError as error:
        raise BadInput(f"tracing on {host.name} broke off: {error}") from error


def _run(host: Host, script: str) -> Fact[str]:
    """The output of a script that ended well."""
    fact = host.run(["sh", "-c", script], _ANSWER_SECONDS)
    if not isinstance(fact, Known):
        return fact
    output = fact.value
    if output.status:
        said = output.stderr.strip().splitlines()
        return Unknown("sh", said[-1][:200] if said else f"status {output.status}")
    return Known(output.stdout, fact.source)
