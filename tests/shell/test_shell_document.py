"""The sessions in docs/shell.md are real: typed again, they print the same."""

import ast
import contextlib
import io
import re
from pathlib import Path

import pytest

from undervisor.errors import UndervisorError
from undervisor.shell.console import error_words
from undervisor.shell.machine import Machine
from undervisor.shell.namespace import Namespace
from undervisor.targets.builtin import BuiltinTarget

DOCUMENT = Path(__file__).parents[2] / "docs" / "shell.md"
SESSIONS = re.findall(r"```pycon\n(.*?)\n```", DOCUMENT.read_text(), re.DOTALL)
PROBE = re.compile(r"0x(?:10|20)[0-9a-f]{4}\b")  # addresses in it, which change with its text


def steps(session):
    """What is typed, and what it printed."""
    for part in re.split(r"^>>> ", session, flags=re.MULTILINE)[1:]:
        typed, _, printed = part.partition("\n")
        yield typed, printed.rstrip("\n")


def typed_again(names, statement):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            exec(compile(ast.Interactive(ast.parse(statement).body), "typed", "single"), names)
        except UndervisorError as error:
            print(error_words(error))
    return out.getvalue().rstrip("\n")


@pytest.mark.parametrize("session", SESSIONS, ids=["vmx", "svm", "faults"])
def test_a_session_prints_what_the_document_shows(session):
    cpu = "amd" if session.startswith(">>> svm.") else "intel"
    machine = Machine(BuiltinTarget(cpu), 2, 20)
    try:
        names = Namespace(machine).names
        for typed, printed in steps(session):
            assert PROBE.sub("@", typed_again(names, typed)) == PROBE.sub("@", printed), typed
    finally:
        machine.close()
