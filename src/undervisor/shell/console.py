"""The prompt and its scripts: statements executed, values shown, failures told in one message."""

from __future__ import annotations

import ast
import code
import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from undervisor.errors import BadInput, ExitCode, UndervisorError

HISTORY_LINES: Final = 1000
_INTERRUPTED: Final = "interrupted; if the machine does not answer any more, reboot() starts anew"


def error_words(error: UndervisorError) -> str:
    """A failure as one message."""
    return f"{error.message}" + (f"\n  {error.hint}" if error.hint else "")


# -- scripts -----------------------------------------------------------------------------------


def run_script(source: str, names: dict[str, Any], filename: str) -> int:
    """Execute a script as if it were typed, values shown; the exit code.

    The first statement that raises ends it: NEGATIVE for an exception of Python's, an assertion
    among them.  BadInput where it is no Python; a failure of the machine's is raised as it is.
    """
    try:
        statements = ast.parse(source, filename).body
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        message = error.msg if isinstance(error, SyntaxError) else str(error)
        raise BadInput(f"{filename}{line}: {message}") from None
    for statement in statements:
        try:
            exec(compile(ast.Interactive([statement]), filename, "single"), names)
        except UndervisorError:
            raise
        except SystemExit as end:
            return _status(end)
        except KeyboardInterrupt:
            raise
        except Exception as error:
            line_number = _line(error, filename) or statement.lineno
            words = "".join(traceback.format_exception_only(error)).strip()
            print(f"{filename}, line {line_number}: {words}", file=sys.stderr)
            return ExitCode.NEGATIVE
    return ExitCode.OK


def _status(end: SystemExit) -> int:
    """What `exit(...)` means, as Python has it."""
    if end.code is None:
        return ExitCode.OK
    if isinstance(end.code, int):
        return end.code & 0xFF
    print(end.code, file=sys.stderr)
    return ExitCode.NEGATIVE


def _line(error: BaseException, filename: str) -> int | None:
    """The line of the script that an exception came through last."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((f.lineno for f in reversed(frames) if f.filename == filename), None)


# -- the prompt --------------------------------------------------------------------------------


class Console(code.InteractiveConsole):
    """Python's own console, but for failures of the machine's, which are one message."""

    def showtraceback(self) -> None:
        """A message for what the user can act on, else Python's traceback."""
        error = sys.exc_info()[1]
        if isinstance(error, UndervisorError):
            self.write(error_words(error) + "\n")
        elif isinstance(error, KeyboardInterrupt):
            self.write(f"\n{_INTERRUPTED}\n")
        else:
            super().showtraceback()


def interact(names: dict[str, Any], banner: str) -> None:
    """The prompt, until its input ends."""
    with _completion(names):
        Console(names).interact(banner, exitmsg="")


def history_file() -> Path:
    """Where lines that were typed are kept: XDG's place for state."""
    home = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(home).expanduser() / "undervisor" / "shell_history"


@contextlib.contextmanager
def _completion(names: dict[str, Any]) -> Iterator[None]:
    """Tab completion and history, where this Python has readline."""
    try:
        import readline
        import rlcompleter
    except ImportError:
        yield
        return
    readline.set_completer(rlcompleter.Completer(names).complete)
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
    path = history_file()
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        readline.set_history_length(HISTORY_LINES)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
