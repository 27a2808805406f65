"""What is attached to a failed test: how the machine stands, and what happened last."""

from __future__ import annotations

from itertools import groupby

from undervisor.errors import UndervisorError
from undervisor.hypervisor.trace import Transition
from undervisor.report.trace.transition import text
from undervisor.testing.remote import BootedVm

FAILURES_SHOWN = 3
SERIAL_SHOWN = 4000


def describe(vm: BootedVm, last: int | None) -> str:
    """The failed VM entries, the registers, the last transitions, and the serial output.

    `last`: how many transitions, repeated ones counted once and folded; None: all that are kept.
    """
    parts = [vm.end or "the machine is at rest; the guest has not ended the run"]
    parts += [_entries(vm, last), _registers(vm), _trace(vm, last), _serial(vm, last)]
    return "\n".join(part for part in parts if part)


def _entries(vm: BootedVm, last: int | None) -> str:
    failures = vm.failures()
    shown = failures if last is None else failures[-FAILURES_SHOWN:]
    if not shown:
        return ""
    more = f", the last {len(shown)} of {len(failures)}" if len(shown) < len(failures) else ""
    return "\n".join((_title(f"VM entries that failed{more}"), *shown))


def _registers(vm: BootedVm) -> str:
    try:
        found = vm.registers()
    except UndervisorError as error:
        found = f"lost: {error.message}"
    return f"{_title('registers')}\n{found}"


def _trace(vm: BootedVm, last: int | None) -> str:
    transitions = vm.exits()
    if last is None:
        title = f"the last {len(transitions)} transitions"
        return "\n".join((_title(title), *map(text, transitions)))
    groups = [list(group) for _, group in groupby(transitions, _kind)]
    shown = groups[-last:] if last > 0 else []
    count = sum(map(len, shown))
    return "\n".join((_title(f"the last {count} transitions"), *map(_folded, shown)))


def _kind(transition: Transition) -> tuple[int, int, int, str]:
    return transition.vcpu, transition.level, transition.to, transition.reason


def _folded(group: list[Transition]) -> str:
    """One after the other of a kind, a guest that prints for example: the first and the last."""
    if len(group) < 4:
        return "\n".join(map(text, group))
    return f"{text(group[0])}\n{'':16}... {len(group) - 2} more ...\n{text(group[-1])}"


def _serial(vm: BootedVm, last: int | None) -> str:
    printed = vm.printed()
    shown = printed if last is None else printed[-SERIAL_SHOWN:]
    if not shown:
        return _title("no serial output")
    more = f", its last {len(shown)} bytes" if len(shown) < len(printed) else ""
    words = shown.decode("utf-8", "backslashreplace").replace("\r\n", "\n")
    return f"{_title(f'serial output{more}')}\n{words.rstrip()}"


def _title(words: str) -> str:
    return f"-- {words} --"
