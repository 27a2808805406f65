"""`undervisor`: gathers the verbs and turns every failure into one message and an exit code."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence

import typer

from undervisor import __version__
from undervisor.errors import ExitCode, UndervisorError
from undervisor.host.access import schemes
from undervisor.host.access.protocol import Host

VERBS: dict[str, str] = {
    # verb: its module under `undervisor.cli`, which holds a function of the verb's own name
    "test": "test",
    "quirks": "quirks",
    "run": "run",
    "shell": "shell",
    "demo": "demo",
    "bench": "bench",
    "check": "check",
    "enable": "enable",
    "disable": "enable",
    "record": "record",
    "migrate": "migrate",
    "explain": "explain",
    "rules": "rules",
    "caps": "caps",
    "state": "state",
    "exits": "exits",
    "report": "report",
    "lab": "lab",
    "guest": "guest",
    "network": "network",
}


def _app(words: Sequence[str] = ()) -> typer.Typer:
    """The application with every verb of `VERBS`, or only the one that `words` begin with."""
    app = typer.Typer(
        name="undervisor",
        help="The hypervisor under your hypervisor.",
        epilog="Exit codes: 0 good, 1 a negative verdict, 2 bad input, 4 the guest died, "
        "6 timed out, 8 the silicon died, 10 a bug of ours; `run` adds the guest's own odd codes.",
        no_args_is_help=True,
        add_completion=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
    )
    only = words[0] if words and words[0] in VERBS else ""  # the others cost time to import
    for verb, module in VERBS.items():
        if only and verb != only:
            continue
        command = importlib.import_module(f"undervisor.cli.{module}")
        member = getattr(command, verb.replace("-", "_"))
        if isinstance(member, typer.Typer):
            app.add_typer(member, name=verb)
        else:
            app.command(name=verb)(member)

    @app.callback()
    def options(
        version: bool = typer.Option(False, "--version", help="Print the version and leave."),
        debug: bool = typer.Option(False, "--debug", help="Show a traceback when something fails."),
    ) -> None:
        """The hypervisor under your hypervisor."""

    return app


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; never returns, always leaves with a documented exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    if words == ["--version"]:
        print(f"undervisor {__version__}")
        sys.exit(ExitCode.OK)
    debug = "--debug" in words
    schemes.OPENERS["lab"] = _open_level
    try:
        words = [word for word in words if word != "--debug"]
        _app(words)(args=words, prog_name="undervisor")
    except UndervisorError as error:
        _explain(error.message, error.hint, debug)
        sys.exit(error.exit_code)
    except Exception as error:
        _explain(
            f"{type(error).__name__}: {error}",
            "this is a bug of undervisor; --debug shows the traceback to report",
            debug,
        )
        sys.exit(ExitCode.INTERNAL_ERROR)


def _open_level(name: str) -> Host:
    """`lab:l1`: a level of a running lab."""
    from undervisor.lab.host import open_level  # only where one is asked for

    return open_level(name)


def _explain(message: str, hint: str, debug: bool) -> None:
    """One message on stderr; the traceback only where it was asked for."""
    if debug:
        traceback.print_exc()
    print(f"undervisor: {message}" + (f"\n  hint: {hint}" if hint else ""), file=sys.stderr)
