"""What is attached to a failed test: how the machine stands, and what happened last."""

from __future__ import annotations

from undervisor.errors import UndervisorError
from undervisor.report.trace.transition import text
from undervisor.testing.remote import BootedVm

FAILURES_SHOWN = 3
SERIAL_SHOWN = 4000


def describe(vm: BootedVm, last: int | None) -> str:
    """The failed VM entries, the registers, the `last` transitions (None: all that are kept),
    and the serial output.
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
    shown = transitions if last is None else transitions[-last:] if last else []
    kept = "kept transition" if last is None else "transition"
    if not shown:
        return _title(f"no {kept}s")
    title = f"the last {len(shown)} transitions" if len(shown) > 1 else f"the last {kept}"
    return "\n".join((_title(title), *map(text, shown)))


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
