"""Values in a recording: each is checked, because a recording may come from anybody."""

from __future__ import annotations

import errno
from typing import Any

from undervisor.host.access.protocol import Output, Stat
from undervisor.host.fact import Fact, Known, Missing, Unknown, from_errno


def strings(value: object) -> list[str]:
    """A list of strings, or ValueError."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"a list of strings was expected, not {str(value)[:80]}")
    return value


def text(value: object) -> str:
    """Text, written as one string or as a list of lines."""
    return value if isinstance(value, str) else "".join(f"{line}\n" for line in strings(value))


def output(command: dict[str, Any]) -> Output | str:
    """How a recorded command ended, or the word for why it never ran."""
    if "error" in command:
        return str(command["error"])
    status = command.get("status", 0)
    if type(status) is not int:
        raise ValueError("a command's status must be an integer")
    return Output(status, text(command.get("stdout", "")), text(command.get("stderr", "")))


def number(value: object, width: int) -> int:
    """An unsigned number of `width` bits, written as one or in hexadecimal; or ValueError."""
    number = int(value, 0) if isinstance(value, str) else value
    if type(number) is not int or not 0 <= number < 1 << width:
        raise ValueError(f"{str(value)[:40]} is not a number of {width} bits")
    return number


def stat(said: object, path: str) -> Fact[Stat]:
    """A recorded mode; unknown where it makes no sense."""
    try:
        if not isinstance(said, dict):
            raise ValueError("not an object")
        device = said.get("device")
        return Known(
            Stat(
                str(said.get("kind", "file")),
                int(str(said.get("mode", "0644")), 8),
                str(said.get("owner", "root")),
                str(said.get("group", "root")),
                (int(device[0]), int(device[1])) if isinstance(device, list) else None,
            ),
            path,
        )
    except (ValueError, IndexError, TypeError) as error:
        return Unknown(path, f"recorded wrongly: {error}")


def errno_of(said: object, source: str) -> Missing:
    """An errno by name; other words stand for themselves (a command that timed out)."""
    if isinstance(said, str) and (number := getattr(errno, said, None)):
        return from_errno(number, source)
    return Unknown(source, str(said)[:200])
